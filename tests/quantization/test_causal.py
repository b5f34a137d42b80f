"""Language models are quantized in their blocks only, stay tied, and what does not fit is refused with alternatives."""

import pytest
import torch

import mowa
from mowa.adapters import causal
from mowa.errors import ModelError
from mowa.models.causal import accelerate
from mowa.quantization import parse_scheme, quantize
from tests.tiny_causal import is_tied, logits, quantized_names, tiny_causal
from tests.training.causal import chats

SCHEMES = ("fp16", "bf16", "int8-weight", "int4-weight", "int4-weight+asym+64", "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("causal") / "base")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_linear_layers_of_the_blocks_are_quantized(tmp_path, family, scheme):
    model = mowa.load(tiny_causal(tmp_path / "base", family))
    before = logits(model.net)
    quantized = mowa.quantize(model, scheme)
    assert torch.equal(logits(model.net), before)
    assert quantized.scheme == parse_scheme(scheme)
    assert quantized.tokenizer is model.tokenizer
    leaves = {name for group in model.family.linears.values() for name in group}
    names = {name for name, module in model.net.named_modules() if name.rpartition(".")[2] in leaves}
    assert quantized_names(quantized.net) == (set() if scheme in ("fp16", "bf16") else names)
    error = (logits(quantized.net) - before).norm() / before.norm()
    assert 0 < error < (0.03 if quantized.scheme.weights in ("float16", "bfloat16", "int8") else 0.4)
    if scheme not in ("fp16", "bf16"):
        assert all(
            weight is dict(model.net.named_parameters())[name] for name, weight in quantized.net.named_parameters()
        )


def test_int8_means_weights_only():
    assert parse_scheme("int8", "causal").name == "int8-weight"
    assert parse_scheme("int8").name == "int8-dynamic"


def test_errors_grow_as_bits_shrink(folder):
    model = mowa.load(folder)
    truth = logits(model.net).log_softmax(-1)

    def kl(scheme):
        return float((truth.exp() * (truth - logits(quantize(model, scheme).net).log_softmax(-1))).sum(-1).mean())

    found = [kl(scheme) for scheme in ("fp16", "bf16", "int8", "int4")]
    assert found == sorted(found)
    assert kl("int8") < kl("int4") / 10
    assert kl("nf4") < kl("int4") * 2


@pytest.mark.parametrize("scheme", ["bf16", "int8", "nf4"])
def test_tied_weights_stay_tied(tmp_path, scheme):
    model = mowa.load(tiny_causal(tmp_path / "base", tie_word_embeddings=True))
    assert is_tied(quantize(model, scheme).net)


def test_a_model_in_half_precision_does_not_change(folder):
    model = mowa.load(folder, dtype="bfloat16")
    quantized = quantize(model, "int8")
    assert {weight.dtype for weight in model.net.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in quantized.net.parameters()} == {torch.float32}


def test_an_accelerated_model_can_be_quantized(folder):
    model = mowa.load(folder)
    expected = logits(quantize(model, "int8").net)
    accelerate.accelerate(model.net)
    torch.testing.assert_close(logits(quantize(model, "int8").net), expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_is_merged_first(tmp_path):
    from mowa.adapters import lora

    base = chats.model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    model = mowa.load(base)
    options = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"], "variant": "lora"}
    net = lora.get_peft_model(mowa.load(base).net, model.family, **options)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    causal.save_adapter(net, tmp_path / "adapter", base=model.origin, tokenizer=model.tokenizer, metrics={})
    adapted = mowa.load(tmp_path / "adapter")
    merged = causal.merge_adapter(adapted)
    assert not lora.has(merged.net)
    quantized = quantize(adapted, "int8")
    plain, expected = logits(model.net), logits(merged.net)
    torch.testing.assert_close(expected, logits(adapted.net.eval()), rtol=1e-3, atol=1e-3)
    assert (logits(quantized.net) - expected).abs().mean() < (plain - expected).abs().mean() / 5


WORKING = "int8-weight, int4-weight, nf4, fp16 or bf16"
CALIBRATED = f"needs calibration .*, which mowa does for recordings only; use {WORKING}"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("int4+gptq", CALIBRATED),
        ("mixed", CALIBRATED),
        ("int8-static", CALIBRATED),
        ("int8-dynamic", "answers depend on what shares the batch; use int8-weight"),
    ],
)
def test_schemes_that_need_recordings_are_refused(folder, scheme, message):
    with pytest.raises(ModelError, match=rf"base cannot be quantized to .*: .*{message}"):
        mowa.quantize(folder, scheme)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_are_refused(tmp_path, family):
    model = mowa.load(tiny_causal(tmp_path / "base", family))
    message = r"its experts, \d+% of the weights, are one tensor per block \(model\.layers.*\) .*; use bf16 or fp16"
    with pytest.raises(ModelError, match=message):
        quantize(model, "int8")
    assert quantize(model, "bf16").scheme.name == "bf16"


def test_rows_that_do_not_fit_and_quantized_models_are_refused(tmp_path, folder):
    odd = mowa.load(tiny_causal(tmp_path / "odd", intermediate_size=80))
    with pytest.raises(ModelError, match=r"down_proj\.weight cannot be quantized to nf4: .* use int8-weight"):
        quantize(odd, "nf4")
    with pytest.raises(ModelError, match=r"is quantized already \(int8-weight\)"):
        quantize(quantize(mowa.load(folder), "int8"), "nf4")
