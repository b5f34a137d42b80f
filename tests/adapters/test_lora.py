"""LoRA is PEFT's, in place: the net stays what it was, and begins by saying what it said."""

import peft
import pytest
import torch

from mowa import loading
from mowa.adapters import lora
from mowa.errors import RecipeError
from mowa.models.ctc_encoder import packing
from tests.checkpoints import clip, tiny


@pytest.fixture
def model(tmp_path):
    return loading.load(str(tiny(tmp_path / "base")))


def logits(net, seed=0, samples=8_000):
    with torch.no_grad():
        return net(torch.from_numpy(clip(seed, samples))[None]).logits


def test_the_net_stays_itself_and_says_what_it_said(model):
    net, head = model.net, model.net.lm_head
    before = logits(net)
    kind = type(net)
    assert lora.add(net, model.family, rank=4, alpha=8, target_modules=("attention", "mlp")) is net
    assert type(net) is kind
    assert net.lm_head is head
    assert torch.equal(logits(net), before)
    layer = net.wav2vec2.encoder.layers[1]
    assert layer(torch.zeros(1, 3, net.config.hidden_size)) is not None
    for linear in (layer.attention.q_proj, layer.attention.out_proj, layer.feed_forward.output_dense):
        assert isinstance(linear, peft.tuners.lora.Linear)


def test_updates_are_those_of_the_paper(model):
    """y = W x + b + alpha / rank · B A x, written out with tensors."""
    lora.add(model.net, model.family, rank=4, alpha=6, target_modules=("attention",))
    linear = model.net.wav2vec2.encoder.layers[0].attention.q_proj
    torch.nn.init.normal_(linear.lora_B["default"].weight)
    x = torch.randn(2, 5, 32)
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    expected = x @ linear.base_layer.weight.T + linear.base_layer.bias + 6 / 4 * x @ a.T @ b.T
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("where", [("attention",), ("mlp",), ("attention", "mlp")])
def test_they_sit_where_they_are_asked(model, where):
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=where)
    found = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.net.named_parameters() if ".lora_" in name}
    assert found == {name for place in where for name in model.family.linears[place]}


def test_packed_training_calls_them(model):
    """The packed forward goes round the net's own; every update must be in its gradient all the same."""
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("attention", "mlp"))
    how = packing.frame_geometry(model.net.config)
    row = torch.from_numpy(packing.pack_samples([clip(0, 6_000), clip(1, 7_000)], how))[None]
    with packing.packed_attention(model.net):
        out, _ = packing.forward_packed(model.net, row, [6_000, 7_000])
    out.square().sum().backward()
    last = [parameter for name, parameter in model.net.named_parameters() if ".lora_B" in name]
    assert len(last) == 2 * 6
    assert all(parameter.grad.any() for parameter in last)


def test_wavlm_attention_is_refused_with_the_reason(tmp_path):
    model = loading.load(str(tiny(tmp_path / "wavlm", "wavlm")))
    with pytest.raises(RecipeError, match=r"bare weights.*where: \[mlp\]"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("attention", "mlp"))
    assert not lora.has(model.net)
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("mlp",))
    out = model.net(torch.from_numpy(clip(0, 8_000))[None]).logits
    out.square().sum().backward()
    assert all(p.grad.any() for name, p in model.net.named_parameters() if ".lora_B" in name)


def test_twice_or_nowhere_is_refused(model):
    with pytest.raises(RecipeError, match="at least one"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=())
    with pytest.raises(RecipeError, match="'heads'"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("heads",))
    lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("mlp",))
    with pytest.raises(RecipeError, match="already"):
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=("mlp",))
