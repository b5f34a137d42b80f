"""The typed graph for TensorRT says what the net says, and the kit beside it builds, compares and refuses.

There is no TensorRT here. `Recorder` and `Engine` stand in for it: the one writes down which calls are made and proves
nothing else, the other runs the graph in ONNX Runtime where the engine would be, to try what is done with its outputs.
"""

import ctypes
import json
import runpy
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import mowa
from mowa.errors import ModelError
from mowa.exporters.protocol import export
from mowa.exporters.tensorrt import build as building
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.weights import quantize
from mowa.types import FLOAT32, Scheme
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

pytest.importorskip("onnxscript")
import onnx
import onnxruntime

from mowa.exporters.onnx import strong_typing
from mowa.exporters.tensorrt import exporter

QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_tensorrt.py"
PROFILE = ((1, 4_000), (1, 16_000), (3, 24_000))
FP16, BF16 = Scheme("fp16", "float16"), Scheme("bf16", "bfloat16")
STATIC = Scheme("int8-static", "int8", "static")


def tiny(folder, *args, **changes):
    """Fewer convolutions with the hop of seven: quicker to trace."""
    return whole_tiny(folder, *args, **QUICK | changes)


def static(model):
    """`model` in int8-static: every linear of its blocks, each with a range that is not symmetric."""
    net = model.net
    for name, module in list(net.named_modules()):
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            range_ = (0.02, 100 if "output_dense" in name else 130)
            net.set_submodule(name, QuantizedLinear(quantize(module.weight.detach(), 8), module.bias, "static", range_))
    return replace(model, scheme=STATIC)


def exported(model, out):
    return export(model, "tensorrt", out, profile=PROFILE)


def loaded(folder):
    return onnx.load(folder / "model.onnx")


def kinds(graph):
    """(operator, types of its inputs, type of its output) of every node."""
    known = onnx.shape_inference.infer_shapes(graph).graph
    found = {one.name: one.type.tensor_type.elem_type for one in [*known.value_info, *known.input, *known.output]}
    found |= {one.name: one.data_type for one in known.initializer}
    name = onnx.TensorProto.DataType.Name
    return [
        (node.op_type, [name(found[one]) for one in node.input if one], name(found[node.output[0]]))
        for node in known.node
    ]


