"""Narrow checkpoints read by stock transformers and the packages for them: the very weights, and what they say."""

import contextlib
import io
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoTokenizer, Wav2Vec2FeatureExtractor

import mowa
from mowa.adapters import checkpoint, merge
from mowa.errors import DataError, ModelError
from mowa.exporters import manifest, protocol, safetensors, verify
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.weights import quantize
from mowa.quantization import formats
from mowa.types import Scheme
from tests.adapters.made import OTHER, saved
from tests.checkpoints import clip, tiny
from tests.quantized import QUICK, SCHEMES, narrows, shrunk

pytest.importorskip("compressed_tensors")
pytest.importorskip("bitsandbytes")
NARROW = list(SCHEMES)


def stock(folder, **how):
    """As a user loads it; what three packages say meanwhile is not ours."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        net, report = AutoModelForCTC.from_pretrained(folder, output_loading_info=True, **how)
        assert not any(report.values()), report
        weights = {name: weight_of(module) for name, module in net.eval().named_modules()}
        with torch.inference_mode():
            net(torch.zeros(1, 9_000))
    return net, weights


def weight_of(module):
    import bitsandbytes

    if not isinstance(module, bitsandbytes.nn.Linear4bit):
        return None
    return bitsandbytes.functional.dequantize_4bit(module.weight.data.clone(), module.weight.quant_state)


def logprobs(net, seed=0, samples=9_000):
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # WavLM's mask
        return net(torch.from_numpy(clip(seed, samples))[None]).logits[0].float().log_softmax(-1)


@pytest.fixture(scope="module", params=[(scheme, "wav2vec2") for scheme in NARROW] + [
    ("int8-dynamic", "hubert"), ("int4-weight", "wavlm"), ("nf4", "hubert")], ids="-".join)  # fmt: skip
def made(request, tmp_path_factory):
    scheme, family = request.param
    root = tmp_path_factory.mktemp("bits" if scheme == "nf4" else "out")
    model = shrunk(root / "base", scheme, family, "group" if family == "hubert" else "layer")
    return model, protocol.export(model, "safetensors", root / "out")


def test_transformers_loads_the_very_weights(made):
    model, artifact = made
    net, from_bits = stock(artifact.folder)
    assert {p.dtype for p in net.parameters() if p.is_floating_point()} == {torch.float32}
    written = load_file(artifact.folder / "model.safetensors")
    for name, linear in narrows(model.net).items():
        if f"{name}.weight_scale" in written:
            assert torch.equal(net.get_submodule(name).weight, linear.weight), name
        elif from_bits.get(name) is not None:
            assert torch.equal(from_bits[name], linear.weight), name
        else:
            assert not name.startswith(f"{net.base_model_prefix}.encoder"), name
            torch.testing.assert_close(net.get_submodule(name).weight, linear.weight, rtol=2**-11, atol=0)


def test_transformers_says_what_the_shrunk_net_says(made):
    model, artifact = made
    net, _ = stock(artifact.folder)
    ours, theirs = logprobs(model.net), logprobs(net)
    if model.scheme.name == "nf4":  # bitsandbytes multiplies in bfloat16 where the processor has it
        assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.9
    elif model.scheme.activations == "none":
        assert (ours - theirs).abs().max() <= 5e-3  # the convolutions' and, beside zeros, the projection's float16
    else:  # an input on the edge between two integers may fall to either side
        assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.9


def test_the_folder_says_what_it_is(made):
    model, artifact = made
    note = json.loads((artifact.folder / "mowa.json").read_text())
    package = "bitsandbytes" if model.scheme.name == "nf4" else "compressed-tensors"
    assert (artifact.kind, artifact.scheme, artifact.files) == ("safetensors", model.scheme, ("model.safetensors",))
    assert artifact.details["package"] == package
    assert artifact.details["transformers"]["agreeing"] >= verify.MIN_AGREEMENT
    assert artifact.agreeing >= verify.MIN_AGREEMENT
    assert note["made_by"][package]
    config = json.loads((artifact.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == package
    assert config["dtype"] == "float32"
    assert config["architectures"] == [type(model.net).__name__]
    assert AutoTokenizer.from_pretrained(artifact.folder).get_vocab()["a"] == model.vocabulary.tokens.index("a")
    assert Wav2Vec2FeatureExtractor.from_pretrained(artifact.folder).do_normalize == model.preprocessing.normalize
    assert artifact.folder.joinpath("model.safetensors").stat().st_mode == (
        artifact.folder.joinpath("config.json").stat().st_mode
    )


def test_what_is_narrow_takes_as_many_bytes_as_it_says(tmp_path):
    """Of matrices of 128 × 256 in the blocks: int8 with a scale a row, int4 with one for 32, in float16."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    for scheme, bits in {"int8-weight": 8 + 16 / 256, "int4-weight": 4 + 16 / 32}.items():
        model = shrunk(tmp_path / f"{scheme}-base", scheme, **wide)
        protocol.export(model, "safetensors", tmp_path / scheme)
        kept = load_file(tmp_path / scheme / "model.safetensors")
        name = next(name for name in narrows(model.net) if name.endswith("output_dense"))
        bytes_ = sum(kept[f"{name}.{key}"].nbytes for key in ("weight", "weight_packed", "weight_scale")
                     if f"{name}.{key}" in kept)  # fmt: skip
        assert bytes_ == 128 * 256 * bits / 8


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float32", None)])
def test_halves_are_plain_checkpoints(tmp_path, name, dtype):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    for parameter in model.net.parameters():
        parameter.data = parameter.data.to(dtype or torch.float32).float()
    scheme = Scheme(name, str(dtype or torch.float32).removeprefix("torch."))
    artifact = protocol.export(replace(model, scheme=scheme), "safetensors", tmp_path / "out")
    kept = load_file(artifact.folder / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {dtype or torch.float32}
    assert "quantization_config" not in json.loads((artifact.folder / "config.json").read_text())
    net = AutoModelForCTC.from_pretrained(artifact.folder, dtype=torch.float32).eval()
    assert torch.equal(logprobs(net), logprobs(model.net))
    assert AutoModelForCTC.from_pretrained(artifact.folder).dtype == (dtype or torch.float32)
    assert artifact.details["transformers"] == {"farthest": 0, "agreeing": 1}


def test_an_adapter_is_part_of_it(tmp_path):
    base = tiny(tmp_path / "base", **QUICK)
    saved(base, "lora", tmp_path / "adapter", words=OTHER)
    adapted = checkpoint.load_adapter(mowa.load(str(base)), tmp_path / "adapter")
    artifact = protocol.export(adapted, "safetensors", tmp_path / "out")
    assert artifact.vocabulary == OTHER
    net = AutoModelForCTC.from_pretrained(artifact.folder).eval()
    torch.testing.assert_close(logprobs(net), logprobs(merge.merge_adapter(adapted).net))


def test_the_model_is_left_as_it_was(tmp_path):
    model = shrunk(tmp_path / "base", "int8-dynamic")
    before, config = logprobs(model.net), model.net.config.to_dict()
    state = {name: value.clone() for name, value in model.net.state_dict().items()}
    protocol.export(model, "safetensors", tmp_path / "out")
    assert torch.equal(logprobs(model.net), before)
    assert model.net.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.net.state_dict().items())


