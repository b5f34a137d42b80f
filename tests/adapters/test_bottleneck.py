"""Bottleneck adapters are transformers' own: named, shaped, placed and read back as it does."""

import pytest
import torch
from transformers import AutoModelForCTC

from mowa import loading
from mowa.adapters import bottleneck
from mowa.errors import RecipeError
from mowa.families import get_family
from tests.checkpoints import CLASSES, SMALLEST, clip, tiny

STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "vocab_size": 7}


def logits(net):
    with torch.no_grad():
        return net.eval()(torch.from_numpy(clip(0, 8_000))[None]).logits


def stirred(net):
    """As if it had learnt something."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".adapter_layer." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_begins_as_the_base_and_reads_back_in_stock_transformers(family, tmp_path):
    model = loading.load(str(tiny(tmp_path / "base", family)))
    before = logits(model.net)
    bottleneck.add(model.net, model.family, 5)
    assert torch.equal(logits(model.net), before)
    stirred(model.net)
    ours = logits(model.net)
    assert not torch.allclose(ours, before, atol=1e-2)
    model.net.save_pretrained(tmp_path / "saved")
    theirs, report = AutoModelForCTC.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(theirs), ours)


def test_shapes_are_those_of_a_net_that_was_made_with_adapters():
    config, ctc = CLASSES["wav2vec2"]
    torch.manual_seed(0)
    ours = bottleneck.add(ctc(config(**SMALLEST, **STABLE)), get_family("wav2vec2"), 6)
    theirs = ctc(config(**SMALLEST, **STABLE, adapter_attn_dim=6))
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert set(bottleneck.adapter_state_dict(ours, get_family("wav2vec2"))) == set(theirs._get_adapters())


def test_everything_but_the_zeros_is_fresh():
    config, ctc = CLASSES["wav2vec2"]
    net = ctc(config(**SMALLEST, **STABLE)).double()
    bottleneck.add(net, get_family("wav2vec2"), 6)
    first, second = (layer.adapter_layer for layer in net.wav2vec2.encoder.layers)
    assert 0.01 < float(first.linear_1.weight.detach().std()) < 0.03
    assert not torch.equal(first.linear_1.weight, second.linear_1.weight)
    assert first.linear_1.weight.dtype == torch.float64
    assert torch.equal(first.norm.weight, torch.ones(32, dtype=torch.double))
    assert not any(value.any() for value in (first.linear_2.weight, first.linear_2.bias, first.linear_1.bias))


def test_adapters_that_are_there_are_kept():
    config, ctc = CLASSES["wav2vec2"]
    net = ctc(config(**SMALLEST, **STABLE, adapter_attn_dim=6))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    bottleneck.add(net, get_family("wav2vec2"), 6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(RecipeError, match="width 6 already"):
        bottleneck.add(net, get_family("wav2vec2"), 8)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("wav2vec2", {"feat_extract_norm": "group", "do_stable_layer_norm": False}), ("wavlm", {})],
)
def test_nets_without_a_place_are_refused_untouched(family, changes):
    config, ctc = CLASSES[family]
    net = ctc(config(**SMALLEST | STABLE | changes))
    names = set(net.state_dict())
    with pytest.raises(RecipeError, match="use train: lora"):
        bottleneck.add(net, get_family(family), 6)
    assert set(net.state_dict()) == names
    assert not bottleneck.has(net)
