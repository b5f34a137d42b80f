"""Core ML programs against transformers, interpreted operator by operator, since Core ML needs macOS."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mowa
from mowa.data import audio
from mowa.errors import MissingDependency, ModelError
from mowa.exporters import manifest
from mowa.exporters.coreml import check, exporter
from mowa.exporters.coreml import net as coreml_net
from mowa.exporters.protocol import export
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.types import Scheme
from tests.checkpoints import KINDS, clip, tiny
from tests.quantized import quantized_linears, tiny_quantized

pytest.importorskip("coremltools")

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}
LENGTHS_S = (0.4, 1.0)
HALF = Scheme("fp16", "float16")
FAMILIES = ("wav2vec2", "hubert", "wavlm")


def open_program(folder):
    with exporter._silence_coremltools():
        return check.open_program(folder / "model.mlpackage")


def run(folder, program, samples, length):
    """Run a normalized recording, padded to `length`, and return its logits."""
    details = json.loads((folder / "mowa.json").read_text())["details"]
    inputs = {"input_values": torch.from_numpy(np.pad(samples, (0, length - len(samples))))[None]}
    if details["attention_mask"]:
        inputs["samples"] = torch.tensor([len(samples)])
    logits = check.run_program(program, inputs)["logits"][0]
    assert logits.dtype == torch.float32
    return logits[: (len(samples) - details["receptive_field"]) // details["hop"] + 1].numpy()


def net_logits(net, samples):
    with torch.inference_mode():
        return net(torch.from_numpy(samples).to(net.dtype)[None]).logits[0].numpy()


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def exported(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("-".join(request.param))
    model = mowa.load(str(tiny(root / "base", *request.param)))
    return model, export(model, "coreml", root / "out", lengths_s=LENGTHS_S)


def test_every_length_gives_what_transformers_gives(exported):
    model, out = exported
    net, program = mowa.load(model.origin.source).net.double().eval(), open_program(out.folder)
    assert out.details["lengths"] == [6_400, 16_000]
    assert out.details["attention_mask"] == read_anatomy(net).is_padding_exact
    for length in out.details["lengths"]:
        for valid in (length, length - 1, length // 2 + 63, 400) if out.details["attention_mask"] else (length,):
            samples = audio.normalize(clip(valid, valid))
            np.testing.assert_allclose(run(out.folder, program, samples, length), net_logits(net, samples), atol=1e-4)


def test_manifest_and_package_describe_the_export(exported):
    model, out = exported
    ct = pytest.importorskip("coremltools")
    data = json.loads((out.folder / "mowa.json").read_text())
    inside = "model.mlpackage/Data/com.apple.CoreML"
    files = {"model.mlpackage/Manifest.json", f"{inside}/model.mlmodel", f"{inside}/weights/weight.bin"}
    assert set(data["files"]) == files
    assert data["verification"]["max_abs_diff"] < 1e-4
    assert data["verification"]["agreement"] == 1
    assert "Core ML was not run" in manifest.read_artifact(out.folder).unverified_reason
    assert (out.details["compute_dtype"], out.details["minimum_os"]) == ("float32", "iOS 16 or macOS 13")
    spec = ct.utils.load_spec(str(out.folder / "model.mlpackage"))
    values, *samples = spec.description.input
    assert [list(one.shape) for one in values.type.multiArrayType.enumeratedShapes.shapes] == [[1, 6_400], [1, 16_000]]
    assert [one.name for one in samples] == (["samples"] if out.details["attention_mask"] else [])
    metadata = spec.description.metadata.userDefined
    assert tuple(json.loads(metadata["vocabulary"])) == model.vocabulary.tokens
    assert (metadata["hop"], metadata["receptive_field"]) == ("320", "400")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_half_precision_computes_norms_over_time_in_float32(tmp_path, family, norm):
    model = mowa.load(str(tiny(tmp_path / "base", family, norm, **SHORT)))
    out = export(replace(model, scheme=HALF), "coreml", tmp_path / "out", lengths_s=LENGTHS_S)
    program, samples = open_program(out.folder), audio.normalize(clip(0, 16_000))
    np.testing.assert_allclose(run(out.folder, program, samples, 16_000), net_logits(model.net, samples), atol=0.1)
    assert output_dtypes(program, "layer_norm") == output_dtypes(program, "linear") == {"fp16"}
    assert output_dtypes(program, "rsqrt") == ({"fp32"} if norm == "group" else set())


def output_dtypes(program, operator):
    return {check._dtype(op.outputs[0]) for op in program.operations if op.op_type == operator}


def test_norms_with_large_inputs_are_computed_in_float32(tmp_path, caplog):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    with torch.no_grad():
        model.net.wav2vec2.feature_extractor.conv_layers[1].conv.weight.mul_(1e4)
    with caplog.at_level("INFO", "mowa"):
        out = export(replace(model, scheme=HALF), "coreml", tmp_path / "out", lengths_s=(1.0,))
    assert out.details["float32_norms"] == ["wav2vec2.feature_extractor.conv_layers.1.layer_norm"]
    program = open_program(out.folder)
    found = [check._dtype(op.outputs[0]) for op in program.operations if op.op_type == "layer_norm"]
    assert found.count("fp32") == 1
    assert f"{out.agreement * 100:.1f} % of the sample's frames" in caplog.text
    samples = audio.normalize(clip(0, 9_000))
    np.testing.assert_allclose(run(out.folder, program, samples, 16_000), net_logits(model.net, samples), atol=0.1)


SCHEMES = {
    "int8-dynamic": ("constexpr_affine_dequantize", "iOS 16"),
    "int8-static": ("constexpr_affine_dequantize", "iOS 17"),
    "int8-weight": ("constexpr_affine_dequantize", "iOS 16"),
    "int4-weight": ("constexpr_blockwise_shift_scale", "iOS 18"),
    "int4-weight+asym": ("constexpr_blockwise_shift_scale", "iOS 18"),
    "mixed": ("constexpr_blockwise_shift_scale", "iOS 18"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_stored_quantized(tmp_path, scheme):
    operator, minimum_os = SCHEMES[scheme]
    model = tiny_quantized(tmp_path / "base", scheme, conv_dim=(32,) * 3)
    out = export(model, "coreml", tmp_path / "out", lengths_s=LENGTHS_S)
    program = open_program(out.folder)
    found = {op.name: op for op in program.operations if op.op_type.startswith("constexpr")}
    expected = {f"net_{name}_".replace(".", "_"): linear for name, linear in quantized_linears(model.net).items()}
    if minimum_os != "iOS 18":
        del expected["net_wav2vec2_feature_projection_projection_"]  # it has several scales per row
    assert out.details["minimum_os"].startswith(minimum_os)
    assert out.details["activations"] == ("static" if scheme == "int8-static" else "none")
    assert {op.op_type for op in found.values()} == {operator}
    assert len(found) == len(expected)
    for name, linear in expected.items():
        op = next(op for op_name, op in found.items() if op_name.startswith(name))
        qweight = op.inputs["data" if minimum_os == "iOS 18" else "quantized_data"].val
        assert np.array_equal(qweight.astype(np.int8), linear.qweight.numpy())
        assert np.array_equal(op.inputs["scale"].val.reshape(linear.scale.shape).astype(np.float32), linear.scale)
        assert check._dtype(op.outputs[0]) == "fp16"
        assert [user.op_type for user in op.outputs[0].child_ops] == ["linear"]
        if linear.zero_point is not None:
            assert np.array_equal(op.inputs["offset"].val.astype(np.int8), linear.zero_point.numpy())
    assert output_dtypes(program, "quantize") == ({"uint8"} if scheme == "int8-static" else set())
    net, samples = model.net, audio.normalize(clip(0, 10_000))
    logits = run(out.folder, program, samples, 16_000)
    for linear in quantized_linears(net).values():
        linear.activations = linear.activations if scheme == "int8-static" else "none"
    np.testing.assert_allclose(logits, net_logits(net, samples), atol=0.5 if scheme == "int8-static" else 0.1)


@pytest.mark.slow
def test_quantized_programs_are_smaller(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = mowa.load(str(tiny(tmp_path / "net", **SHORT | sizes)))
    float32 = export(model, "coreml", tmp_path / "out", lengths_s=(0.4,))
    for scheme, ratio in (("int8-weight", 0.32), ("int4-weight", 0.22)):
        model = tiny_quantized(tmp_path / scheme, scheme, **SHORT | sizes)
        quantized = export(model, "coreml", tmp_path / f"{scheme}.out")
        assert quantized.size_bytes < ratio * float32.size_bytes


@pytest.mark.parametrize(
    "changes",
    [{"adapter_attn_dim": 4}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"do_stable_layer_norm": False}],
    ids=str,
)
def test_other_configs_are_exported(tmp_path, changes):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT | changes)))
    assert export(model, "coreml", tmp_path / "out", lengths_s=LENGTHS_S).agreement == 1


@pytest.mark.slow
def test_positions_of_the_bundled_net_are_in_a_table(tmp_path):
    """The table covers the longest input, here more frames than the net's own, whose last row is repeated."""
    model = mowa.load("pl-tiny")
    out = export(model, "coreml", tmp_path / "out", lengths_s=(1.0, 30.0))
    assert out.details["lengths"][-1] // out.details["hop"] > len(
        read_anatomy(exporter.prepare_for_export(model)).absolute_positions.table
    )
    assert json.loads((out.folder / "mowa.json").read_text())["verification"]["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_example_gives_the_transcript_of_mowa(tmp_path, monkeypatch, capsys, norm):
    """All but its prediction, which is interpreted from the same package."""
    ct = pytest.importorskip("coremltools")
    model = mowa.load(str(tiny(tmp_path / "base", norm=norm, **SHORT)))
    file = EXAMPLES / "dzien-dobry.flac"
    length = len(audio.load_audio(file)) / 16_000
    out = export(model, "coreml", tmp_path / "out", lengths_s=(1.0, length if norm == "group" else length + 1)).folder

    class FakeMLModel:
        def __init__(self, package):
            self.program = open_program(Path(package).parent)

        def predict(self, inputs):
            assert {name: value.dtype.name for name, value in inputs.items()}.items() <= {
                "input_values": "float32", "samples": "int32",
            }.items()  # fmt: skip
            tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
            return {name: value.numpy() for name, value in check.run_program(self.program, tensors).items()}

    monkeypatch.setattr(ct.models, "MLModel", FakeMLModel)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["run_coreml.py", str(out), str(file)])
    runpy.run_path(str(EXAMPLES / "run_coreml.py"))
    text = capsys.readouterr().out.strip()
    monkeypatch.undo()
    assert text == mowa.transcribe(file, model.origin.source, device="cpu", dtype="float32").text
    assert len(text) > 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is available")
