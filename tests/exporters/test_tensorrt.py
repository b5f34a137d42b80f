"""The strongly typed graph for TensorRT against the net, and the files that build and verify the engine.

TensorRT is not installed here. `Recorder` replaces it and records which calls are made; `Engine` runs the graph in ONNX
Runtime instead of an engine, to test what is done with its outputs.
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
from mowa.models import diff as model_diff
from mowa.types import FLOAT32, Scheme
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

pytest.importorskip("onnxscript")
import onnx
import onnxruntime

from mowa.exporters.onnx import strong_typing
from mowa.exporters.tensorrt import exporter

SHORT = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_tensorrt.py"
PROFILE = ((1, 4_000), (1, 16_000), (3, 24_000))
FP16, BF16 = Scheme("fp16", "float16"), Scheme("bf16", "bfloat16")
STATIC = Scheme("int8-static", "int8", "static")


def tiny(folder, *args, **changes):
    """A net with three convolutions instead of seven, which is faster to trace; the hop is the same."""
    return whole_tiny(folder, *args, **SHORT | changes)


def static_model(model):
    """Quantize the linear layers of the blocks with int8-static and asymmetric input ranges."""
    net = model.net
    for name, module in list(net.named_modules()):
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            qparams = (0.02, 100 if "output_dense" in name else 130)
            weight = quantize(module.weight.detach(), 8)
            net.set_submodule(name, QuantizedLinear(weight, module.bias, "static", qparams))
    return replace(model, scheme=STATIC)


def export_tensorrt(model, out):
    return export(model, "tensorrt", out, optimization_profile=PROFILE)


def load_graph(folder):
    return onnx.load(folder / "model.onnx")


def node_dtypes(graph):
    """Return (operator, dtypes of its inputs, dtype of its output) of every node."""
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    found = {one.name: one.type.tensor_type.elem_type for one in values}
    found |= {one.name: one.data_type for one in inferred.initializer}
    name = onnx.TensorProto.DataType.Name
    return [
        (node.op_type, [name(found[one]) for one in node.input if one], name(found[node.output[0]]))
        for node in inferred.node
    ]


NETS = ["wav2vec2-layer", "hubert-group", "wavlm-layer", "unispeech-sat-layer", "data2vec-audio-layer"]


@pytest.fixture(scope="module", params=NETS)
def artifacts(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = tiny(root / "base", *request.param.rsplit("-", 1))
    return base, export_tensorrt(mowa.load(str(base)), root / "out")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    root = tmp_path_factory.mktemp("half")
    return export_tensorrt(replace(mowa.load(str(tiny(root / "base"))), scheme=BF16), root / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return export_tensorrt(mowa.load(str(tiny(root / "base"))), root / "out")


@pytest.fixture
def traced(whole, monkeypatch):
    """A model whose graph is copied from `whole` instead of traced."""

    def copy(model, net, folder, takes_mask):
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(whole.folder / name, folder / name)

    monkeypatch.setattr(exporter, "_trace", copy)
    return mowa.load(whole.origin.source)


def test_any_length_and_any_batch_give_what_transformers_gives(artifacts):
    base, artifact = artifacts
    model = mowa.load(str(base))
    session = onnxruntime.InferenceSession(artifact.folder / "model.onnx", providers=["CPUExecutionProvider"])
    takes_mask = artifact.details["attention_mask"]
    assert takes_mask == (model.net.config.feat_extract_norm == "layer" and "tensorrt_mask" in model.family.supports)
    lengths = np.array([20_000, 4_097, 401] if takes_mask else [20_000] * 3)
    values = np.stack([np.pad(clip(index, n), (0, lengths.max() - n)) for index, n in enumerate(lengths)])
    feed = {"input_values": values}
    if takes_mask:
        feed["attention_mask"] = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    logits = session.run(["logits"], feed)[0]
    for index, length in enumerate(lengths):
        with torch.inference_mode():
            expected = model.net(torch.from_numpy(values[index : index + 1, :length])).logits[0].numpy()
        np.testing.assert_allclose(logits[index, : len(expected)], expected, atol=1e-4)


def test_the_manifest_says_that_tensorrt_was_not_run(artifacts):
    _, artifact = artifacts
    data = json.loads((artifact.folder / "mowa.json").read_text())
    assert data["verification"]["max_abs_diff"] < 1e-4
    assert data["verification"]["unverified_reason"].startswith("TensorRT was not run: ")
    assert set(data["files"]) == {"model.onnx", "model.onnx.data"}
    assert data["details"]["engine"] is None
    assert data["details"]["profile"]["input_values"] == [list(shape) for shape in PROFILE]
    assert {"build.py", "build.sh", "build.json", "reference.npz"} < {file.name for file in artifact.folder.iterdir()}


def test_the_graph_has_only_operators_that_tensorrt_supports(artifacts):
    graph = load_graph(artifacts[1].folder)
    onnx.checker.check_model(graph)
    assert strong_typing.list_operators(graph.graph) <= exporter.SUPPORTED_OPS
    assert not strong_typing.list_operators(graph.graph) & {"NonZero", "CumSum", "ScatterND"}


def test_an_unsupported_operator_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "SUPPORTED_OPS", exporter.SUPPORTED_OPS - {"Gelu", "Softmax"})
    with pytest.raises(ModelError, match="TensorRT does not support Gelu, Softmax"):
        export_tensorrt(mowa.load(str(tiny(tmp_path / "base"))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_products_are_in_half_precision_and_norms_in_float32(half):
    onnx.checker.check_model(str(half.folder / "model.onnx"))
    found = node_dtypes(load_graph(half.folder))
    products = [(inputs, out) for name, inputs, out in found if name in strong_typing.MATMUL_OPS]
    assert len(products) == 14
    assert all(set(inputs) == {"BFLOAT16"} and out == "BFLOAT16" for inputs, out in products)
    norms = [inputs for name, inputs, out in found if name in ("LayerNormalization", "Softmax")]
    assert len(norms) == 8
    assert all(set(inputs) == {"FLOAT"} for inputs in norms)
    assert half.agreement > 0.9
    tolerances = json.loads((half.folder / "build.json").read_text())["tolerances"]
    assert 0.001 <= tolerances["rms_diff"] < 0.05


def test_emulated_half_precision_equals_that_of_torch(tmp_path):
    """Inputs are rounded, sums are computed in float32, and the result is rounded."""
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
    (y,) = session.run(["y"], {"x": x})
    x16, w16 = (torch.from_numpy(array).bfloat16() for array in (x, w))
    expected = (x16.float() @ w16.float()).bfloat16().float().numpy()
    np.testing.assert_array_equal(y, expected)
    assert np.abs(y - x @ w).max() > 1e-3


def test_int8_is_symmetric_and_other_products_are_float16(tmp_path):
    model = static_model(mowa.load(str(tiny(tmp_path / "base"))))
    artifact = export_tensorrt(model, tmp_path / "out")
    graph = load_graph(artifact.folder)
    onnx.checker.check_model(str(artifact.folder / "model.onnx"))
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}
    quantized = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) >= 4
    for node in quantized:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
    assert {round(float(constants[node.input[1]]) * 127 / 0.02) for node in quantized} == {130, 155}
    found = node_dtypes(graph)
    assert not any("UINT8" in inputs for _, inputs, _ in found)
    products = [(set(inputs), out) for name, inputs, out in found if name in strong_typing.MATMUL_OPS]
    assert sorted(out for _, out in products) == ["FLOAT"] * 6 + ["FLOAT16"] * 8
    assert artifact.agreement > 0.8


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("int8-dynamic", "int8", "dynamic"), "no DynamicQuantizeLinear; use int8-static"),
        (Scheme("int8-weight", "int8"), "by int8 inputs only; use int8-static"),
        (Scheme("int4-weight", "int4", group_size=32), "MatMulNBits; use int8-static, or bf16"),
        (Scheme("nf4", "nf4", group_size=64), "MatMulBnb4; use int8-static, or bf16"),
        (Scheme("mixed", "mixed", "dynamic", group_size=32), "operators of mixed schemes; use int8-static"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_unsupported_schemes_are_rejected(tmp_path, scheme, message):
    model = mowa.load(str(tiny(tmp_path / "base")))
    assert not exporter.unsupported_reason(model)
    with pytest.raises(ModelError, match=message):
        export_tensorrt(replace(model, scheme=scheme), tmp_path / "out")


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (((1, 100), (1, 200), (4, 300)), "needs 400 samples"),
        (((2, 4_000), (1, 5_000), (4, 6_000)), "smallest, the usual and the largest"),
        (((1, 4_000), (4, 6_000)), "smallest, the usual and the largest"),
        ((4_000, 5_000, 6_000), "smallest, the usual and the largest"),
    ],
)
def test_invalid_profiles_are_rejected(tmp_path, profile, message):
    model = mowa.load(str(tiny(tmp_path / "base", conv_dim=(16,) * 3)))
    min_samples = 10 + 5 * 7 + 40 * 7
    with pytest.raises(ModelError, match=message.replace("400", str(min_samples))):
        export(model, "tensorrt", tmp_path / "out", optimization_profile=profile)


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (FLOAT32, lambda logits: logits * 1.01, r"the TensorRT graph of .* differs from the model: max_abs_diff is"),
        (FP16, lambda logits: np.roll(logits, 1, -1), r"fp16 is too lossy for .* in TensorRT: .*; use bf16"),
    ],
    ids=["float32", "fp16"],
)
def test_graphs_that_differ_are_rejected(tmp_path, traced, monkeypatch, scheme, change, message):
    model = replace(traced, scheme=scheme)
    run_graph = exporter._run_graph
    monkeypatch.setattr(exporter, "_run_graph", lambda *args: [change(logits) for logits in run_graph(*args)])
    with pytest.raises(ModelError, match=message):
        export_tensorrt(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_that_overflows_is_rejected(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base")))
    with torch.no_grad():
        model.net.lm_head.weight.mul_(1e6)
    with pytest.raises(ModelError, match=r"fp16 overflows for .* in TensorRT: NaN in the output; use bf16"):
        export_tensorrt(replace(model, scheme=FP16), tmp_path / "out")


def test_wrong_and_nan_logits_violate_the_tolerances():
    def compare(found):
        return model_diff.compare(*building.valid_rows([found], cases))

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 9, 5)).astype(np.float32)
    cases = [{"logits": logits, "frames": np.array([9, 4])}]
    padded = logits.copy()
    padded[1, 4:] = np.nan  # frames of padding are ignored
    same = compare(padded)
    assert (same.max_abs_diff, same.rms_diff, same.agreement, same.num_frames) == (0, 0, 1, 13)
    assert not building.check_tolerances(same, {"max_abs_diff": 1e-3, "rms_diff": 1e-3, "agreement": 0.8})
    flat = compare(np.full_like(logits, 3.0))
    assert "rms_diff is" in building.check_tolerances(flat, {"rms_diff": 0.1, "agreement": 0.8})
    broken = logits.copy()
    broken[0, 0, 0] = np.nan
    found = compare(broken)
    assert found.agreement == 12 / 13
    assert "rms_diff is inf" in building.check_tolerances(found, {"rms_diff": 0.1, "agreement": 0.8})
    assert "max_abs_diff is inf" in building.check_tolerances(found, {"max_abs_diff": 1e-3})


class Recorder(types.ModuleType):
    """Replaces TensorRT: records every call by its dotted name, and returns another recorder or a given answer."""

    __version__ = "recorded"

    def __init__(self, calls, path="trt", answers=None):
        super().__init__(path)
        self._calls, self._path, self._answers = calls, path, answers or {}

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(self._calls, f"{self._path}.{name}", self._answers)

    def __call__(self, *args):
        self._calls.append((self._path, args))
        return self._answers.get(self._path, Recorder(self._calls, f"{self._path}()", self._answers))

    def __int__(self):
        return 1

    def __str__(self):
        return self._path


BUILDER = "trt.Builder()"


def record(monkeypatch, **answers):
    calls = []
    answers = {f"{BUILDER}.build_serialized_network": b"an engine"} | answers
    monkeypatch.setitem(sys.modules, "tensorrt", Recorder(calls, answers=answers))
    return calls


def test_the_calls_that_build_an_engine(half, monkeypatch):
    calls = record(monkeypatch)
    assert building.build_engine(half.folder) == b"an engine"
    arguments = dict(calls)
    assert arguments[f"{BUILDER}.create_network"] == (1 << 1,)  # STRONGLY_TYPED, whose number is 1 in the recorder
    assert arguments["trt.OnnxParser().parse_from_file"] == (str(half.folder / "model.onnx"),)
    config, profile = f"{BUILDER}.create_builder_config()", f"{BUILDER}.create_optimization_profile()"
    assert str(arguments[f"{config}.clear_flag"][0]) == "trt.BuilderFlag.TF32"
    shapes = {args[0]: args[1:] for path, args in calls if path == f"{profile}.set_shape"}
    assert shapes == {"input_values": PROFILE, "attention_mask": PROFILE}
    assert str(arguments[f"{config}.add_optimization_profile"][0]) == profile
    network_and_config = [str(one) for one in arguments[f"{BUILDER}.build_serialized_network"]]
    assert network_and_config == [f"{BUILDER}.create_network()", config]


def test_errors_of_tensorrt_are_reported(half, monkeypatch):
    record(monkeypatch, **{f"{BUILDER}.build_serialized_network": None})
    with pytest.raises(RuntimeError, match=r"cannot build model\.onnx"):
        building.build_engine(half.folder)
    record(monkeypatch, **{"trt.OnnxParser().parse_from_file": False})
    monkeypatch.setattr(Recorder, "__index__", lambda self: 1, raising=False)  # num_errors
    with pytest.raises(RuntimeError, match=r"cannot read model\.onnx: trt\.OnnxParser\(\)\.get_error\(\)"):
        building.build_engine(half.folder)


class Engine:
    """Replaces engine, runtime and context: runs the graph in ONNX Runtime on tensors at given addresses."""

    num_io_tensors = 3

    def __init__(self, graph):
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.shapes, self.addresses = {}, {}

    def deserialize_cuda_engine(self, engine):
        return self if engine == b"an engine" else None

    def create_execution_context(self):
        return self

    def get_tensor_name(self, index):
        return ("input_values", "attention_mask", "logits")[index]

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def _array(self, name, shape, ctype):
        return np.ctypeslib.as_array(ctypes.cast(self.addresses[name], ctypes.POINTER(ctype)), shape)

    def get_tensor_shape(self, name):
        batch, samples = self.shapes["input_values"]
        return batch, (samples - 325) // 320 + 1, 15

    def execute_async_v3(self, stream):
        feed = {
            "input_values": self._array("input_values", self.shapes["input_values"], ctypes.c_float),
            "attention_mask": self._array("attention_mask", self.shapes["attention_mask"], ctypes.c_int64),
        }
        logits = self.session.run(["logits"], feed)[0]
        self._array("logits", logits.shape, ctypes.c_float)[:] = logits
        return True


@pytest.fixture
def fake_gpu(whole, monkeypatch):
    """Replace what `building` uses of `tensorrt` and `torch.cuda`."""
    engine, empty = Engine(whole.folder / "model.onnx"), torch.empty
    record(monkeypatch, **{"trt.Runtime": engine})
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **rest: empty(*args, **rest))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield engine
    (whole.folder / "model.engine").unlink(missing_ok=True)


def scale_logits(engine):
    run = engine.session.run
    engine.session = types.SimpleNamespace(run=lambda names, feed: [run(names, feed)[0] * np.float32(1.01)])


def test_a_correct_engine_is_saved(whole, fake_gpu, capsys):
    assert building.main(whole.folder) == 0
    assert (whole.folder / "model.engine").read_bytes() == b"an engine"
    assert "same top token at 100.00%" in capsys.readouterr().out


def test_an_engine_that_differs_is_not_saved(whole, fake_gpu, capsys):
    scale_logits(fake_gpu)
    before = {file.name for file in whole.folder.iterdir()}
    (whole.folder / "unchecked.engine").write_bytes(b"an engine")
    assert building.main(whole.folder, "unchecked.engine") == 1
    assert "max_abs_diff is" in capsys.readouterr().err
    assert {file.name for file in whole.folder.iterdir()} == before
    assert building.main(whole.folder, "unchecked.engine") == 1  # the file is missing
    assert "unchecked.engine" in capsys.readouterr().err


def test_an_engine_of_another_gpu_is_not_saved(whole, fake_gpu, capsys):
    (whole.folder / "unchecked.engine").write_bytes(b"another engine")
    assert building.main(whole.folder, "unchecked.engine") == 1
    assert "built for another GPU or version" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_with_a_gpu_the_engine_is_built_and_compared(tmp_path, traced, monkeypatch, factor):
    def run_engine(engine, feeds):
        assert engine == b"an engine"
        return [logits * np.float32(factor) for logits in graph_logits]

    graph_logits, run_graph = [], exporter._run_graph
    monkeypatch.setattr(exporter, "_run_graph", lambda *args: graph_logits.extend(run_graph(*args)) or graph_logits)
    monkeypatch.setattr(exporter, "_can_build", lambda: True)
    monkeypatch.setattr(building, "build_engine", lambda folder: b"an engine")
    monkeypatch.setattr(building, "run_engine", run_engine)
    if factor != 1:
        with pytest.raises(ModelError, match=r"the TensorRT engine of .* differs from the model: max_abs_diff is"):
            export_tensorrt(traced, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    artifact = export_tensorrt(traced, tmp_path / "out")
    assert "model.engine" in artifact.files
    assert artifact.details["engine"] == "model.engine"
    data = json.loads((artifact.folder / "mowa.json").read_text())
    assert (data["verification"]["unverified_reason"], data["package_versions"]["tensorrt"]) == ("", None)
    assert data["verification"]["max_abs_diff"] < 1e-4


def test_the_build_files_need_no_mowa(half):
    """Without TensorRT the script fails and leaves nothing; the shell script has valid syntax."""
    completed = subprocess.run([sys.executable, "-I", half.folder / "build.py"], capture_output=True, text=True)
    assert completed.returncode == 1
    assert completed.stderr.strip() == "No module named 'tensorrt'"
    assert not (half.folder / "model.engine").exists()
    text = (half.folder / "build.sh").read_text()
    subprocess.run(["sh", "-n", half.folder / "build.sh"], check=True)
    assert "--minShapes=input_values:1x4000,attention_mask:1x4000 " in text
    assert "--maxShapes=input_values:3x24000,attention_mask:3x24000" in text
    assert "--stronglyTyped" in text
    assert "fp16" not in text


def test_all_shapes_of_the_profile_are_compared(half):
    cases = building.read_references(half.folder)
    assert [case["input_values"].shape for case in cases] == [(1, 4_000), (1, 16_000), (3, 24_000), (1, 24_000)]
    assert [list(case["attention_mask"].sum(-1)) for case in cases][2] == [24_000, 14_000, 4_000]
    for case in cases:
        assert case["logits"].shape[1] == case["frames"].max()


def test_the_example_gives_the_transcript_of_mowa(whole, fake_gpu, tmp_path, monkeypatch, capsys):
    """Only its input and decoding: the engine is the graph in ONNX Runtime."""
    file, base = tmp_path / "noise.wav", whole.origin.source
    soundfile.write(file, clip(3, 20_000), 16_000)
    (whole.folder / "model.engine").write_bytes(b"an engine")
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(sys, "argv", ["run_tensorrt.py", str(whole.folder), str(file)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    text = capsys.readouterr().out.strip()
    assert text == mowa.transcribe(file, base, device="cpu", dtype="float32", vad_threshold=0.0).text
    assert len(text) > 10
