"""The anatomy of every speech family: its parts in their order are the net, and what it says of padding is true."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCTC

from mowa.data import audio
from mowa.families import get_family
from mowa.models.ctc_encoder import anatomy
from mowa.models.ctc_encoder.anatomy import copy_with_blocks, read_anatomy
from tests.checkpoints import KINDS, clip, tiny

CLIP = torch.from_numpy(audio.normalize(clip(1, 16_000))).double()[None]
ADAPTER = {"add_adapter": True, "num_adapter_layers": 2, "adapter_stride": 2, "output_hidden_size": 32}


def net_of(folder):
    return AutoModelForCTC.from_pretrained(folder).double().eval().requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def net(request, tmp_path_factory):
    return net_of(tiny(tmp_path_factory.mktemp("net"), *request.param))


def test_the_parts_in_order_are_the_net(net):
    parts = read_anatomy(net)
    states = parts.project(parts.features(CLIP))
    torch.testing.assert_close(parts.masked_logits(states, None, 0.0), net(CLIP).logits, rtol=0, atol=1e-12)
    assert parts.geometry.num_frames(CLIP.shape[1]) == states.shape[1]
    assert parts.stable == (net.config.do_stable_layer_norm and net.config.model_type != "data2vec-audio")
    stacked = states
    for layer in parts.position_layers:
        stacked = layer(stacked)
    torch.testing.assert_close(stacked, parts.position_module(states), rtol=0, atol=1e-12)


def test_a_copy_with_fewer_blocks_shares_nothing(net):
    fewer = copy_with_blocks(net, (1,))
    assert len(read_anatomy(net).blocks) == 2
    assert (len(read_anatomy(fewer).blocks), fewer.config.num_hidden_layers) == (1, 1)
    assert not {id(weight) for weight in net.parameters()} & {id(weight) for weight in fewer.parameters()}
    last, copied = (dict(one.base_model.encoder.layers[-1].named_parameters()) for one in (net, fewer))
    assert all(torch.equal(weight, copied[name]) for name, weight in last.items())
    assert {id(module.config) for module in fewer.modules() if hasattr(module, "config")} == {id(fewer.config)}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.parametrize(
    ("family", "changes", "exact"),
    [
        *[(family, {}, family != "data2vec-audio") for family, norm in KINDS if norm == "layer"],
        ("hubert", {"conv_pos_batch_norm": True}, False),
        ("wav2vec2", ADAPTER, False),
        ("wav2vec2", {"feat_extract_norm": "group", "conv_bias": False}, False),
    ],
)
def test_padding_is_exact_where_it_says_so(tmp_path, family, changes, exact):
    net = net_of(tiny(tmp_path, family, **changes))
    if norm := getattr(read_anatomy(net).position_module, "batch_norm", None):
        nn.init.constant_(norm.bias, 0.5)
    alone = net(CLIP[:, :8_640]).logits[0]
    values, mask = CLIP.repeat(2, 1), torch.ones(2, CLIP.shape[1], dtype=torch.long)
    values[1, 8_640:] = mask[1, 8_640:] = 0
    difference = (net(values, attention_mask=mask).logits[1, : len(alone)] - alone).abs().max()
    assert read_anatomy(net).is_padding_exact == exact
    assert (difference < 1e-9) == exact


def test_what_a_family_supports_decides(net):
    family = get_family(net.config.model_type)
    for capability in ("cpu_plan", "packing", "chunked"):
        reason = anatomy.unsupported_reason(net, capability)
        assert (reason == "") == (capability in family.supports)
        assert reason == family.unsupported.get(capability, "")
