"""Quantized checkpoints loaded by transformers and its quantization packages: the same weights and logits."""

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
from mowa.exporters import manifest, protocol, safetensors
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.weights import quantize
from mowa.models.tolerances import MIN_AGREEMENT
from mowa.quantization import formats
from mowa.types import Scheme
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, save_tiny_adapter
from tests.checkpoints import clip, tiny
from tests.quantized import SCHEMES, SHORT_FRONT_END, quantized_linears, tiny_quantized

pytest.importorskip("compressed_tensors")
pytest.importorskip("bitsandbytes")


def load_in_transformers(folder, **options):
    """Load a checkpoint as a user does, without the output of three packages; also return its nf4 weights."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        net, loading_info = AutoModelForCTC.from_pretrained(folder, output_loading_info=True, **options)
        assert not any(loading_info.values()), loading_info
        weights = {name: nf4_weight(module) for name, module in net.eval().named_modules()}
        with torch.inference_mode():
            net(torch.zeros(1, 9_000))
    return net, weights


def nf4_weight(module):
    import bitsandbytes

    if not isinstance(module, bitsandbytes.nn.Linear4bit):
        return None
    return bitsandbytes.functional.dequantize_4bit(module.weight.data.clone(), module.weight.quant_state)


def log_probs(net, seed=0, samples=9_000):
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # WavLM's mask
        return net(torch.from_numpy(clip(seed, samples))[None]).logits[0].float().log_softmax(-1)


@pytest.fixture(scope="module", params=[(scheme, "wav2vec2") for scheme in SCHEMES] + [
    ("int8-dynamic", "hubert"), ("int4-weight", "wavlm"), ("nf4", "hubert")], ids="-".join)  # fmt: skip
def exported(request, tmp_path_factory):
    scheme, family = request.param
    root = tmp_path_factory.mktemp("bits" if scheme == "nf4" else "out")
    model = tiny_quantized(root / "base", scheme, family, "group" if family == "hubert" else "layer")
    return model, protocol.export(model, "safetensors", root / "out")


def test_transformers_loads_the_same_weights(exported):
    model, artifact = exported
    net, nf4_weights = load_in_transformers(artifact.folder)
    assert {p.dtype for p in net.parameters() if p.is_floating_point()} == {torch.float32}
    tensors = load_file(artifact.folder / "model.safetensors")
    for name, linear in quantized_linears(model.net).items():
        if f"{name}.weight_scale" in tensors:
            assert torch.equal(net.get_submodule(name).weight, linear.weight), name
        elif nf4_weights.get(name) is not None:
            assert torch.equal(nf4_weights[name], linear.weight), name
        else:
            assert not name.startswith(f"{net.base_model_prefix}.encoder"), name
            torch.testing.assert_close(net.get_submodule(name).weight, linear.weight, rtol=2**-11, atol=0)


def test_transformers_computes_the_same_logits(exported):
    model, artifact = exported
    net, _ = load_in_transformers(artifact.folder)
    ours, theirs = log_probs(model.net), log_probs(net)
    if model.scheme.name == "nf4":  # bitsandbytes multiplies in bfloat16 on CPUs that support it
        assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.9
    elif model.scheme.activations == "none":
        assert (ours - theirs).abs().max() <= 5e-3  # float16 of convolutions and, with zero points, of the projection
    else:  # inputs are rounded differently
        assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.9


def test_the_manifest_describes_the_export(exported):
    model, artifact = exported
    manifest_data = json.loads((artifact.folder / "mowa.json").read_text())
    package = "bitsandbytes" if model.scheme.name == "nf4" else "compressed-tensors"
    assert (artifact.format, artifact.scheme, artifact.files) == ("safetensors", model.scheme, ("model.safetensors",))
    assert artifact.details["quant_method"] == package
    assert artifact.details["transformers"]["agreement"] >= MIN_AGREEMENT
    assert artifact.agreement >= MIN_AGREEMENT
    assert manifest_data["package_versions"][package]
    config = json.loads((artifact.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == package
    assert config["dtype"] == "float32"
    assert config["architectures"] == [type(model.net).__name__]
    assert AutoTokenizer.from_pretrained(artifact.folder).get_vocab()["a"] == model.vocabulary.tokens.index("a")
    assert Wav2Vec2FeatureExtractor.from_pretrained(artifact.folder).do_normalize == model.preprocessing.normalize
    assert artifact.folder.joinpath("model.safetensors").stat().st_mode == (
        artifact.folder.joinpath("config.json").stat().st_mode
    )


def test_quantized_weights_have_the_expected_size(tmp_path):
    """Matrices of 128 × 256: int8 with a float16 scale per row, int4 with one per 32 weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    for scheme, bits in {"int8-weight": 8 + 16 / 256, "int4-weight": 4 + 16 / 32}.items():
        model = tiny_quantized(tmp_path / f"{scheme}-base", scheme, **sizes)
        protocol.export(model, "safetensors", tmp_path / scheme)
        tensors = load_file(tmp_path / scheme / "model.safetensors")
        name = next(name for name in quantized_linears(model.net) if name.endswith("output_dense"))
        names = (f"{name}.{key}" for key in ("weight", "weight_packed", "weight_scale"))
        assert sum(tensors[key].nbytes for key in names if key in tensors) == 128 * 256 * bits / 8


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float32", None)])
def test_float_schemes_are_plain_checkpoints(tmp_path, name, dtype):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT_FRONT_END)))
    for parameter in model.net.parameters():
        parameter.data = parameter.data.to(dtype or torch.float32).float()
    scheme = Scheme(name, str(dtype or torch.float32).removeprefix("torch."))
    artifact = protocol.export(replace(model, scheme=scheme), "safetensors", tmp_path / "out")
    tensors = load_file(artifact.folder / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {dtype or torch.float32}
    assert "quantization_config" not in json.loads((artifact.folder / "config.json").read_text())
    net = AutoModelForCTC.from_pretrained(artifact.folder, dtype=torch.float32).eval()
    assert torch.equal(log_probs(net), log_probs(model.net))
    assert AutoModelForCTC.from_pretrained(artifact.folder).dtype == (dtype or torch.float32)
    assert artifact.details["transformers"] == {"max_abs_diff": 0, "agreement": 1}


def test_adapters_are_merged(tmp_path):
    base = tiny(tmp_path / "base", **SHORT_FRONT_END)
    save_tiny_adapter(base, "lora", tmp_path / "adapter", vocabulary=OTHER_VOCABULARY)
    adapted = checkpoint.load_adapter(mowa.load(str(base)), tmp_path / "adapter")
    artifact = protocol.export(adapted, "safetensors", tmp_path / "out")
    assert artifact.vocabulary == OTHER_VOCABULARY
    net = AutoModelForCTC.from_pretrained(artifact.folder).eval()
    torch.testing.assert_close(log_probs(net), log_probs(merge.merge_adapter(adapted).net))


def test_the_model_does_not_change(tmp_path):
    model = tiny_quantized(tmp_path / "base", "int8-dynamic")
    before, config = log_probs(model.net), model.net.config.to_dict()
    state = {name: value.clone() for name, value in model.net.state_dict().items()}
    protocol.export(model, "safetensors", tmp_path / "out")
    assert torch.equal(log_probs(model.net), before)
    assert model.net.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.net.state_dict().items())


