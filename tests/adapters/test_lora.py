"""LoRA by PEFT, injected in place: the net keeps its modules, and new LoRA changes nothing."""

import peft
import pytest
import torch

from mowa import loading
from mowa.adapters import lora
from mowa.errors import RecipeError
from mowa.models.ctc_encoder import packing
from mowa.models.ctc_encoder.geometry import frame_geometry
from tests.checkpoints import clip, tiny


@pytest.fixture
def model(tmp_path):
    return loading.load(str(tiny(tmp_path / "base")))


def logits(net, seed=0, samples=8_000):
    with torch.no_grad():
        return net(torch.from_numpy(clip(seed, samples))[None]).logits


def test_the_net_keeps_its_modules_and_its_output(model):
    net, head = model.net, model.net.lm_head
    before = logits(net)
    net_class = type(net)
    assert lora.add(net, model.family, rank=4, alpha=8, target_modules=("attention", "mlp")) is net
    assert type(net) is net_class
    assert net.lm_head is head
    assert torch.equal(logits(net), before)
    layer = net.wav2vec2.encoder.layers[1]
    assert layer(torch.zeros(1, 3, net.config.hidden_size)) is not None
    for linear in (layer.attention.q_proj, layer.attention.out_proj, layer.feed_forward.output_dense):
        assert isinstance(linear, peft.tuners.lora.Linear)


def test_the_output_is_that_of_the_paper(model):
    """y = W x + b + alpha / rank · B A x, written out with tensors."""
    lora.add(model.net, model.family, rank=4, alpha=6, target_modules=("attention",))
    linear = model.net.wav2vec2.encoder.layers[0].attention.q_proj
    torch.nn.init.normal_(linear.lora_B["default"].weight)
    x = torch.randn(2, 5, 32)
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    expected = x @ linear.base_layer.weight.T + linear.base_layer.bias + 6 / 4 * x @ a.T @ b.T
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("target_modules", [("attention",), ("mlp",), ("attention", "mlp")])
def test_only_target_modules_have_lora(model, target_modules):
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=target_modules)
    found = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.net.named_parameters() if ".lora_" in name}
    assert found == {name for group in target_modules for name in model.family.linears[group]}


def test_packed_training_uses_them(model):
    """The packed forward replaces the net's own; every LoRA layer must get a gradient."""
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("attention", "mlp"))
    how = frame_geometry(model.net.config)
    row = torch.from_numpy(packing.pack_samples([clip(0, 6_000), clip(1, 7_000)], how))[None]
    with packing.packed_attention(model.net):
        out, _ = packing.forward_packed(model.net, row, [6_000, 7_000])
    out.square().sum().backward()
    last = [parameter for name, parameter in model.net.named_parameters() if ".lora_B" in name]
    assert len(last) == 2 * 6
    assert all(parameter.grad.any() for parameter in last)


def test_wavlm_attention_is_rejected(tmp_path):
    model = loading.load(str(tiny(tmp_path / "wavlm", "wavlm")))
    with pytest.raises(RecipeError, match=r"bypasses LoRA; use target_modules: \[mlp\]"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("attention", "mlp"))
    assert not lora.has(model.net)
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("all-linear",))  # all that the family has
    out = model.net(torch.from_numpy(clip(0, 8_000))[None]).logits
    out.square().sum().backward()
    assert all(p.grad.any() for name, p in model.net.named_parameters() if ".lora_B" in name)


def test_no_target_unknown_targets_and_a_second_lora_are_rejected(model):
    with pytest.raises(RecipeError, match="at least one"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=())
    with pytest.raises(RecipeError, match="'heads'"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("heads",))
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("mlp",))
    with pytest.raises(RecipeError, match="already"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("mlp",))
