"""Models in fewer bits: what becomes narrow, what stays, what is refused, and that the model itself is left alone."""

import numpy as np
import pytest
import soundfile
import torch

import mowa
from mowa.adapters import checkpoint
from mowa.errors import DataError, ModelError
from mowa.exporters.prepare import prepare_for_export
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.quantization import SCHEMES, calibration, format_scheme, mixed_precision, parse_scheme, ptq, quantize
from mowa.types import Example
from tests.adapters.made import saved
from tests.checkpoints import KINDS, clip, tiny

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "conv_dim": (64,) * 7}
SOUNDS = [clip(index, 12_000) for index in range(3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), **WIDE)


def hear(net, sound=SOUNDS[0]):
    return calibration.compute_log_probs(net, sound)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("scheme", ["fp16", "int8-static", "int4-weight+gptq", "mixed+60%"])
def test_every_family_bears_it(tmp_path, kind, scheme):
    model = mowa.load(str(tiny(tmp_path / "base", *kind, **WIDE)))
    names = list(model.net.state_dict())
    before = hear(model.net)
    shrunk = quantize(model, scheme, SOUNDS)
    assert list(model.net.state_dict()) == names
    assert torch.equal(hear(model.net), before)
    assert shrunk.scheme == parse_scheme(scheme)
    assert (hear(shrunk.net).argmax(-1) == before.argmax(-1)).float().mean() > 0.5
    assert ptq.estimate_size_bytes(shrunk) < 0.62 * ptq.estimate_size_bytes(model)
    if scheme == "int8-static":
        found = {name for name, one in shrunk.net.named_modules() if isinstance(one, QuantizedLinear)}
        blocks = {name for unit in ptq.linear_groups(model) for name in unit.module_names}
        assert blocks <= found
        assert len(blocks) == 2 * sum(map(len, model.family.linears.values()))
        assert all(shrunk.net.get_submodule(name).range for name in blocks)


def test_narrow_weights_err_as_they_should(base):
    """Halves hardly, integers by their steps, and every trick brings the net nearer to what it was."""
    model = mowa.load(str(base))
    truth = hear(model.net)

    def kl(scheme):
        return float((truth.exp() * (truth - hear(quantize(model, scheme, SOUNDS).net))).sum(-1).mean())

    found = {name: kl(name) for name in ("fp16", "bf16", "int8-weight", "int4-weight", "int4-weight+gptq")}
    assert found["fp16"] < found["bf16"] < found["int4-weight"]
    assert found["int8-weight"] < found["int4-weight"] / 10
    assert found["int4-weight+gptq"] < found["int4-weight"]


def test_weights_that_lie_on_a_grid_are_kept(base):
    """As quantisation-aware training leaves them."""
    model = mowa.load(str(base))
    once = quantize(model, "int4-weight")
    again = quantize(mowa.types.Model(prepare_for_export(once, dequantize=True), *_rest(model)), "int4-weight")
    for name, one in once.net.named_modules():
        if isinstance(one, QuantizedLinear):
            other = again.net.get_submodule(name)
            assert torch.equal(one.weight, other.weight)


def _rest(model):
    return model.family, model.origin, model.vocabulary, model.preprocessing


def test_an_adapter_is_part_of_it(base, tmp_path):
    saved(base, "lora", tmp_path / "adapter")
    adapted = checkpoint.load_adapter(mowa.load(str(base)), tmp_path / "adapter")
    shrunk = quantize(adapted, "int8-weight")
    assert (hear(shrunk.net) - hear(adapted.net)).abs().mean() < 0.05


def test_mixed_spends_its_budget_where_damage_is(base):
    model = mowa.load(str(base))
    shrunk = quantize(model, "mixed+30%", SOUNDS)
    bits = [
        one.bits for unit in ptq.linear_groups(model) for one in [shrunk.net.get_submodule(unit.module_names[0])] if one
    ]
    assert set(bits) == {4, 8}
    assert ptq.estimate_size_bytes(shrunk) <= 0.30 * ptq.estimate_size_bytes(model) * 1.001
    wide = quantize(model, "fp16")
    damage = mixed_precision.measure_sensitivity(wide, ptq.linear_groups(wide), SOUNDS, lambda share: None)
    assert all(value >= 0 for value in damage.values())
    with pytest.raises(ModelError, match=r"in int4 everywhere is .* and the budget is 1\.0%"):
        quantize(model, "mixed+1%", SOUNDS)


def test_what_cannot_be_is_said_with_what_could(base, tmp_path):
    odd = mowa.load(str(tiny(tmp_path / "odd", hidden_size=32, intermediate_size=80)))
    with pytest.raises(ModelError, match=r"output_dense\.weight cannot be in int4-weight: its 80 columns do not fill"):
        quantize(odd, "int4-weight")
    with pytest.raises(ModelError, match=r"do not fill groups of 64; use int8-dynamic instead"):
        quantize(odd, "nf4")
    with pytest.raises(DataError, match="int8-static needs recordings, to see the range"):
        quantize(odd, "int8-static")
    with pytest.raises(DataError, match=r"int8-dynamic\+gptq needs recordings, to make good"):
        quantize(odd, "int8-dynamic+gptq")
    with pytest.raises(ModelError, match="is in int8-weight already"):
        quantize(quantize(odd, "int8-weight"), "fp16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int9", "no scheme is called 'int9'; did you mean int8"),
        ("int8+64", "groups are for int4-weight and mixed; int8-dynamic has one step for each row"),
        ("int4+48", "groups are of 32, 64, 128 columns"),
        ("fp16+gptq", "fp16 has none"),
        ("nf4+asym", "nf4 has no zeros of its own"),
        ("mixed+200%", r"\+200% is nothing that mixed has"),
        ("int4+fast", r"\+fast is nothing that int4-weight has; schemes are said as a name"),
    ],
)
def test_schemes_that_are_none(text, said):
    with pytest.raises(ModelError, match=said):
        parse_scheme(text)


@pytest.mark.parametrize("text", [*SCHEMES, "int4-weight+gptq+asym+64", "mixed+asym+30%", "int8-dynamic+gptq"])
def test_schemes_are_said_as_they_are_read(text):
    assert format_scheme(parse_scheme(text)) == text


def test_what_is_calibrated_on(base, tmp_path, caplog):
    model = mowa.load(str(base))
    silent, low = tmp_path / "silent.wav", tmp_path / "low.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    soundfile.write(low, clip(0, 16_000), 8_000)
    with pytest.raises(DataError, match="nothing to calibrate on"):
        calibration.sample_clips([Example("a", str(silent), "", 0.0)], model)
    (sound,) = calibration.sample_clips([Example("a", str(low), "", 0.0)], model)
    assert len(sound) == 32_000
    assert "1 of 1 recordings are at 8000 Hz" in caplog.text
    with pytest.raises(DataError):
        calibration.load_clips(str(tmp_path / "nowhere"), model)
