"""Documents on both sides of a model's original length have the logits that each has alone, packed and padded."""

import copy

import pytest
import torch

from mowa.models.causal import accelerate
from mowa.models.causal.document_rope import document_rope, original_length
from mowa.models.causal.token_logits import iter_token_logits
from mowa.tasks import causal
from tests.families.tiny import CAUSAL, tiny
from tests.tasks.test_causal import make_samples

ORIGINAL = 16
LENGTHS = (9, 40, 16, 17, 3, 23, 40, 12)
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [3.0, 5.0, 9.0, 20.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
BY_LAYER = {"full_attention": DYNAMIC, "sliding_attention": DEFAULT}
NETS = {
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 64, "original_max_position_embeddings": ORIGINAL},
    ),
    "longrope in llama": ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 64}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "dynamic with experts": ("qwen3_moe", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "dynamic in some layers": ("gemma3_text", {"rope_parameters": BY_LAYER, "max_position_embeddings": ORIGINAL}),
    "complex": ("deepseek_v2", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=NETS)
def net(request):
    family, changes = NETS[request.param]
    return tiny(family, **copy.deepcopy(changes))


@torch.no_grad()
def alone(net, samples):
    """The logits of each sample by transformers, in a net that saw nothing before."""
    return [copy.deepcopy(net)(torch.tensor(sample.input_ids)[None]).logits[0] for sample in samples]


@pytest.mark.parametrize("accelerated", [True, False])
def test_packed_documents_have_the_logits_of_single_ones(net, accelerated):
    samples = make_samples(*LENGTHS)
    expected = torch.cat(alone(net, samples))
    batch = causal.pack(samples)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if accelerated:
        accelerate.accelerate(net)
    with torch.no_grad(), document_rope(net):
        found = net(**inputs, use_cache=False).logits[0]
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(net(**inputs, use_cache=False).logits[0], found)  # nothing is kept
    accelerate.restore(net)
    assert not any("forward" in vars(module) for module in net.modules())


@pytest.mark.parametrize("multiple", [1, 64])
def test_padded_documents_have_the_logits_of_single_ones(net, multiple):
    samples = make_samples(*LENGTHS)
    for chosen in (samples, samples[:1]):  # 64 tokens of padding are above the original length too
        batch = causal.pad(chosen, 0, pad_to_multiple_of=multiple)
        seen = batch["attention_mask"].bool()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = torch.cat(list(iter_token_logits(net, inputs, seen)))
        torch.testing.assert_close(found, torch.cat(alone(net, chosen)), **CLOSE)


def test_the_stock_net_alone_gives_others():
    """Why this exists: without it, a short document has the positions of the longest one beside it."""
    family, changes = NETS["longrope"]
    net, samples = tiny(family, **copy.deepcopy(changes)), make_samples(9, 40)
    batch = causal.pack(samples)
    with torch.no_grad():
        found = net(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, :9]
    assert (found - alone(net, samples)[0]).abs().max() > 0.01


def test_a_single_document_is_computed_by_the_stock_function(net):
    (sample,) = make_samples(40)
    (expected,) = alone(net, [sample])
    with torch.no_grad(), document_rope(net):
        assert torch.equal(net(torch.tensor(sample.input_ids)[None], use_cache=False).logits[0], expected)


def test_lengths_above_which_positions_change():
    for family, changes in NETS.values():
        assert original_length(tiny(family, **copy.deepcopy(changes))) == ORIGINAL
    for family in CAUSAL:
        assert original_length(tiny(family)) is None