def test_a_net_in_half_precision_does_not_change(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT_FRONT_END)), dtype="bfloat16")
    artifact = protocol.export(replace(model, scheme=Scheme("bf16", "bfloat16")), "safetensors", tmp_path / "out")
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    assert artifact.agreement == 1


def test_tensors_that_read_back_differently_are_rejected(tmp_path, monkeypatch):
    model = tiny_quantized(tmp_path / "base", "int8-weight")
    pack_linear = formats.pack_linear

    def pack_wrong_scale(name, linear):
        tensors = pack_linear(name, linear)
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"] * 1.01
        return tensors

    monkeypatch.setattr(formats, "pack_linear", pack_wrong_scale)
    with pytest.raises(ModelError, match="does not read back as it was written"):
        protocol.export(model, "safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_export_that_differs_in_transformers_is_rejected(tmp_path, monkeypatch):
    model = tiny_quantized(tmp_path / "base", "int8-weight")
    other = tiny_quantized(tmp_path / "other", "int4-weight", num_hidden_layers=1)
    monkeypatch.setattr(safetensors, "_load_in_transformers", lambda *_: other.net)
    with pytest.raises(ModelError, match=r"in transformers export of .* differs .* nats \(limit 0\.001\); use onnx"):
        protocol.export(model, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_transformers_cannot_load_is_rejected(tmp_path, monkeypatch):
    model = tiny_quantized(tmp_path / "base", "int8-weight")
    quantization_config = formats.quantization_config

    def invalid_config(*arguments):
        config = quantization_config(*arguments)
        config["config_groups"]["group_0"]["weights"]["strategy"] = "unknown"
        return config

    monkeypatch.setattr(formats, "quantization_config", invalid_config)
    monkeypatch.setattr(safetensors, "_read_back", lambda *_: model.net)
    with pytest.raises(ModelError, match="transformers cannot load the export"):
        protocol.export(model, "safetensors", tmp_path / "out")


def test_without_the_package_it_is_not_compared_in_transformers(tmp_path, monkeypatch, caplog):
    model = tiny_quantized(tmp_path / "base", "int8-weight")
    monkeypatch.setattr(safetensors, "find_spec", lambda name: None)
    monkeypatch.setattr(safetensors, "_load_in_transformers", lambda *_: pytest.fail("loaded"))
    with caplog.at_level("INFO", "mowa"):
        artifact = protocol.export(model, "safetensors", tmp_path / "out")
    assert artifact.details["transformers"] == "not compared: compressed-tensors is not installed"
    assert "compressed-tensors is not installed" in caplog.text
    assert artifact.agreement >= MIN_AGREEMENT


def test_zero_points_with_quantized_inputs_are_rejected(tmp_path):
    model = tiny_quantized(tmp_path / "base", "mixed")
    linear = model.net.base_model.encoder.layers[0].feed_forward.intermediate_dense
    asymmetric = QuantizedLinear(quantize(linear.weight, 4, 32, symmetric=False), linear.bias)
    model.net.base_model.encoder.layers[0].feed_forward.intermediate_dense = asymmetric
    with pytest.raises(ModelError, match=r"cannot be exported to safetensors: .* symmetric scheme, or onnx"):
        protocol.export(model, "safetensors", tmp_path / "out")


def test_rows_with_incomplete_groups_are_stored_dequantized(tmp_path):
    model = tiny_quantized(tmp_path / "base", "int8-dynamic", conv_dim=(48,) * 3)
    block = model.net.base_model.feature_projection
    block.projection = QuantizedLinear(quantize(block.projection.weight, 8, 32), block.projection.bias)
    artifact = protocol.export(model, "safetensors", tmp_path / "out")
    tensors = load_file(artifact.folder / "model.safetensors")
    assert tensors["wav2vec2.feature_projection.projection.weight"].dtype is torch.float16
    layer = model.net.base_model.encoder.layers[0].feed_forward
    dense = layer.intermediate_dense
    layer.intermediate_dense = QuantizedLinear(quantize(dense.weight, 8, 48), dense.bias, "dynamic")
    with pytest.raises(ModelError, match=r"cannot quantize the inputs of wav2vec2\.encoder\.layers\.0\.feed_forward"):
        protocol.export(model, "safetensors", tmp_path / "other")


def test_options_and_existing_folders_are_rejected(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT_FRONT_END)))
    with pytest.raises(ModelError, match="has no option 'opset'"):
        protocol.export(model, "safetensors", tmp_path / "out", opset=20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="already exists and is not empty"):
        protocol.export(model, "safetensors", tmp_path / "out")


def test_a_damaged_export_is_rejected(tmp_path):
    artifact = protocol.export(tiny_quantized(tmp_path / "base", "int8-weight"), "safetensors", tmp_path / "out")
    file = artifact.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="missing or damaged"):
        manifest.read_artifact(artifact.folder)
    with pytest.raises(ModelError, match="missing or damaged"):
        mowa.load(str(artifact.folder))
