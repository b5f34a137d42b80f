"""CTranslate2 exports give the logits of the net, or are rejected; the engine and the example give the same text."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mowa
from mowa.data import audio
from mowa.engines import protocol
from mowa.engines.protocol import BatchPolicy
from mowa.errors import MissingDependency, ModelError
from mowa.exporters.protocol import export
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.weights import quantize
from mowa.models.tolerances import MIN_AGREEMENT
from mowa.types import Scheme
from tests.checkpoints import clip, tiny

pytest.importorskip("ctranslate2")
from mowa.engines import ctranslate2 as engines
from mowa.exporters import ctranslate2

EXAMPLES = Path(__file__).parents[2] / "examples"
SUPPORTED = {
    "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
}  # fmt: skip
LENGTHS = [400, 401, 4_097, 20_000]
INT8 = Scheme("int8-dynamic", "int8", "dynamic")
HALF_SCHEMES = [Scheme("fp16", "float16"), Scheme("bf16", "bfloat16")]


def supported(folder, family="wav2vec2", **changes):
    """A small net of the one architecture that CTranslate2 supports."""
    return tiny(folder, family, **SUPPORTED | changes)


def int8_model(model):
    """Quantize the linear layers of the blocks with int8-dynamic."""
    net = model.net
    for name, module in list(net.named_modules()):
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            net.set_submodule(name, QuantizedLinear(quantize(module.weight.detach(), 8), module.bias, "dynamic"))
    return replace(model, scheme=INT8)


def half_model(model, scheme):
    """Round all weights to half precision."""
    with torch.no_grad():
        for weight in model.net.parameters():
            weight.copy_(weight.to(getattr(torch, scheme.weights)))
    return replace(model, scheme=scheme)


@pytest.fixture(scope="module", params=["wav2vec2", "hubert", "unispeech-sat"])
def exported(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = supported(root / "base", request.param)
    return base, export(mowa.load(str(base)), "ctranslate2", root / "out").folder


def test_any_length_gives_what_transformers_gives(exported):
    base, out = exported
    net, engine = mowa.load(str(base)).net.double().eval(), engines.open_engine(out)
    assert (engine.name, engine.device, engine.dtype, engine.scheme) == ("ctranslate2", "cpu", "float32", "float32")
    for index, length in enumerate(LENGTHS):
        clips = [audio.normalize(clip(index + row, length)) for row in range(2)]
        with torch.inference_mode():
            expected = net(torch.from_numpy(np.stack(clips)).double()).logits.log_softmax(-1).numpy()
        np.testing.assert_allclose(np.stack(engine.emissions(clips)), expected, atol=1e-4)


def test_the_manifest_describes_the_export(exported):
    base, out = exported
    loaded, engine = mowa.load(str(base)), engines.open_engine(out)
    assert (engine.vocabulary, engine.preprocessing) == (loaded.vocabulary, loaded.preprocessing)
    assert engine.config.conv_stride == loaded.net.config.conv_stride
    manifest = json.loads((out / "mowa.json").read_text())
    assert manifest["verification"]["max_abs_diff"] < 1e-4
    assert manifest["details"] == {
        "model": "ctranslate2", "quantization": "float32", "compute_type": "float32", "attention_mask": False,
    }  # fmt: skip
    assert set(manifest["files"]) == {f"ctranslate2/{name}" for name in ("model.bin", "config.json", "vocabulary.json")}
    assert json.loads((out / "config.json").read_text())["model_type"] == loaded.family.name


def test_the_transcript_is_that_of_the_pytorch_engine(exported):
    base, out = exported
    file = EXAMPLES / "dzien-dobry.flac"
    theirs = mowa.transcribe(file, str(base), device="cpu", dtype="float32").text
    ours = mowa.transcribe(file, out).text
    assert ours == theirs
    assert len(theirs) > 20
    command = [sys.executable, str(EXAMPLES / "run_ctranslate2.py"), str(out), str(file)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == theirs


def test_clips_of_different_lengths_do_not_share_a_batch(exported):
    engine = engines.open_engine(exported[1])
    assert engine.batch_policy is BatchPolicy.EQUAL_LENGTH
    clips = [clip(0, 4_000), clip(1, 4_001), clip(2, 4_000)]
    with pytest.raises(ValueError, match="cannot share a batch"):
        engine.emissions(clips)
    for group in protocol.batch_by_length([len(one) for one in clips], 60_000, engine.batch_policy):
        for index, scores in zip(group, engine.emissions([clips[i] for i in group]), strict=True):
            np.testing.assert_allclose(scores, engine.emissions([clips[index]])[0], atol=1e-4)


def test_int8_is_smaller_and_its_agreement_is_logged(tmp_path, caplog):
    base = supported(tmp_path / "base")
    with caplog.at_level("INFO", "mowa"):
        quantized = export(int8_model(mowa.load(str(base))), "ctranslate2", tmp_path / "int8")
    float32 = export(mowa.load(str(base)), "ctranslate2", tmp_path / "float32")
    assert MIN_AGREEMENT <= quantized.agreement < 1
    assert f"{quantized.agreement * 100:.1f} % of the sample's frames" in caplog.text
    assert quantized.details["compute_type"] == "int8_float32"
    assert quantized.size_bytes < 0.4 * float32.size_bytes
    engine = engines.open_engine(quantized.folder)
    assert (engine.dtype, engine.scheme, engine.batch_policy) == ("int8", "int8-dynamic", BatchPolicy.SINGLE)
    with pytest.raises(ModelError, match="was exported for int8"):
        engines.open_engine(quantized.folder, dtype="float32")
    with pytest.raises(ModelError, match="dtype 'bfloat16' is not supported by the ctranslate2 engine"):
        engines.open_engine(quantized.folder, dtype="bfloat16")


@pytest.mark.parametrize("scheme", HALF_SCHEMES, ids=lambda scheme: scheme.name)
def test_half_precision_is_stored_and_computed_in_float32(tmp_path, scheme):
    model = half_model(mowa.load(str(supported(tmp_path / "base"))), scheme)
    artifact = export(model, "ctranslate2", tmp_path / "out")
    assert artifact.details["quantization"] == scheme.weights
    assert artifact.size_bytes < 0.55 * 4 * sum(weight.numel() for weight in model.net.parameters())
    engine = engines.open_engine(artifact.folder)
    assert (engine.dtype, engine.batch_policy) == ("float32", BatchPolicy.EQUAL_LENGTH)
    with torch.inference_mode():
        expected = model.net(torch.from_numpy(clip(0, 8_000))[None]).logits[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(engine.emissions([clip(0, 8_000)])[0], expected, atol=0.02)


def test_the_model_does_not_change(tmp_path):
    model = int8_model(mowa.load(str(supported(tmp_path / "base"))))
    state = {name: value.clone() for name, value in model.net.state_dict().items()}
    modules = {name: type(module) for name, module in model.net.named_modules()}
    config, rng_state = model.net.config.to_dict(), torch.get_rng_state()
    export(model, "ctranslate2", tmp_path / "out")
    assert model.net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.net.state_dict().items())
    assert {name: type(module) for name, module in model.net.named_modules()} == modules
    assert model.net.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), rng_state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}, r"conv_kernel is \[10, 8, 8\]"),
        ({"num_conv_pos_embeddings": 16}, "num_conv_pos_embeddings is 16, and CTranslate2 supports only 128"),
        ({"num_conv_pos_embedding_groups": 8}, "num_conv_pos_embedding_groups is 8"),
        ({"norm": "group"}, "feat_extract_norm is group"),
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm is False"),
        ({"conv_bias": False}, "conv_bias is False"),
        ({"hidden_act": "relu"}, "hidden_act is relu"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation is relu"),
        ({"layer_norm_eps": 1e-2}, r"layer_norm_eps is 0\.01"),
        ({"adapter_attn_dim": 4}, "adapter_attn_dim is 4"),
        ({"family": "wavlm"}, "does not implement wavlm"),
    ],
)
def test_unsupported_nets_are_rejected(tmp_path, changes, message):
    model = mowa.load(str(supported(tmp_path / "base", **changes)))
    with pytest.raises(ModelError, match=f"cannot be exported to ctranslate2: .*{message}.*; use onnx"):
        export(model, "ctranslate2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_bundled_net_is_not_supported():
    assert "conv_kernel is [400, 1, 3, 3]" in ctranslate2.unsupported_reason(mowa.load("pl-tiny"))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("int8-static", "int8", "static"), "for each input; use int8-dynamic"),
        (Scheme("int8-weight", "int8"), "by int8 inputs only; use int8-dynamic"),
        (Scheme("int4-weight", "int4", group_size=32), "no int4 weights for these models; use int8-dynamic"),
        (Scheme("nf4", "nf4", group_size=64), "no nf4 weights; use int8-dynamic"),
        (Scheme("mixed", "mixed", "dynamic", group_size=32), "quantizes all layers alike; use int8-dynamic"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_unsupported_schemes_are_rejected(tmp_path, scheme, message):
    model = mowa.load(str(supported(tmp_path / "base")))
    assert not ctranslate2.unsupported_reason(model)
    assert message in ctranslate2.unsupported_reason(replace(model, scheme=scheme))


def change_head(monkeypatch, change):
    """Change the head's weight while the net is converted."""
    convert = ctranslate2._convert

    def convert_changed(net, *rest):
        weight = net.lm_head.weight
        net.lm_head.weight = torch.nn.Parameter(change(weight), requires_grad=False)
        convert(net, *rest)
        net.lm_head.weight = weight

    monkeypatch.setattr(ctranslate2, "_convert", convert_changed)


