"""Attention over packed sequences, compared with torch's attention and a block-diagonal mask."""

import pytest
import torch
import torch.nn.functional as F

from mowa.kernels.attention.dispatch import AttentionMask, attend, derive_spec
from mowa.kernels.attention.rules import select_backend
from mowa.kernels.attention.varlen import PackedSequences

LENGTHS = [(1,), (63,), (1, 1, 1), (5, 64, 3), (200, 1, 37)]


def drawn(lengths, heads=2, width=8, device="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    shape = (1, heads, sum(lengths), width)
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for _ in range(3)]


def reference(q, k, v, lengths, scale):
    mask = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in lengths]).bool().to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_a_block_diagonal_mask(lengths):
    q, k, v = drawn(lengths)
    ours, theirs = (
        attend(q, k, v, AttentionMask(documents=(PackedSequences(lengths),)), scale=0.3),
        reference(q, k, v, lengths, 0.3),
    )
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_nothing_leaks_between_sequences():
    lengths = (4, 7)
    q, k, v = drawn(lengths)
    with torch.no_grad():
        before = attend(q, k, v, AttentionMask(documents=(PackedSequences(lengths),)), scale=1.0)
        for part in (q, k, v):
            part[:, :, :4] = torch.nan
        after = attend(q, k, v, AttentionMask(documents=(PackedSequences(lengths),)), scale=1.0)
    torch.testing.assert_close(after[:, 4:], before[:, 4:], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_gpu_errors_are_at_most_twice_torchs(lengths, dtype):
    exact = reference(*drawn(lengths, width=64, device="cuda"), lengths, 0.125)
    q, k, v = drawn(lengths, width=64, device="cuda", dtype=dtype)
    mask = AttentionMask(documents=(PackedSequences(lengths),))
    assert select_backend(derive_spec(q, k, v, mask, 0.0, None, False)).backend.startswith("flash")
    ours = (
        (attend(q, k, v, AttentionMask(documents=(PackedSequences(lengths),)), scale=0.125).double() - exact)
        .abs()
        .max()
    )
    theirs = (reference(q, k, v, lengths, 0.125).double() - exact).abs().max()
    assert ours <= 2 * theirs + 1e-6
