"""Core ML programs against stock transformers: read from disk and computed operator by operator, as Linux runs none."""

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
from mowa.exporters import manifest, verify
from mowa.exporters.coreml import check, exporter
from mowa.exporters.coreml import net as coreml_net
from mowa.exporters.protocol import export
from mowa.models.ctc_encoder.positions import absolute_position_table
from mowa.types import Scheme
from tests.checkpoints import KINDS, clip, tiny
from tests.quantized import narrows, shrunk

pytest.importorskip("coremltools")

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}
SECONDS = (0.4, 1.0)
HALF = Scheme("fp16", "float16")
FAMILIES = ("wav2vec2", "hubert", "wavlm")


def opened(folder):
    with exporter._hushed():
        return check.open_program(folder / "model.mlpackage")


def run(folder, program, sound, length):
    """Logits of a normalised recording that is padded to `length`, as the folder says."""
    how = json.loads((folder / "mowa.json").read_text())["details"]
    given = {"input_values": torch.from_numpy(np.pad(sound, (0, length - len(sound))))[None]}
    if how["masked"]:
        given["samples"] = torch.tensor([len(sound)])
    logits = check.run_program(program, given)["logits"][0]
    assert logits.dtype == torch.float32
    return logits[: (len(sound) - how["reach"]) // how["hop"] + 1].numpy()


def said(net, sound):
    with torch.inference_mode():
        return net(torch.from_numpy(sound).to(net.dtype)[None]).logits[0].numpy()


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("-".join(request.param))
    model = mowa.load(str(tiny(root / "base", *request.param)))
    return model, export(model, "coreml", root / "out", seconds=SECONDS)


def test_every_length_gives_what_transformers_gives(made):
    model, out = made
    net, program = mowa.load(model.origin.source).net.double().eval(), opened(out.folder)
    assert out.details["lengths"] == [6_400, 16_000]
    assert out.details["masked"] == (net.config.feat_extract_norm == "layer")
    for length in out.details["lengths"]:
        for heard in (length, length - 1, length // 2 + 63, 400) if out.details["masked"] else (length,):
            sound = audio.normalize(clip(heard, heard))
            np.testing.assert_allclose(run(out.folder, program, sound, length), said(net, sound), atol=1e-4)


def test_the_folder_says_what_it_is(made):
    model, out = made
    ct = pytest.importorskip("coremltools")
    note = json.loads((out.folder / "mowa.json").read_text())
    inside = "model.mlpackage/Data/com.apple.CoreML"
    files = {"model.mlpackage/Manifest.json", f"{inside}/model.mlmodel", f"{inside}/weights/weight.bin"}
    assert set(note["files"]) == files
    assert note["compared"]["farthest"] < 1e-4
    assert note["compared"]["agreeing"] == 1
    assert "Core ML itself was not run" in manifest.read_artifact(out.folder).unverified_reason
    assert (out.details["computes"], out.details["needs"]) == ("float32", "iOS 16 or macOS 13")
    spec = ct.utils.load_spec(str(out.folder / "model.mlpackage"))
    sound, *samples = spec.description.input
    assert [list(one.shape) for one in sound.type.multiArrayType.enumeratedShapes.shapes] == [[1, 6_400], [1, 16_000]]
    assert [one.name for one in samples] == (["samples"] if out.details["masked"] else [])
    words = spec.description.metadata.userDefined
    assert tuple(json.loads(words["vocabulary"])) == model.vocabulary.tokens
    assert (words["hop"], words["reach"]) == ("320", "400")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_half_precision_is_near_and_norms_over_time_are_wide(tmp_path, family, norm):
    model = mowa.load(str(tiny(tmp_path / "base", family, norm, **QUICK)))
    out = export(replace(model, scheme=HALF), "coreml", tmp_path / "out", seconds=SECONDS)
    program, sound = opened(out.folder), audio.normalize(clip(0, 16_000))
    np.testing.assert_allclose(run(out.folder, program, sound, 16_000), said(model.net, sound), atol=0.1)
    assert kinds(program, "layer_norm") == kinds(program, "linear") == {"fp16"}
    assert kinds(program, "rsqrt") == ({"fp32"} if norm == "group" else set())


def kinds(program, operator):
    return {check._kind(op.outputs[0]) for op in program.operations if op.op_type == operator}


def test_loud_norms_are_wide(tmp_path, caplog):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    with torch.no_grad():
        model.net.wav2vec2.feature_extractor.conv_layers[1].conv.weight.mul_(1e4)
    with caplog.at_level("INFO", "mowa"):
        out = export(replace(model, scheme=HALF), "coreml", tmp_path / "out", seconds=(1.0,))
    assert out.details["in_float32"] == ["wav2vec2.feature_extractor.conv_layers.1.layer_norm"]
    program = opened(out.folder)
    found = [check._kind(op.outputs[0]) for op in program.operations if op.op_type == "layer_norm"]
    assert found.count("fp32") == 1
    assert f"{out.agreement * 100:.1f} % of frames" in caplog.text
    sound = audio.normalize(clip(0, 9_000))
    np.testing.assert_allclose(run(out.folder, program, sound, 16_000), said(model.net, sound), atol=0.1)


SCHEMES = {
    "int8-dynamic": ("constexpr_affine_dequantize", "iOS 16"),
    "int8-static": ("constexpr_affine_dequantize", "iOS 17"),
    "int8-weight": ("constexpr_affine_dequantize", "iOS 16"),
    "int4-weight": ("constexpr_blockwise_shift_scale", "iOS 18"),
    "int4-weight+asym": ("constexpr_blockwise_shift_scale", "iOS 18"),
    "mixed": ("constexpr_blockwise_shift_scale", "iOS 18"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_kept_in_their_own_codes(tmp_path, scheme):
    operator, system = SCHEMES[scheme]
    model = shrunk(tmp_path / "base", scheme, conv_dim=(32,) * 3)
    out = export(model, "coreml", tmp_path / "out", seconds=SECONDS)
    program = opened(out.folder)
    found = {op.name: op for op in program.operations if op.op_type.startswith("constexpr")}
    expected = {f"net_{name}_".replace(".", "_"): linear for name, linear in narrows(model.net).items()}
    if system != "iOS 18":
        del expected["net_wav2vec2_feature_projection_projection_"]  # its rows are in groups
    assert out.details["needs"].startswith(system)
    assert out.details["activations"] == ("static" if scheme == "int8-static" else "none")
    assert {op.op_type for op in found.values()} == {operator}
    assert len(found) == len(expected)
    for name, linear in expected.items():
        op = next(op for at, op in found.items() if at.startswith(name))
        codes = op.inputs["data" if system == "iOS 18" else "quantized_data"].val
        assert np.array_equal(codes.astype(np.int8), linear.qweight.numpy())
        assert np.array_equal(op.inputs["scale"].val.reshape(linear.scale.shape).astype(np.float32), linear.scale)
        assert check._kind(op.outputs[0]) == "fp16"
        assert [user.op_type for user in op.outputs[0].child_ops] == ["linear"]
        if linear.zero_point is not None:
            assert np.array_equal(op.inputs["offset"].val.astype(np.int8), linear.zero_point.numpy())
    assert kinds(program, "quantize") == ({"uint8"} if scheme == "int8-static" else set())
    net, sound = model.net, audio.normalize(clip(0, 10_000))
    logits = run(out.folder, program, sound, 16_000)
    for linear in narrows(net).values():
        linear.activations = linear.activations if scheme == "int8-static" else "none"
    np.testing.assert_allclose(logits, said(net, sound), atol=0.5 if scheme == "int8-static" else 0.1)


def test_narrow_programs_are_smaller(tmp_path):
    big = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 2}
    whole = export(mowa.load(str(tiny(tmp_path / "net", **QUICK | big))), "coreml", tmp_path / "out", seconds=(0.4,))
    for scheme, share in (("int8-weight", 0.32), ("int4-weight", 0.22)):
        small = export(shrunk(tmp_path / scheme, scheme, **QUICK | big), "coreml", tmp_path / f"{scheme}.out")
        assert small.size_bytes < share * whole.size_bytes


@pytest.mark.parametrize(
    "changes",
    [{"adapter_attn_dim": 4}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"do_stable_layer_norm": False}],
    ids=str,
)
def test_other_parts_are_computed_too(tmp_path, changes):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK | changes)))
    assert export(model, "coreml", tmp_path / "out", seconds=SECONDS).agreement == 1