def test_exports_that_differ_are_rejected(tmp_path, monkeypatch):
    model = mowa.load(str(supported(tmp_path / "base")))
    change_head(monkeypatch, lambda weight: weight * 1.01)
    with pytest.raises(ModelError, match=r"the CTranslate2 float32 export of .*base differs from the model by"):
        export(model, "ctranslate2", tmp_path / "out")
    monkeypatch.undo()
    change_head(monkeypatch, lambda weight: weight.roll(1, 0))  # each token becomes its successor
    message = r"int8-dynamic is too lossy for .*base in CTranslate2 int8_float32: the top token changes in \d+ %"
    with pytest.raises(ModelError, match=message):
        export(int8_model(model), "ctranslate2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_net_that_ctranslate2_cannot_run_is_rejected(tmp_path, monkeypatch):
    """The comparison would find a size that is missing from `REQUIRED_CONFIG`."""
    model = mowa.load(str(supported(tmp_path / "base", num_conv_pos_embeddings=15)))
    monkeypatch.setattr(ctranslate2, "REQUIRED_CONFIG", {})
    with pytest.raises(ModelError, match=r"CTranslate2 cannot run .*base: .*; use onnx"):
        export(model, "ctranslate2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_an_error_with_the_pip_extra(tmp_path, monkeypatch):
    model = mowa.load(str(supported(tmp_path / "base")))
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(MissingDependency, match=r"needs ctranslate2: pip install 'mowa\[ctranslate2\]'"):
        export(model, "ctranslate2", tmp_path / "out")


def test_other_folders_are_rejected(tmp_path):
    with pytest.raises(ModelError, match="is not an export"):
        engines.open_engine(supported(tmp_path / "base"))
