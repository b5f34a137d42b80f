"""apply_rope compared with transformers' function, float64 and finite differences."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiConfig, PhiRotaryEmbedding

from mowa.kernels.rope import apply_rope


def angles(length, rotary_dim, dtype=torch.float64):
    slots = torch.arange(length, dtype=torch.float64)[:, None] / 100.0 ** (torch.arange(rotary_dim // 2) / rotary_dim)
    slots = torch.cat((slots, slots), -1)[None]
    return slots.cos().to(dtype), slots.sin().to(dtype)


def run(function, q, k, upward):
    q, k = (part.detach().requires_grad_() for part in (q, k))
    out = function(q, k)
    return (*(part.detach() for part in out), *torch.autograd.grad(out, (q, k), upward))


@pytest.mark.parametrize("length", [1, 63, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_close_to_float64_as_transformers(length, dtype, monkeypatch):
    torch.manual_seed(0)
    q, dq = (torch.randn(2, length, 3, 8).to(dtype).transpose(1, 2) for _ in range(2))  # the layout attention produces
    k, dk = (torch.randn(2, length, 1, 8).to(dtype).transpose(1, 2) for _ in range(2))
    cos, sin = angles(length, 8, dtype)
    wide = [part.double() for part in (q, k)]
    exact = run(lambda q, k: apply_rotary_pos_emb(q, k, cos.double(), sin.double()), *wide, (dq.double(), dk.double()))
    theirs = run(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), q, k, (dq, dk))
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **kw: real(*a, **kw).fill_(float("nan")))
    before = q.clone()
    for found, peer, truth in zip(
        run(lambda q, k: apply_rope(q, k, cos, sin), q, k, (dq, dk)), theirs, exact, strict=True
    ):
        assert found.dtype == dtype
        allowed = 2 * (peer.double() - truth).abs().max() + torch.finfo(dtype).eps
        assert (found.double() - truth).abs().max() <= allowed
    assert torch.equal(q, before)


@pytest.mark.parametrize("rotary_dim", [2, 4, 8])
@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_by_finite_differences(rotary_dim, heads):
    torch.manual_seed(1)
    q, k = (torch.randn(1, *shape, 8, dtype=torch.float64, requires_grad=True) for shape in ((3, 3), (3, 3)))
    cos, sin = torch.randn(
        2, 1, 3, rotary_dim, dtype=torch.float64
    )  # not of one angle, which the backward pass must not rely on
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin, heads), (q, k))


def test_partial_rotary_as_in_phi():
    torch.manual_seed(2)
    config = PhiConfig(hidden_size=32, num_attention_heads=4)
    q, k = torch.randn(1, 4, 63, 8), torch.randn(1, 4, 63, 8)
    cos, sin = PhiRotaryEmbedding(config)(q, torch.arange(63)[None])
    rotary_dim = cos.shape[-1]
    assert rotary_dim < 8
    parts = apply_rotary_pos_emb(q[..., :rotary_dim], k[..., :rotary_dim], cos, sin)
    for found, part, whole in zip(apply_rope(q, k, cos, sin), parts, (q, k), strict=True):
        assert torch.allclose(found[..., :rotary_dim], part, atol=1e-6)
        assert torch.equal(found[..., rotary_dim:], whole[..., rotary_dim:])


def test_heads_in_dimension_2():
    torch.manual_seed(3)
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    cos, sin = angles(5, 8, torch.float32)
    for found, expected in zip(
        apply_rope(q, k, cos, sin, unsqueeze_dim=2), apply_rotary_pos_emb(q, k, cos, sin, 2), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-6)


def test_angles_in_a_wider_dtype():
    q, k = torch.randn(1, 3, 5, 8).bfloat16(), torch.randn(1, 1, 5, 8).bfloat16()
    cos, sin = angles(5, 8, torch.float32)
    for found, expected in zip(apply_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert found.dtype == expected.dtype == torch.float32
        assert torch.allclose(found, expected, atol=1e-6)
    q.requires_grad_()
    apply_rope(q, k, cos, sin)[0].sum().backward()
    assert q.grad.dtype == torch.bfloat16