def test_a_net_in_half_precision_is_compared_and_left_alone(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)), dtype="bfloat16")
    artifact = protocol.export(replace(model, scheme=Scheme("bf16", "bfloat16")), "safetensors", tmp_path / "out")
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    assert artifact.agreement == 1


def test_what_is_not_the_net_leaves_nothing(tmp_path, monkeypatch):
    model = shrunk(tmp_path / "base", "int8-weight")
    write = formats.pack_linear

    def broken(name, linear):
        made = write(name, linear)
        made[f"{name}.weight_scale"] = made[f"{name}.weight_scale"] * 1.01
        return made

    monkeypatch.setattr(formats, "pack_linear", broken)
    with pytest.raises(ModelError, match="does not hold what was written"):
        protocol.export(model, "safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_net_that_transformers_takes_for_another_is_refused(tmp_path, monkeypatch):
    model = shrunk(tmp_path / "base", "int8-weight")
    other = shrunk(tmp_path / "other", "int4-weight", num_hidden_layers=1)
    monkeypatch.setattr(safetensors, "_stock", lambda folder: other.net)
    with pytest.raises(ModelError, match=r"is not what the net is: .* nats away, 0\.001 allowed"):
        protocol.export(model, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_cannot_load_is_said(tmp_path, monkeypatch):
    model = shrunk(tmp_path / "base", "int8-weight")
    how = formats.quantization_config

    def odd(linears, others):
        made = how(linears, others)
        made["config_groups"]["group_0"]["weights"]["strategy"] = "knight"
        return made

    monkeypatch.setattr(formats, "quantization_config", odd)
    monkeypatch.setattr(safetensors, "_read", lambda *_: model.net)
    with pytest.raises(ModelError, match="transformers does not load what was written"):
        protocol.export(model, "safetensors", tmp_path / "out")


def test_without_the_package_it_is_not_claimed(tmp_path, monkeypatch, caplog):
    model = shrunk(tmp_path / "base", "int8-weight")
    monkeypatch.setattr(safetensors, "find_spec", lambda name: None)
    monkeypatch.setattr(safetensors, "_stock", lambda folder: pytest.fail("asked all the same"))
    with caplog.at_level("INFO", "mowa"):
        artifact = protocol.export(model, "safetensors", tmp_path / "out")
    assert artifact.details["transformers"] == "not tried: compressed-tensors is not installed"
    assert "compressed-tensors is not installed" in caplog.text
    assert artifact.agreement >= verify.MIN_AGREEMENT


def test_zeros_beside_rounded_inputs_are_refused(tmp_path):
    model = shrunk(tmp_path / "base", "mixed")
    linear = model.net.base_model.encoder.layers[0].feed_forward.intermediate_dense
    zeros = QuantizedLinear(quantize(linear.weight, 4, 32, symmetric=False), linear.bias)
    model.net.base_model.encoder.layers[0].feed_forward.intermediate_dense = zeros
    with pytest.raises(ModelError, match=r"cannot be written as safetensors: .* symmetric, or use onnx"):
        protocol.export(model, "safetensors", tmp_path / "out")


def test_rows_that_groups_do_not_fill_are_wide_in_the_file(tmp_path):
    model = shrunk(tmp_path / "base", "int8-dynamic", conv_dim=(48,) * 3)
    where = model.net.base_model.feature_projection
    where.projection = QuantizedLinear(quantize(where.projection.weight, 8, 32), where.projection.bias)
    artifact = protocol.export(model, "safetensors", tmp_path / "out")
    kept = load_file(artifact.folder / "model.safetensors")
    assert kept["wav2vec2.feature_projection.projection.weight"].dtype is torch.float16
    layer = model.net.base_model.encoder.layers[0].feed_forward
    dense = layer.intermediate_dense
    layer.intermediate_dense = QuantizedLinear(quantize(dense.weight, 8, 48), dense.bias, "dynamic")
    with pytest.raises(ModelError, match=r"does not round the inputs of wav2vec2\.encoder\.layers\.0\.feed_forward"):
        protocol.export(model, "safetensors", tmp_path / "other")


def test_options_and_folders_that_are_there_are_refused(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **QUICK)))
    with pytest.raises(ModelError, match="has no option 'opset'"):
        protocol.export(model, "safetensors", tmp_path / "out", opset=20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="is there already"):
        protocol.export(model, "safetensors", tmp_path / "out")


def test_a_damaged_export_is_refused(tmp_path):
    artifact = protocol.export(shrunk(tmp_path / "base", "int8-weight"), "safetensors", tmp_path / "out")
    file = artifact.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="missing or damaged"):
        manifest.read_artifact(artifact.folder)
    with pytest.raises(ModelError, match="missing or damaged"):
        mowa.load(str(artifact.folder))