@pytest.mark.slow
def test_positions_of_the_bundled_net_are_looked_up(tmp_path):
    """The tables are as long as the longest recording: here longer than the net's own, whose last row then stays."""
    model = mowa.load("pl-tiny")
    out = export(model, "coreml", tmp_path / "out", seconds=(1.0, 30.0))
    assert out.details["lengths"][-1] // out.details["hop"] > len(
        absolute_position_table(exporter.prepare_for_export(model))
    )
    assert json.loads((out.folder / "mowa.json").read_text())["compared"]["farthest"] < 2e-4


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_example_reads_what_mowa_reads(tmp_path, monkeypatch, capsys, norm):
    """Its own lines, but for the prediction: that is computed from the same package."""
    ct = pytest.importorskip("coremltools")
    model = mowa.load(str(tiny(tmp_path / "base", norm=norm, **QUICK)))
    file = EXAMPLES / "dzien-dobry.flac"
    length = len(audio.load_audio(file)) / 16_000
    out = export(model, "coreml", tmp_path / "out", seconds=(1.0, length if norm == "group" else length + 1)).folder

    class Predicting:
        def __init__(self, package):
            self.program = opened(Path(package).parent)

        def predict(self, given):
            assert {name: value.dtype.name for name, value in given.items()}.items() <= {
                "input_values": "float32", "samples": "int32",
            }.items()  # fmt: skip
            tensors = {name: torch.from_numpy(value) for name, value in given.items()}
            return {name: value.numpy() for name, value in check.run_program(self.program, tensors).items()}

    monkeypatch.setattr(ct.models, "MLModel", Predicting)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["run_coreml.py", str(out), str(file)])
    runpy.run_path(str(EXAMPLES / "run_coreml.py"))
    text = capsys.readouterr().out.strip()
    monkeypatch.undo()
    assert text == mowa.transcribe(file, model.origin.source, device="cpu", dtype="float32").text
    assert len(text) > 20


