"""transformers' nets with mowa's attention, compared with the same nets and transformers' attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, masking_utils

from mowa.families import get_family
from mowa.kernels.attention.dispatch import AttentionMask
from mowa.models.causal import attention_interface
from mowa.models.explain import explain_layers
from mowa.training.gradient_checkpointing import set_gradient_checkpointing
from tests.families.tiny import CAUSAL, EMBEDDING, TEXT, VISION, VOCABULARY, tiny

ATTENDING = tuple(name for name in TEXT if name != "mpnet")
EXPERTS = {
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
}  # tokens of all documents share products
LENGTHS = (13, 1, 22, 9)


@pytest.fixture
def drawn():
    torch.manual_seed(1)
    return torch.randint(3, 80, (3, 21))


def own(net):
    net.set_attn_implementation("eager")
    return net


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def agree(ours, other):
    assert ours.keys() == other.keys()
    for name in ours:
        scale = other[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours[name], other[name], rtol=1e-3, atol=float(1e-3 * scale), msg=name)


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("side", ["none", "left", "right", "hole"])
def test_outputs_and_gradients_equal_transformers(name, side, drawn):
    mask = torch.ones_like(drawn)
    if side == "left":
        mask[1, :8] = 0
    elif side == "right":
        mask[1, 8:] = 0
    elif side == "hole":
        mask[1, 4:9] = 0
    inputs = {"input_ids": drawn, "attention_mask": mask}
    if name in CAUSAL:
        inputs["use_cache"] = False
    net, found, weight = own(tiny(name)), [], None
    for accelerated in (False, True):
        if accelerated:
            attention_interface.install_attention(net)
        out = net(**inputs)[0][mask.bool()]
        weight = torch.randn_like(out) if weight is None else weight
        found.append((out.detach(), gradients(net, (out * weight).sum())))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    agree(found[1][1], found[0][1])


def laid(seed=0):
    torch.manual_seed(seed)
    rows = [torch.randint(3, 80, (1, n)) for n in LENGTHS]
    return rows, {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "use_cache": False,
    }


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", [name for name in CAUSAL if "packing" not in get_family(name).unsupported])
def test_packed_documents_equal_single_ones(name, checkpointed):
    net = own(tiny(name))
    rows, packed = laid()
    alone = torch.cat([net(input_ids=row, use_cache=False).logits for row in rows], 1)
    weight = torch.randn_like(alone)
    expected = gradients(net, (alone * weight).sum())
    attention_interface.install_attention(net)
    if checkpointed:
        net.train()
        set_gradient_checkpointing(net)
    together = net(**packed).logits
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    agree(gradients(net, (together * weight).sum()), expected)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in EXPERTS])
def test_documents_are_independent_to_the_bit(name):
    net = tiny(name)
    attention_interface.install_attention(net)
    _, packed = laid()
    with torch.no_grad():
        before = net(**packed).logits
        packed["input_ids"] = packed["input_ids"].clone()
        packed["input_ids"][:, 14:36] = 3 + (packed["input_ids"][:, 14:36] + 20) % 77
        after = net(**packed).logits
    assert not torch.equal(before[:, 14:36], after[:, 14:36])
    assert torch.equal(before[:, :14], after[:, :14])
    assert torch.equal(before[:, 36:], after[:, 36:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_packed_rows_with_a_new_cache(name):
    net = tiny(name)
    attention_interface.install_attention(net)
    _, packed = laid()
    with torch.no_grad():
        expected = net(**packed).logits
        assert torch.equal(net(**packed | {"use_cache": True}).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_several_packed_rows(name):
    net = own(tiny(name))
    _, packed = laid()
    other = torch.randint(3, 80, (1, sum(LENGTHS)))
    two = {
        "input_ids": torch.cat([packed["input_ids"], other]),
        "position_ids": torch.cat([packed["position_ids"], torch.arange(sum(LENGTHS))[None]]),
        "use_cache": False,
    }
    with torch.no_grad():
        expected = net(**packed).logits, net(input_ids=other, use_cache=False).logits
        attention_interface.install_attention(net)
        logits = net(**two).logits
    torch.testing.assert_close(logits, torch.cat([net(**packed).logits, expected[1]]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[:1], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "cache"),
    [(name, "dynamic") for name in CAUSAL] + [(name, "static") for name in ("llama", "gemma2", "mistral", "gpt_oss")],
)
def test_generation_in_a_left_padded_batch(name, cache):
    net = tiny(name)
    asked = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    asked |= {"cache_implementation": "static"} if cache == "static" else {}
    torch.manual_seed(2)
    rows = [torch.randint(3, 80, (n,)) for n in (5, 12, 9)]
    expected = [
        own(net).generate(row[None], attention_mask=torch.ones(1, len(row)), **asked)[0, len(row) :] for row in rows
    ]
    attention_interface.install_attention(net)
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 12 - len(row) :], mask[index, 12 - len(row) :] = row, 1
    tokens = net.generate(ids, attention_mask=mask, **asked)[:, 12:]
    assert torch.equal(tokens, torch.stack(expected))
    assert len(set(tokens.flatten().tolist())) > 2


@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_in_two_parts(name, drawn):
    net = own(tiny(name))
    mask = torch.ones_like(drawn)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = net(input_ids=drawn, attention_mask=mask, use_cache=False).logits[:, -6:]
        attention_interface.install_attention(net)
        cache = DynamicCache(config=net.config)
        net(input_ids=drawn[:, :15], attention_mask=mask[:, :15], past_key_values=cache)
        logits = net(input_ids=drawn[:, 15:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ATTENDING)
def test_restored_to_the_bit_and_other_nets_unaffected(name, drawn):
    net, other = tiny(name), tiny(name)
    with torch.no_grad():
        before = net(input_ids=drawn)[0]
        names = [config._attn_implementation for config in attention_interface._configs(net)]
        restore = attention_interface.install_attention(net)
        assert {config._attn_implementation for config in attention_interface._configs(net)} == {
            attention_interface.ATTN_IMPLEMENTATION
        }
        assert torch.equal(other(input_ids=drawn)[0], before)
        net(input_ids=drawn)
        restore()
        assert [config._attn_implementation for config in attention_interface._configs(net)] == names
        assert torch.equal(net(input_ids=drawn)[0], before)


def test_unsupported_nets():
    assert "MPNetModel" in attention_interface.unsupported_reason(tiny("mpnet"))
    assert not [name for name in ATTENDING if attention_interface.unsupported_reason(tiny(name))]


def test_output_attentions(drawn):
    net = own(tiny("gemma2"))
    with torch.no_grad():
        expected = net(input_ids=drawn, output_attentions=True)
        attention_interface.install_attention(net)
        out = net(input_ids=drawn, output_attentions=True)
    for ours, other in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, other)


def test_position_bias():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 7, 8) for _ in range(3))
    bias = torch.randn(1, 4, 7, 7)
    module = torch.nn.Module()
    out, _ = attention_interface.mowa_attention_forward(
        module, q, k, v, AttentionMask(right_window=0), position_bias=bias, is_causal=True
    )
    scores = q @ k.transpose(-2, -1) * 8**-0.5 + bias
    scores = scores.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2))


def build_mask(function, **options):
    return attention_interface.mowa_mask(
        batch_size=2, q_length=12, kv_length=12, mask_function=function, device="cpu", **options
    )


def test_known_mask_functions_need_no_dense_mask():
    assert build_mask(masking_utils.causal_mask_function) == AttentionMask(right_window=0)
    assert build_mask(masking_utils.bidirectional_mask_function) == AttentionMask()
    assert build_mask(masking_utils.sliding_window_causal_mask_function(4), local_size=4) == AttentionMask(
        left_window=3, right_window=0
    )
    assert build_mask(masking_utils.sliding_window_bidirectional_mask_function(4)) == AttentionMask(
        left_window=4, right_window=4
    )


@pytest.mark.parametrize("vmap", [False, True])
def test_unknown_mask_functions_become_dense_masks(vmap):
    known = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    for function in (
        known,
        masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.tensor([[-1] * 6 + [0] * 6] * 2))
        ),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k != 3),
    ):
        ours = build_mask(function, allow_is_causal_skip=False, use_vmap=vmap)
        expected = masking_utils.sdpa_mask(2, 12, 12, mask_function=function, allow_is_causal_skip=False, use_vmap=vmap)
        assert torch.equal(ours.dense_mask.expand(2, 1, 12, 12), expected.expand(2, 1, 12, 12))


def test_images_are_attended_in_both_directions():
    net = own(tiny("gemma3"))
    ids = torch.tensor([[5, 6, 91, 90, 90, 90, 90, 92, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "token_type_ids": (ids == 90).long(),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    with torch.no_grad():
        expected = net(**inputs).logits
        attention_interface.install_attention(net)
        torch.testing.assert_close(net(**inputs).logits, expected, rtol=1e-3, atol=1e-3)


def test_images_of_several_sizes_are_separate():
    net = own(tiny("qwen2_5_vl"))
    grid = torch.tensor([[1, 4, 4], [1, 8, 4]])
    images = [[92] + [91 - 1] * int(g.prod() // 4) + [93] for g in grid]
    ids = torch.tensor([[5, 6, *images[0], 7, *images[1], 8]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 90).long(),
        "image_grid_thw": grid,
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 16),
    }
    with torch.no_grad():
        expected = net(**inputs).logits
        attention_interface.install_attention(net)
        torch.testing.assert_close(net(**inputs).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_name_is_registered_and_no_other_is_changed():
    mapping = AttentionInterface()
    assert mapping[attention_interface.ATTN_IMPLEMENTATION] is attention_interface.mowa_attention_forward
    assert mapping["sdpa"].__module__ == "transformers.integrations.sdpa_attention"


def test_copies_keep_the_attention(drawn):
    net = tiny("llama")
    attention_interface.install_attention(net)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(net)(input_ids=drawn).logits, net(input_ids=drawn).logits)
    assert net.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("name", [*CAUSAL, *VISION, *EMBEDDING])
def test_every_model_is_explained_without_its_weights(name):
    config = tiny(name).config
    family = get_family(config.model_type)
    rows = explain_layers(config, family, length=64, device="cpu", dtype="float32", packed=family.task == "causal")
    assert sum(row.count for row in rows) == config.get_text_config().num_hidden_layers
    assert all(row.reason for row in rows)


def test_explanation_of_a_gpu():
    rows = explain_layers(
        tiny("gemma2").config, get_family("gemma2"), length=64, device="cuda:8.0", dtype="bfloat16", packed=True
    )
    assert [(row.layer_type, row.count, row.implementation) for row in rows] == [
        ("sliding window of 8, head size 16, soft-cap", 2, "flex"),
        ("full attention, head size 16, soft-cap", 2, "flex"),
    ]
    assert "flash_varlen: no soft-cap" in rows[0].reason
    (row,) = explain_layers(tiny("mpnet").config, get_family("mpnet"), length=64, device="cpu", dtype="float32")
    assert row.implementation == "transformers"
