"""Attention of every kind, compared with the softmax over a dense mask in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mowa.kernels.attention import blocks as attention_blocks
from mowa.kernels.attention import cuda, rules
from mowa.kernels.attention.dispatch import CAUSAL, FULL, AttentionMask, attend, padding_to_documents
from mowa.kernels.attention.rules import AttentionSpec, select_backend
from mowa.kernels.attention.varlen import PackedSequences

H, G, D = 6, 2, 8
KINDS = {
    "full": FULL,
    "causal": CAUSAL,
    "window": AttentionMask(left_window=6, right_window=0),
    "window of one": AttentionMask(left_window=0, right_window=0),
    "both ways": AttentionMask(left_window=5, right_window=5),
}


def drawn(batch=1, length=63, groups=G, values=D, keys=None, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((batch, H, length, D), (batch, groups, keys or length, D), (batch, groups, keys or length, values))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def allowed(mask: AttentionMask, batch: int, queries: int, keys: int) -> Tensor:
    """Return the dense mask, written as a loop instead of like `AttentionMask.to_dense`."""
    seen = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for b in range(batch):
        owner = torch.zeros(keys, dtype=torch.long)
        if mask.documents is not None:
            owner = torch.tensor([index for index, n in enumerate(mask.documents[b].lengths) for _ in range(n)])
        for i in range(queries):
            at = i + mask.query_offset
            for j in range(keys):
                back = mask.left_window is None or at - j <= mask.left_window
                on = mask.right_window is None or j - at <= mask.right_window
                mine = mask.documents is None or owner[i] == owner[j]
                true = mask.padding_mask is None or mask.padding_mask[b, j]
                seen[b, 0, i, j] = bool(back and on and mine and true)
    return seen


def reference(q, k, v, seen, scale, softcap=None, sinks=None):
    k, v = (part.repeat_interleave(H // part.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -1e300)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]] * seen.any(-1, keepdim=True)
    return torch.einsum("bhqk,bhke->bqhe", weights, v)


def agree(mask, parts, *, softcap=None, sinks=None, seen=None):
    q, k, v = parts
    if seen is None:
        seen = allowed(mask, len(q), q.shape[2], k.shape[2])
    ours = attend(q, k, v, mask, scale=0.4, softcap=softcap, sinks=sinks)
    expected = reference(q, k, v, seen, 0.4, softcap, sinks)
    torch.testing.assert_close(ours, expected)
    leaves = [*parts, *([] if sinks is None else [sinks])]
    weight = torch.randn_like(expected)
    both = [torch.autograd.grad((out * weight).sum(), leaves) for out in (ours, expected)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=["whole", "small blocks"])
def blocks(request, monkeypatch):
    if request.param == "small blocks":
        monkeypatch.setattr(attention_blocks, "MAX_SCORES", 1)


@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "both"])
@pytest.mark.parametrize("length", [1, 63, 129])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_its_dense_mask(kind, length, extra, blocks):
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if extra in ("sinks", "both") else None
    agree(KINDS[kind], drawn(2, length), softcap=3.0 if extra in ("softcap", "both") else None, sinks=sinks)


@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [((1, 40, 5, 17),), ((63,),), ((1,) * 63,), ((60, 3), (2, 61))])
def test_documents_of_every_kind(rows, kind, extra, blocks):
    mask = replace(KINDS[kind], documents=tuple(map(PackedSequences, rows)))
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if extra == "sinks" else None
    agree(mask, drawn(len(rows), 63), softcap=3.0 if extra == "softcap" else None, sinks=sinks)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("values", [5, 8, 11])
@pytest.mark.parametrize("documents", [None, (PackedSequences((4, 25)),)])
def test_grouped_heads_and_other_value_sizes(groups, values, documents):
    for mask in (CAUSAL, AttentionMask(left_window=3, right_window=0)):
        agree(replace(mask, documents=documents), drawn(1, 29, groups, values))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("queries", "keys", "offset"), [(1, 33, 32), (5, 33, 28), (5, 33, 0), (1, 40, 20), (7, 40, 20)]
)
def test_queries_after_a_cache(queries, keys, offset, kind, softcap):
    agree(replace(KINDS[kind], query_offset=offset), drawn(2, queries, keys=keys), softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_in_a_cache_is_hidden(softcap):
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1, :7] = False
    for queries in (1, 4):
        agree(
            AttentionMask(right_window=0, query_offset=20 - queries, padding_mask=padding),
            drawn(2, queries, keys=20),
            softcap=softcap,
        )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dense_masks(softcap):
    seen = torch.rand(2, 1, 17, 23, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, :, 3] = False
    agree(AttentionMask(dense_mask=seen), drawn(2, 17, keys=23), softcap=softcap, seen=seen)
    added = torch.where(seen, 0.0, -1e30).double()
    with torch.no_grad():
        parts = drawn(2, 17, keys=23)
        out = attend(*parts, AttentionMask(dense_mask=added), scale=0.4, softcap=softcap)
        expected = attend(*parts, AttentionMask(dense_mask=seen), scale=0.4, softcap=softcap)
    true = seen.any(-1)[:, 0]
    torch.testing.assert_close(out[true], expected[true])


def test_cached_dense_masks_are_not_mixed_up():
    assert CAUSAL.to_dense(5, 5, torch.device("cpu")).sum() == 15
    assert replace(CAUSAL, left_window=0).to_dense(5, 5, torch.device("cpu")).sum() == 5


def test_padding_at_either_end_becomes_documents():
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    made = padding_to_documents(CAUSAL, padding)
    assert made.padding_mask is None
    assert [row.lengths for row in made.documents] == [(4,), (1, 3), (2, 2), (1, 2, 1)]
    assert padding_to_documents(CAUSAL, torch.ones(2, 3, dtype=torch.bool)) is CAUSAL
    for odd in ([1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]):
        kept = torch.tensor([odd, [1, 1, 1, 1]]).bool()
        assert padding_to_documents(CAUSAL, kept).padding_mask is kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_document_does_not_move_another_by_a_bit(kind, softcap):
    mask = replace(KINDS[kind], documents=(PackedSequences((21, 40, 9)),))
    outs = []
    for poison in (False, True):
        parts = [part.detach().clone() for part in drawn(1, 70, dtype=torch.float32)]
        if poison:
            for part in parts:
                part[:, :, 21:61] = torch.nan
        parts = [part.requires_grad_() for part in parts]
        out = attend(*parts, mask, scale=0.4, softcap=softcap)
        gradients = torch.autograd.grad((out[:, :21].square().sum() + out[:, 61:].square().sum()), parts)
        outs.append([out, *(part.transpose(1, 2) for part in gradients)])
    for plain, moved in zip(*outs, strict=True):
        assert torch.equal(plain[:, :21], moved[:, :21])
        assert torch.equal(plain[:, 61:], moved[:, 61:])


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return out


@pytest.mark.parametrize("extra", ["plain", "window", "softcap", "sinks"])
def test_no_tensor_of_all_tokens_against_all(extra, monkeypatch):
    monkeypatch.setattr(attention_blocks, "MAX_SCORES", 1 << 14)
    lengths = (300, 1, 411, 96, 216)
    total = sum(lengths)
    mask = AttentionMask(
        left_window=30 if extra == "window" else None, right_window=0, documents=(PackedSequences(lengths),)
    )
    sinks = torch.zeros(H, requires_grad=True) if extra == "sinks" else None
    with Largest() as largest:
        out = attend(
            *drawn(1, total, dtype=torch.float32),
            mask,
            scale=0.4,
            softcap=2.0 if extra == "softcap" else None,
            sinks=sinks,
        )
        out.sum().backward()
    assert total * H * D <= largest.elements < total * total // 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_low_precision_errors_are_at_most_twice_torchs(dtype, softcap):
    parts = drawn(1, 129)
    seen = allowed(CAUSAL, 1, 129, 129)
    exact = reference(*parts, seen, 0.4, softcap)
    low = [part.to(dtype) for part in parts]
    ours = (attend(*low, CAUSAL, scale=0.4, softcap=softcap).double() - exact).abs().max()
    theirs = (_low(low, seen, 0.4, softcap).double() - exact).abs().max()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_keeps_the_mean(kind):
    torch.manual_seed(0)
    mask = replace(KINDS[kind], documents=(PackedSequences((4, 9)),))
    parts = [part.detach() for part in drawn(1, 13, dtype=torch.float32)]
    mean = sum(attend(*parts, mask, scale=0.4, dropout=0.2) for _ in range(3000)) / 3000
    torch.testing.assert_close(mean, attend(*parts, mask, scale=0.4), atol=0.07, rtol=0)


CPU = AttentionSpec("cpu", "float32", 64, 64, 512, 512, causal=True)
GPU = replace(CPU, device="cuda", dtype="bfloat16", capability=(8, 0), packages=frozenset({"varlen", "triton"}))
HOPPER = replace(
    GPU, capability=(9, 0), packages=GPU.packages | {"flash_attn", "flash_attn_interface", "varlen_window"}
)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (CPU, "sdpa"),
        (replace(CPU, documents=True), "documents"),
        (replace(CPU, documents=True, windowed=True), "documents"),
        (replace(CPU, windowed=True), "blocks"),
        (replace(CPU, windowed=True, q_len=1), "sdpa"),
        (replace(CPU, softcap=True), "blocks"),
        (replace(CPU, sinks=True, documents=True), "blocks"),
        (replace(CPU, dropout=True), "weights"),
        (replace(CPU, documents=True, dropout=True), "weights"),
        (GPU, "sdpa"),
        (replace(GPU, documents=True), "flash_varlen"),
        (replace(GPU, documents=True, windowed=True), "flex"),
        (replace(GPU, documents=True, dtype="float32"), "flex"),
        (replace(GPU, documents=True, dtype="float64"), "documents"),
        (replace(GPU, documents=True, dropout=True), "documents"),
        (replace(GPU, softcap=True), "flex"),
        (replace(GPU, softcap=True, q_len=1), "blocks"),
        (replace(GPU, documents=True, v_head_dim=32), "flex"),
        (replace(GPU, has_dense_mask=True), "sdpa"),
        (replace(GPU, documents=True, capability=(7, 5)), "documents"),
        (HOPPER, "flash3"),
        (replace(HOPPER, softcap=True), "flash3"),
        (replace(HOPPER, softcap=True, requires_grad=True), "flash2"),
        (replace(HOPPER, dropout=True, documents=True), "flash2"),
        (replace(HOPPER, sinks=True), "flex"),
        (replace(HOPPER, capability=(8, 0), windowed=True), "flash2"),
        (replace(HOPPER, head_dim=288, v_head_dim=288, documents=True), "flex"),
    ],
)
def test_selected_backend(spec, name):
    choice = select_backend(spec)
    assert choice.backend == name
    assert choice.reason
    before = [rule for rule, _, _ in rules.BACKENDS]
    assert [rejected for rejected, _ in choice.rejected] == before[: before.index(name)]
    assert all(why for _, why in choice.rejected)


@pytest.mark.parametrize("kind", KINDS)
def test_flex_block_mask_equals_the_dense_mask(kind):
    mask = KINDS[kind]
    rows = ((1, 300, 129, 40), (470,))
    made = cuda.build_block_mask(rows, mask.left_window, mask.right_window, torch.device("cpu"))
    seen = replace(mask, documents=tuple(map(PackedSequences, rows))).to_dense(470, 470, torch.device("cpu"))
    at = torch.arange(470)
    batch = torch.arange(2)[:, None, None]
    assert torch.equal(made.mask_mod(batch, None, at[:, None], at), seen[:, 0])
    counted = torch.nn.functional.pad(seen[:, 0], (0, 42, 0, 42)).unflatten(2, (4, 128)).unflatten(1, (4, 128))
    assert torch.equal(made.to_dense()[:, 0].bool(), counted.any(4).any(2))
    whole = torch.zeros(2, 4, 4, dtype=torch.bool)
    for b in range(2):
        for i in range(4):
            whole[b, i, made.full_kv_indices[b, 0, i, : made.full_kv_num_blocks[b, 0, i]].long()] = True
    assert torch.equal(whole, counted.all(4).all(2))


@pytest.mark.gpu
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "values"])
@pytest.mark.parametrize("kind", ["full", "causal", "window", "both ways"])
@pytest.mark.parametrize("documents", [None, (PackedSequences((1, 200, 5, 57)),)])
def test_on_gpu_errors_are_at_most_twice_torchs(documents, kind, extra):
    torch.manual_seed(0)
    values = 16 if extra == "values" else 64
    shapes = ((1, H, 263, 64), (1, G, 263, 64), (1, G, 263, values))
    wide = [torch.randn(shape, dtype=torch.float64, device="cuda").requires_grad_() for shape in shapes]
    low = [part.detach().bfloat16().requires_grad_() for part in wide]
    sinks = torch.randn(H, device="cuda", dtype=torch.float64) if extra == "sinks" else None
    softcap = 3.0 if extra == "softcap" else None
    mask = replace(KINDS[kind], documents=documents)
    seen = mask.to_dense(263, 263, torch.device("cuda"))
    outs = []
    for parts, way in ((wide, "exact"), (low, "theirs"), (low, "ours")):
        at = None if sinks is None else sinks.to(parts[0].dtype)
        if way == "ours":
            out = attend(*parts, mask, scale=0.125, softcap=softcap, sinks=at)
        else:
            out = (
                reference(*parts, seen, 0.125, softcap, at) if parts is wide else _low(parts, seen, 0.125, softcap, at)
            )
        outs.append([part.double() for part in (out, *torch.autograd.grad(out.double().square().sum(), parts))])
    for exact, theirs, ours in zip(*outs, strict=True):
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3 * exact.abs().max()


def _low(parts, seen, scale, softcap, sinks=None):
    """The reference in low precision, with its own lowest value for hidden keys."""
    q, k, v = parts
    k, v = (part.repeat_interleave(H // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-2, -1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)