@pytest.mark.skipif(sys.platform == "darwin", reason="runs there")
def test_the_example_says_where_it_runs():
    made = subprocess.run([sys.executable, EXAMPLES / "run_coreml.py", "a", "b"], capture_output=True, text=True)
    assert "Core ML runs programs on Apple's systems alone" in made.stderr


def test_padding_that_is_heard_is_warned_of(tmp_path, caplog):
    export(mowa.load(str(tiny(tmp_path / "base", norm="group", **QUICK))), "coreml", tmp_path / "out", seconds=SECONDS)
    assert "hears padding: recordings that are not of 0.4, 1 s may get other letters" in caplog.text


def test_the_model_is_left_as_it_was(tmp_path):
    model = shrunk(tmp_path / "base", "int8-dynamic", "wavlm", num_hidden_layers=1)
    sound, names = clip(0, 5_000), [name for name, _ in model.net.named_modules()]
    before, state = said(model.net, sound), torch.get_rng_state()
    export(model, "coreml", tmp_path / "out", seconds=(0.4,))
    assert np.array_equal(said(model.net, sound), before)
    assert [name for name, _ in model.net.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (Scheme("bf16", "bfloat16"), "Core ML has no bfloat16; use fp16"),
        (Scheme("nf4", "nf4", group_size=64), "no step for each block of a row; use int4-weight"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_schemes_are_refused(tmp_path, scheme, why):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    assert not exporter.unsupported_reason(model)
    with pytest.raises(ModelError, match=f"in {scheme.name} cannot be written as coreml: .*{why}"):
        export(replace(model, scheme=scheme), "coreml", tmp_path / "out")


def test_other_nets_are_refused(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    assert "only Wav2Vec2ForCTC, HubertForCTC, WavLMForCTC are written so, not Linear" in exporter.unsupported_reason(
        replace(model, net=nn.Linear(1, 1))
    )
    model.net.config.add_adapter = True
    assert exporter.unsupported_reason(model) == "its net has convolutions over its last frames; use onnx"


@pytest.mark.parametrize("seconds", [(), (0.01, 5), (-1,)])
def test_lengths_without_a_frame_are_refused(tmp_path, seconds):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    with pytest.raises(ModelError, match=r"0\.0203125 s or more, such as 5, 10 and 20"):
        export(model, "coreml", tmp_path / "out", seconds=seconds)
    assert not (tmp_path / "out").exists()


class Odd(nn.Module):
    def forward(self, x):
        return torch.digamma(x)


def test_an_operator_without_an_equal_is_named(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    model.net.wav2vec2.encoder.layers[0].feed_forward.intermediate_act_fn = Odd()
    with pytest.raises(ModelError, match=r"Core ML has no equal of digamma, which .*base needs: use onnx"):
        export(model, "coreml", tmp_path / "out", seconds=(0.4,))
    assert not (tmp_path / "out").exists()


def test_an_operator_that_is_not_known_here_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(check.OPERATORS, "gelu")
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    out = export(model, "coreml", tmp_path / "out", seconds=(0.4,))
    assert out.agreement is None
    assert out.unverified_reason.endswith("nothing was compared: gelu is not known here")


def test_what_is_not_the_net_leaves_nothing(tmp_path, monkeypatch):
    model, fitted = mowa.load(str(tiny(tmp_path / "base", **QUICK))), coreml_net.prepare_for_coreml

    def broken(net, *rest, **how):
        made = fitted(net, *rest, **how)
        made.net.lm_head.weight = nn.Parameter(made.net.lm_head.weight * 1.01, requires_grad=False)
        return made

    monkeypatch.setattr(coreml_net, "prepare_for_coreml", broken)
    with pytest.raises(ModelError, match=r"the Core ML of .*base is not what the net is"):
        export(model, "coreml", tmp_path / "out", seconds=SECONDS)
    monkeypatch.setattr(verify, "MIN_AGREEMENT", 1.1)
    with pytest.raises(ModelError, match="does not bear fp16 as Core ML: "):
        export(replace(model, scheme=HALF), "coreml", tmp_path / "out", seconds=SECONDS)
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingDependency, match=r"needs coremltools: pip install 'mowa\[coreml\]'"):
        export(model, "coreml", tmp_path / "out")