@pytest.fixture(scope="module", params=["wav2vec2-layer", "hubert-group", "wavlm-layer"])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = tiny(root / "base", *request.param.split("-"))
    return base, exported(mowa.load(str(base)), root / "out")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    root = tmp_path_factory.mktemp("half")
    return exported(replace(mowa.load(str(tiny(root / "base"))), scheme=BF16), root / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return exported(mowa.load(str(tiny(root / "base"))), root / "out")


@pytest.fixture
def traced(whole, monkeypatch):
    """The graph that was traced already, where it is not what a test is about. Gives the model of it."""

    def copy(model, wide, folder, masked):
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(whole.folder / name, folder / name)

    monkeypatch.setattr(exporter, "_trace", copy)
    return mowa.load(whole.origin.source)


def test_any_length_and_any_batch_give_what_transformers_gives(made):
    base, artifact = made
    model = mowa.load(str(base))
    session = onnxruntime.InferenceSession(artifact.folder / "model.onnx", providers=["CPUExecutionProvider"])
    masked = artifact.details["masked"]
    assert masked == (model.net.config.feat_extract_norm == "layer" and model.family.name != "wavlm")
    lengths = np.array([20_000, 4_097, 401] if masked else [20_000] * 3)
    values = np.stack([np.pad(clip(index, n), (0, lengths.max() - n)) for index, n in enumerate(lengths)])
    feed = {"input_values": values}
    if masked:
        feed["attention_mask"] = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    said = session.run(["logits"], feed)[0]
    for index, length in enumerate(lengths):
        with torch.inference_mode():
            expected = model.net(torch.from_numpy(values[index : index + 1, :length])).logits[0].numpy()
        np.testing.assert_allclose(said[index, : len(expected)], expected, atol=1e-4)


def test_it_says_what_was_not_run(made):
    _, artifact = made
    note = json.loads((artifact.folder / "mowa.json").read_text())
    assert note["compared"]["farthest"] < 1e-4
    assert note["compared"]["unchecked"].startswith("TensorRT itself was not run: ")
    assert set(note["files"]) == {"model.onnx", "model.onnx.data"}
    assert note["details"]["engine"] is None
    assert note["details"]["profile"]["input_values"] == [list(shape) for shape in PROFILE]
    assert {"build.py", "build.sh", "build.json", "reference.npz"} < {file.name for file in artifact.folder.iterdir()}


def test_only_operators_that_tensorrt_reads(made):
    graph = loaded(made[1].folder)
    onnx.checker.check_model(graph)
    assert strong_typing.list_operators(graph.graph) <= exporter.SUPPORTED_OPS
    assert not strong_typing.list_operators(graph.graph) & {"NonZero", "CumSum", "ScatterND"}


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "SUPPORTED_OPS", exporter.SUPPORTED_OPS - {"Gelu", "Softmax"})
    with pytest.raises(ModelError, match="TensorRT does not read Gelu, Softmax"):
        exported(mowa.load(str(tiny(tmp_path / "base"))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_products_are_narrow_and_norms_wide(half):
    onnx.checker.check_model(str(half.folder / "model.onnx"))
    found = kinds(loaded(half.folder))
    products = [(given, out) for name, given, out in found if name in strong_typing.MATMUL_OPS]
    assert len(products) == 14
    assert all(set(given) == {"BFLOAT16"} and out == "BFLOAT16" for given, out in products)
    norms = [given for name, given, out in found if name in ("LayerNormalization", "Softmax")]
    assert len(norms) == 8
    assert all(set(given) == {"FLOAT"} for given in norms)
    assert half.agreeing > 0.9
    allowed = json.loads((half.folder / "build.json").read_text())["allowed"]
    assert 0.001 <= allowed["rms"] < 0.05


def test_what_is_emulated_is_what_torch_computes(tmp_path):
    """A product of halves is one of rounded inputs, summed in float32 and rounded: of torch's bfloat16 too."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 64), (64, 7)))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([product], "one", values[:1], values[1:], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    strong_typing.cast_to_half(model.graph, "bfloat16")
    strong_typing.emulate_half(model.graph)
    onnx.save_model(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    (said,) = session.run(["y"], {"x": x})
    narrow, wide = (torch.from_numpy(one).bfloat16() for one in (x, w))
    expected = (narrow.float() @ wide.float()).bfloat16().float().numpy()
    np.testing.assert_array_equal(said, expected)
    assert np.abs(said - x @ w).max() > 1e-3


def test_int8_is_symmetric_and_halves_are_beside_it(tmp_path):
    model = static(mowa.load(str(tiny(tmp_path / "base"))))
    artifact = exported(model, tmp_path / "out")
    graph = loaded(artifact.folder)
    onnx.checker.check_model(str(artifact.folder / "model.onnx"))
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}
    quantised = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) >= 4
    for node in quantised:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
    assert {round(float(constants[node.input[1]]) * 127 / 0.02) for node in quantised} == {130, 155}
    found = kinds(graph)
    assert not any("UINT8" in given for _, given, _ in found)
    products = [(set(given), out) for name, given, out in found if name in strong_typing.MATMUL_OPS]
    assert sorted(out for _, out in products) == ["FLOAT"] * 6 + ["FLOAT16"] * 8
    assert artifact.agreement > 0.8


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme("int8-dynamic", "int8", "dynamic"), "no DynamicQuantizeLinear; use int8-static"),
        (Scheme("int8-weight", "int8"), "with int8 inputs alone; use int8-static"),
        (Scheme("int4-weight", "int4", group_size=32), "MatMulNBits, which TensorRT has not; use int8-static, or bf16"),
        (Scheme("nf4", "nf4", group_size=64), "MatMulBnb4, which TensorRT has not; use int8-static, or bf16"),
        (Scheme("mixed", "mixed", "dynamic", group_size=32), "operators that TensorRT has not; use int8-static"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_schemes_are_refused(tmp_path, scheme, said):
    model = mowa.load(str(tiny(tmp_path / "base")))
    assert not exporter.unsupported_reason(model)
    with pytest.raises(ModelError, match=said):
        exported(replace(model, scheme=scheme), tmp_path / "out")


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (((1, 100), (1, 200), (4, 300)), "needs 400 samples for a frame, and the profile begins at 100"),
        (((2, 4_000), (1, 5_000), (4, 6_000)), "smallest, the usual and the largest"),
        (((1, 4_000), (4, 6_000)), "smallest, the usual and the largest"),
        ((4_000, 5_000, 6_000), "smallest, the usual and the largest"),
    ],
)
def test_a_profile_that_is_none_is_refused(tmp_path, profile, said):
    model = mowa.load(str(tiny(tmp_path / "base", conv_dim=(16,) * 3)))
    least = 10 + 5 * 7 + 40 * 7
    with pytest.raises(ModelError, match=said.replace("400", str(least))):
        export(model, "tensorrt", tmp_path / "out", profile=profile)


@pytest.mark.parametrize(
    ("scheme", "wrong", "said"),
    [
        (FLOAT32, lambda logits: logits * 1.01, "is not what the net is"),
        (FP16, lambda logits: np.roll(logits, 1, -1), "does not bear fp16 as TensorRT: .*; use bf16"),
    ],
    ids=["float32", "fp16"],
)
def test_what_is_not_the_net_leaves_nothing(tmp_path, traced, monkeypatch, scheme, wrong, said):
    model = replace(traced, scheme=scheme)
    heard = exporter._said
    monkeypatch.setattr(exporter, "_said", lambda *given: [wrong(one) for one in heard(*given)])
    with pytest.raises(ModelError, match=said):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_that_overflows_is_refused(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base")))
    with torch.no_grad():
        model.net.lm_head.weight.mul_(1e6)
    with pytest.raises(ModelError, match="in 100% of frames another letter is likeliest; use bf16"):
        exported(replace(model, scheme=FP16), tmp_path / "out")


def test_what_is_finite_and_wrong_or_not_a_number_is_seen():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 9, 5)).astype(np.float32)
    cases = [{"logits": logits, "frames": np.array([9, 4])}]
    padded = logits.copy()
    padded[1, 4:] = np.nan  # what padding gave is nobody's
    assert building.compare_logits([padded], cases) == {"farthest": 0, "rms": 0, "agreeing": 1}
    assert not building.check_tolerances(
        building.compare_logits([padded], cases), {"farthest": 1e-3, "rms": 1e-3, "agreeing": 0.8}
    )
    flat = building.compare_logits([np.full_like(logits, 3.0)], cases)
    assert "rms is" in building.check_tolerances(flat, {"rms": 0.1, "agreeing": 0.8})
    broken = logits.copy()
    broken[0, 0, 0] = np.nan
    found = building.compare_logits([broken], cases)
    assert found["agreeing"] == 0
    assert "rms is inf" in building.check_tolerances(found, {"rms": 0.1, "agreeing": 0.8})
    assert "farthest is inf" in building.check_tolerances(found, {"farthest": 1e-3})


class Recorder(types.ModuleType):
    """In TensorRT's place: every call is written down, by the path of names to it, and gives a recorder again."""

    __version__ = "recorded"

    def __init__(self, calls, path="trt", answers=None):
        super().__init__(path)
        self._calls, self._path, self._answers = calls, path, answers or {}

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(self._calls, f"{self._path}.{name}", self._answers)

    def __call__(self, *given):
        self._calls.append((self._path, given))
        return self._answers.get(self._path, Recorder(self._calls, f"{self._path}()", self._answers))

    def __int__(self):
        return 1

    def __str__(self):
        return self._path


BUILDER = "trt.Builder()"


def recorded(monkeypatch, **answers):
    calls = []
    told = {f"{BUILDER}.build_serialized_network": b"an engine"} | answers
    monkeypatch.setitem(sys.modules, "tensorrt", Recorder(calls, answers=told))
    return calls


def test_the_calls_that_build_an_engine(half, monkeypatch):
    calls = recorded(monkeypatch)
    assert building.build_engine(half.folder) == b"an engine"
    made = dict(calls)
    assert made[f"{BUILDER}.create_network"] == (1 << 1,)  # STRONGLY_TYPED, of whatever number it is
    assert made["trt.OnnxParser().parse_from_file"] == (str(half.folder / "model.onnx"),)
    config, profile = f"{BUILDER}.create_builder_config()", f"{BUILDER}.create_optimization_profile()"
    assert str(made[f"{config}.clear_flag"][0]) == "trt.BuilderFlag.TF32"
    shapes = {given[0]: given[1:] for path, given in calls if path == f"{profile}.set_shape"}
    assert shapes == {"input_values": PROFILE, "attention_mask": PROFILE}
    assert str(made[f"{config}.add_optimization_profile"][0]) == profile
    assert [str(one) for one in made[f"{BUILDER}.build_serialized_network"]] == [f"{BUILDER}.create_network()", config]


def test_what_tensorrt_says_is_passed_on(half, monkeypatch):
    recorded(monkeypatch, **{f"{BUILDER}.build_serialized_network": None})
    with pytest.raises(RuntimeError, match=r"cannot build model\.onnx"):
        building.build_engine(half.folder)
    recorded(monkeypatch, **{"trt.OnnxParser().parse_from_file": False})
    monkeypatch.setattr(Recorder, "__index__", lambda self: 1, raising=False)  # num_errors
    with pytest.raises(RuntimeError, match=r"cannot read model\.onnx: trt\.OnnxParser\(\)\.get_error\(\)"):
        building.build_engine(half.folder)


class Engine:
    """An engine, its runtime and its context at once: the graph in ONNX Runtime, over bare addresses."""

    num_io_tensors = 3

    def __init__(self, graph):
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.shapes, self.places = {}, {}

    def deserialize_cuda_engine(self, engine):
        return self if engine == b"an engine" else None

    def create_execution_context(self):
        return self

    def get_tensor_name(self, index):
        return ("input_values", "attention_mask", "logits")[index]

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape

    def set_tensor_address(self, name, place):
        self.places[name] = place

    def _at(self, name, shape, kind):
        return np.ctypeslib.as_array(ctypes.cast(self.places[name], ctypes.POINTER(kind)), shape)

    def get_tensor_shape(self, name):
        batch, samples = self.shapes["input_values"]
        return batch, (samples - 325) // 320 + 1, 15

    def execute_async_v3(self, stream):
        feed = {
            "input_values": self._at("input_values", self.shapes["input_values"], ctypes.c_float),
            "attention_mask": self._at("attention_mask", self.shapes["attention_mask"], ctypes.c_int64),
        }
        said = self.session.run(["logits"], feed)[0]
        self._at("logits", said.shape, ctypes.c_float)[:] = said
        return True


@pytest.fixture
def here(whole, monkeypatch):
    """A machine with a GPU, as far as `tensorrt` and `torch.cuda` are asked by `building`."""
    engine, empty = Engine(whole.folder / "model.onnx"), torch.empty
    recorded(monkeypatch, **{"trt.Runtime": engine})
    monkeypatch.setattr(torch, "empty", lambda *given, device=None, **rest: empty(*given, **rest))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield engine
    (whole.folder / "model.engine").unlink(missing_ok=True)


def broken(engine):
    run = engine.session.run
    engine.session = types.SimpleNamespace(run=lambda names, feed: [run(names, feed)[0] * np.float32(1.01)])


def test_an_engine_is_kept_if_it_says_what_the_net_says(whole, here, capsys):
    assert building.main(whole.folder) == 0
    assert (whole.folder / "model.engine").read_bytes() == b"an engine"
    assert "farthest" in capsys.readouterr().out


def test_an_engine_that_says_another_thing_is_not_kept(whole, here, capsys):
    broken(here)
    before = {file.name for file in whole.folder.iterdir()}
    (whole.folder / "unchecked.engine").write_bytes(b"an engine")
    assert building.main(whole.folder, "unchecked.engine") == 1
    assert "farthest is" in capsys.readouterr().err
    assert {file.name for file in whole.folder.iterdir()} == before
    assert building.main(whole.folder, "unchecked.engine") == 1  # there is none
    assert "unchecked.engine" in capsys.readouterr().err


def test_an_engine_of_another_gpu_is_not_kept(whole, here, capsys):
    (whole.folder / "unchecked.engine").write_bytes(b"of another one")
    assert building.main(whole.folder, "unchecked.engine") == 1
    assert "of another GPU or version" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [1.0, 1.01])
def test_where_there_is_a_gpu_the_engine_is_built_and_compared(tmp_path, traced, monkeypatch, wrong):
    def outputs(engine, feeds):
        assert engine == b"an engine"
        return [one * np.float32(wrong) for one in said]

    said, heard = [], exporter._said
    monkeypatch.setattr(exporter, "_said", lambda *given: said.extend(heard(*given)) or said)
    monkeypatch.setattr(exporter, "_here", lambda: True)
    monkeypatch.setattr(building, "build_engine", lambda folder: b"an engine")
    monkeypatch.setattr(building, "run_engine", outputs)
    if wrong != 1:
        with pytest.raises(ModelError, match="does not say what the net says: farthest is"):
            exported(traced, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    artifact = exported(traced, tmp_path / "out")
    assert "model.engine" in artifact.files
    assert artifact.details["engine"] == "model.engine"
    note = json.loads((artifact.folder / "mowa.json").read_text())
    assert (note["compared"]["unchecked"], note["made_by"]["tensorrt"]) == ("", None)
    assert note["compared"]["farthest"] < 1e-4


def test_the_kit_stands_alone(half):
    """Without TensorRT it says so and leaves nothing; the script for trtexec is one that a shell reads."""
    run = subprocess.run([sys.executable, "-I", half.folder / "build.py"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip() == "No module named 'tensorrt'"
    assert not (half.folder / "model.engine").exists()
    text = (half.folder / "build.sh").read_text()
    subprocess.run(["sh", "-n", half.folder / "build.sh"], check=True)
    assert "--minShapes=input_values:1x4000,attention_mask:1x4000 " in text
    assert "--maxShapes=input_values:3x24000,attention_mask:3x24000" in text
    assert "--stronglyTyped" in text
    assert "fp16" not in text


def test_the_corners_of_the_profile_are_compared(half):
    cases = building.read_references(half.folder)
    assert [case["input_values"].shape for case in cases] == [(1, 4_000), (1, 16_000), (3, 24_000), (1, 24_000)]
    assert [list(case["attention_mask"].sum(-1)) for case in cases][2] == [24_000, 14_000, 4_000]
    for case in cases:
        assert case["logits"].shape[1] == case["frames"].max()


def test_the_example_reads_what_the_native_engine_does(whole, here, tmp_path, monkeypatch, capsys):
    """Its feeding and decoding, that is: the engine is the graph in ONNX Runtime."""
    file, base = tmp_path / "noise.wav", whole.origin.source
    soundfile.write(file, clip(3, 20_000), 16_000)
    (whole.folder / "model.engine").write_bytes(b"an engine")
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(sys, "argv", ["run_tensorrt.py", str(whole.folder), str(file)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out.strip()
    assert said == mowa.transcribe(file, base, device="cpu", dtype="float32", speech=0.0).text
    assert len(said) > 10
