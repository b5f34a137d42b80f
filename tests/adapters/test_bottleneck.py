"""Bottleneck adapters have the names, shapes and computation of transformers' own."""

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


def randomize(net):
    """Add noise to the adapters, as if they had been trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".adapter_layer." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_new_adapters_change_nothing_and_transformers_reads_trained_ones(family, tmp_path):
    model = loading.load(str(tiny(tmp_path / "base", family)))
    before = logits(model.net)
    bottleneck.add(model.net, model.family, 5)
    assert torch.equal(logits(model.net), before)
    randomize(model.net)
    ours = logits(model.net)
    assert not torch.allclose(ours, before, atol=1e-2)
    model.net.save_pretrained(tmp_path / "saved")
    theirs, loading_info = AutoModelForCTC.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not loading_info["missing_keys"]
    assert not loading_info["unexpected_keys"]
    torch.testing.assert_close(logits(theirs), ours)


def test_shapes_equal_those_of_a_config_with_adapter_attn_dim():
    config, ctc = CLASSES["wav2vec2"]
    torch.manual_seed(0)
    ours = bottleneck.add(ctc(config(**SMALLEST, **STABLE)), get_family("wav2vec2"), 6)
    theirs = ctc(config(**SMALLEST, **STABLE, adapter_attn_dim=6))
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert set(bottleneck.adapter_state_dict(ours, get_family("wav2vec2"))) == set(theirs._get_adapters())


def test_initialization():
    config, ctc = CLASSES["wav2vec2"]
    net = ctc(config(**SMALLEST, **STABLE)).double()
    bottleneck.add(net, get_family("wav2vec2"), 6)
    first, second = (layer.adapter_layer for layer in net.wav2vec2.encoder.layers)
    assert 0.01 < float(first.linear_1.weight.detach().std()) < 0.03
    assert not torch.equal(first.linear_1.weight, second.linear_1.weight)
    assert first.linear_1.weight.dtype == torch.float64
    assert torch.equal(first.norm.weight, torch.ones(32, dtype=torch.double))
    assert not any(value.any() for value in (first.linear_2.weight, first.linear_2.bias, first.linear_1.bias))


def test_present_adapters_are_kept():
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
def test_unsupported_nets_are_rejected_and_unchanged(family, changes):
    config, ctc = CLASSES[family]
    net = ctc(config(**SMALLEST | STABLE | changes))
    names = set(net.state_dict())
    with pytest.raises(RecipeError, match="use method: lora"):
        bottleneck.add(net, get_family(family), 6)
    assert set(net.state_dict()) == names
    assert not bottleneck.has(net)