def test_the_example_requires_macos():
    completed = subprocess.run([sys.executable, EXAMPLES / "run_coreml.py", "a", "b"], capture_output=True, text=True)
    assert "Core ML needs macOS" in completed.stderr


def test_a_missing_mask_is_warned_of(tmp_path, caplog):
    model = mowa.load(str(tiny(tmp_path / "base", norm="group", **SHORT)))
    export(model, "coreml", tmp_path / "out", lengths_s=LENGTHS_S)
    assert "no attention mask: padding changes the last tokens" in caplog.text
    assert "not exactly 0.4, 1 s long" in caplog.text


def test_the_model_does_not_change(tmp_path):
    model = tiny_quantized(tmp_path / "base", "int8-dynamic", "wavlm", num_hidden_layers=1)
    samples, names = clip(0, 5_000), [name for name, _ in model.net.named_modules()]
    before, state = net_logits(model.net, samples), torch.get_rng_state()
    export(model, "coreml", tmp_path / "out", lengths_s=(0.4,))
    assert np.array_equal(net_logits(model.net, samples), before)
    assert [name for name, _ in model.net.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("bf16", "bfloat16"), "Core ML has no bfloat16; use fp16"),
        (Scheme("nf4", "nf4", group_size=64), "no scale per group; use int4-weight"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_unsupported_schemes_are_rejected(tmp_path, scheme, message):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    assert not exporter.unsupported_reason(model)
    with pytest.raises(ModelError, match=rf"\({scheme.name}\) cannot be exported to coreml: .*{message}"):
        export(replace(model, scheme=scheme), "coreml", tmp_path / "out")


def test_unsupported_nets_are_rejected(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    assert "Linear is not supported, only Data2VecAudioForCTC, HubertForCTC" in exporter.unsupported_reason(
        replace(model, net=nn.Linear(1, 1))
    )
    model.net.config.add_adapter = True
    assert exporter.unsupported_reason(model) == "convolutional adapters (add_adapter) are not supported; use onnx"


@pytest.mark.parametrize("lengths_s", [(), (0.01, 5), (-1,)])
def test_lengths_shorter_than_a_frame_are_rejected(tmp_path, lengths_s):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    with pytest.raises(ModelError, match=r"at least 0\.0203125 s, such as 5, 10 and 20"):
        export(model, "coreml", tmp_path / "out", lengths_s=lengths_s)
    assert not (tmp_path / "out").exists()


class Digamma(nn.Module):
    def forward(self, x):
        return torch.digamma(x)


def test_an_unsupported_operator_is_named(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    model.net.wav2vec2.encoder.layers[0].feed_forward.intermediate_act_fn = Digamma()
    with pytest.raises(ModelError, match=r"Core ML does not support digamma, which .*base needs: use onnx"):
        export(model, "coreml", tmp_path / "out", lengths_s=(0.4,))
    assert not (tmp_path / "out").exists()


def test_without_an_operator_in_the_interpreter_nothing_is_compared(tmp_path, monkeypatch):
    monkeypatch.delitem(check.OPERATORS, "gelu")
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    out = export(model, "coreml", tmp_path / "out", lengths_s=(0.4,))
    assert out.agreement is None
    assert out.unverified_reason.endswith("mowa's interpreter does not support gelu")


def change_head(monkeypatch, change):
    """Change the head's weight of the net that is converted."""
    prepare = coreml_net.prepare_for_coreml

    def prepare_changed(net, *rest, **options):
        graph = prepare(net, *rest, **options)
        graph.net.lm_head.weight = nn.Parameter(change(graph.net.lm_head.weight), requires_grad=False)
        return graph

    monkeypatch.setattr(coreml_net, "prepare_for_coreml", prepare_changed)


def test_exports_that_differ_are_rejected(tmp_path, monkeypatch):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    change_head(monkeypatch, lambda weight: weight * 1.01)
    with pytest.raises(ModelError, match=r"the Core ML export of .*base differs from the model by"):
        export(model, "coreml", tmp_path / "out", lengths_s=LENGTHS_S)
    monkeypatch.undo()
    change_head(monkeypatch, lambda weight: weight.roll(1, 0))  # each token becomes its successor
    with pytest.raises(ModelError, match=r"fp16 is too lossy for .*base in Core ML: the top token changes in \d+ %"):
        export(replace(model, scheme=HALF), "coreml", tmp_path / "out", lengths_s=LENGTHS_S)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_an_error_with_the_pip_extra(tmp_path, monkeypatch):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT)))
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingDependency, match=r"needs coremltools: pip install 'mowa\[coreml\]'"):
        export(model, "coreml", tmp_path / "out")
