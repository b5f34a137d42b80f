"""Post-training quantization: which layers are quantized, how large errors are, which requests are refused."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

import mowa
from mowa.adapters import checkpoint
from mowa.errors import DataError, ModelError
from mowa.exporters.prepare import prepare_for_export
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.quantization import SCHEMES, calibration, format_scheme, mixed_precision, parse_scheme, quantize
from mowa.quantization.linears import estimate_size_bytes, linear_groups
from mowa.quantization.schemes import non_block_group_size
from mowa.types import Example
from tests.adapters.tiny_adapters import save_tiny_adapter
from tests.checkpoints import KINDS, clip, tiny

DIVISIBLE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "conv_dim": (64,) * 7}
CLIPS = [clip(index, 12_000) for index in range(3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), **DIVISIBLE)


def log_probs(net, clip=CLIPS[0]):
    return calibration.compute_log_probs(net, clip)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("scheme", ["fp16", "int8-static", "int4-weight+gptq", "mixed+60%"])
def test_every_family_in_every_kind_of_scheme(tmp_path, kind, scheme):
    model = mowa.load(str(tiny(tmp_path / "base", *kind, **DIVISIBLE)))
    names = list(model.net.state_dict())
    before = log_probs(model.net)
    quantized = quantize(model, scheme, CLIPS)
    assert list(model.net.state_dict()) == names
    assert torch.equal(log_probs(model.net), before)
    assert quantized.scheme == parse_scheme(scheme)
    assert (log_probs(quantized.net).argmax(-1) == before.argmax(-1)).float().mean() > 0.5
    assert estimate_size_bytes(quantized) < 0.62 * estimate_size_bytes(model)
    if scheme == "int8-static":
        found = {name for name, one in quantized.net.named_modules() if isinstance(one, QuantizedLinear)}
        blocks = {name for group in linear_groups(model) for name in group.module_names}
        assert blocks <= found
        assert len(blocks) == 2 * sum(map(len, model.family.linears.values()))
        assert all(quantized.net.get_submodule(name).input_qparams for name in blocks)


def test_errors_grow_as_bits_shrink_and_gptq_helps(base):
    model = mowa.load(str(base))
    truth = log_probs(model.net)

    def kl(scheme):
        return float((truth.exp() * (truth - log_probs(quantize(model, scheme, CLIPS).net))).sum(-1).mean())

    found = {name: kl(name) for name in ("fp16", "bf16", "int8-weight", "int4-weight", "int4-weight+gptq")}
    assert found["fp16"] < found["bf16"] < found["int4-weight"]
    assert found["int8-weight"] < found["int4-weight"] / 10
    assert found["int4-weight+gptq"] < found["int4-weight"]


def test_weights_on_a_grid_are_kept(base):
    """As quantization-aware training leaves them."""
    model = mowa.load(str(base))
    once = quantize(model, "int4-weight")
    again = quantize(replace(model, net=prepare_for_export(once, dequantize=True)), "int4-weight")
    for name, one in once.net.named_modules():
        if isinstance(one, QuantizedLinear):
            other = again.net.get_submodule(name)
            assert torch.equal(one.weight, other.weight)


def test_an_adapter_is_merged_first(base, tmp_path):
    save_tiny_adapter(base, "lora", tmp_path / "adapter")
    adapted = checkpoint.load_adapter(mowa.load(str(base)), tmp_path / "adapter")
    quantized = quantize(adapted, "int8-weight")
    assert (log_probs(quantized.net) - log_probs(adapted.net)).abs().mean() < 0.05


def test_mixed_stays_within_its_budget(base):
    model = mowa.load(str(base))
    quantized = quantize(model, "mixed+30%", CLIPS)
    bits = {quantized.net.get_submodule(group.module_names[0]).bits for group in linear_groups(model)}
    assert bits == {4, 8}
    assert estimate_size_bytes(quantized) <= 0.30 * estimate_size_bytes(model) * 1.001
    half = quantize(model, "fp16")
    sensitivity = mixed_precision.measure_sensitivity(half, linear_groups(half), CLIPS, lambda fraction: None)
    assert all(value >= 0 for value in sensitivity.values())
    with pytest.raises(ModelError, match=r"all layers in int4 has .* the budget of 1\.0% is too small"):
        quantize(model, "mixed+1%", CLIPS)


def test_unsuitable_models_are_refused_with_a_hint(base, tmp_path):
    odd = mowa.load(str(tiny(tmp_path / "odd", hidden_size=32, intermediate_size=80)))
    with pytest.raises(
        ModelError, match=r"output_dense\.weight cannot be quantized to int4-weight: its 80 columns are not a"
    ):
        quantize(odd, "int4-weight")
    with pytest.raises(ModelError, match=r"the group size 64; use int8-dynamic"):
        quantize(odd, "nf4")
    with pytest.raises(DataError, match="int8-static needs calibration recordings to measure the range"):
        quantize(odd, "int8-static")
    with pytest.raises(DataError, match=r"int8-dynamic\+gptq needs calibration recordings to accumulate the Hessians"):
        quantize(odd, "int8-dynamic+gptq")
    with pytest.raises(ModelError, match=r"is quantized already \(int8-weight\)"):
        quantize(quantize(odd, "int8-weight"), "fp16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "unknown scheme 'int9'; did you mean int8"),
        ("int8+64", "group sizes apply to int4-weight and mixed; int8-dynamic has one scale per row"),
        ("int4+48", "group sizes are 32, 64, 128"),
        ("fp16+gptq", "integer weights only, not to fp16"),
        ("nf4+asym", "nf4 has no zero points"),
        ("mixed+200%", r"\+200% is not a modifier of mixed"),
        ("int4+fast", r"\+fast is not a modifier of int4-weight; a scheme is a name and modifiers"),
    ],
)
def test_invalid_schemes(text, message):
    with pytest.raises(ModelError, match=message):
        parse_scheme(text)


@pytest.mark.parametrize("text", [*SCHEMES, "int4-weight+gptq+asym+64", "mixed+asym+30%", "int8-dynamic+gptq"])
def test_format_scheme_undoes_parse_scheme(text):
    assert format_scheme(parse_scheme(text)) == text


def test_calibration_clips(base, tmp_path, caplog):
    model = mowa.load(str(base))
    silent, low = tmp_path / "silent.wav", tmp_path / "low.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    soundfile.write(low, clip(0, 16_000), 8_000)
    with pytest.raises(DataError, match="no calibration data"):
        calibration.sample_clips([Example("a", str(silent), "", 0.0)], model)
    (clip_at_16k,) = calibration.sample_clips([Example("a", str(low), "", 0.0)], model)
    assert len(clip_at_16k) == 32_000
    assert "1 of 1 calibration recordings have a sampling rate of 8000 Hz" in caplog.text
    with pytest.raises(DataError):
        calibration.load_clips(str(tmp_path / "nowhere"), model)


def test_small_tensors_outside_the_blocks_are_not_quantized():
    sizes = ((512, 512), (4, 32), (16_384, 1), (1024, 10, 3), (512, 512, 3))
    assert [non_block_group_size(torch.empty(size)) for size in sizes] == [32, 0, 0, 0, 32]
