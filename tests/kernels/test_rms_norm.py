"""rms_norm compared with float64 and finite differences, and bit-identical to transformers' modules."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mowa.kernels.rms_norm import rms_norm

KINDS = {
    "llama": (LlamaRMSNorm, {}),
    "gemma": (GemmaRMSNorm, {"plus_one": True, "rounding": "after"}),
}
SHAPES = [(1, 1, 1), (1, 63, 63), (2, 3, 5, 8), (1, 4097, 7), (3, 4097)]


def module(kind, width, dtype):
    norm = KINDS[kind][0](width, eps=1e-5)
    with torch.no_grad():
        norm.weight.add_(torch.randn(width) / 4)
    return norm.to(dtype)


def gradients(y, x, weight, upward):
    return torch.autograd.grad(y, (x, weight), upward)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialized memory holds NaN."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: real(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_bit_identical_to_transformers(kind, shape, dtype, poisoned):
    torch.manual_seed(0)
    norm, x = module(kind, shape[-1], dtype), torch.randn(shape).to(dtype) * 3
    found = rms_norm(x, norm.weight, 1e-5, **KINDS[kind][1])
    assert found.dtype == dtype
    assert torch.equal(found, norm(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_as_in_transformers(kind, dtypes):
    torch.manual_seed(0)
    norm, x = module(kind, 33, dtypes[1]), torch.randn(5, 33).to(dtypes[0])
    found, expected = rms_norm(x, norm.weight, 1e-5, **KINDS[kind][1]), norm(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_as_close_to_float64_as_autograd(kind, shape, dtype):
    torch.manual_seed(1)
    norm = module(kind, shape[-1], dtype)
    x, upward = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    options = KINDS[kind][1]
    wide = [part.detach().double().requires_grad_() for part in (x, norm.weight)]
    r = (wide[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    scale = wide[1] + 1 if kind == "gemma" else wide[1]
    exact = gradients(wide[0] * r * scale, *wide, upward.double())
    theirs = gradients(norm(x), x, norm.weight, upward)
    ours = gradients(rms_norm(x, norm.weight, 1e-5, **options), x, norm.weight, upward)
    terms = (upward.double() * r * scale).abs().max()  # which nearly cancel in a row of one element
    for found, peer, truth in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype
        floor = torch.finfo(dtype).eps * max(terms, truth.abs().max())
        allowed = 2 * (peer.double() - truth).abs().max() + floor
        assert (found.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("rounding", ["before", "after"])
def test_gradients_by_finite_differences(plus_one, rounding):
    torch.manual_seed(2)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm(x, weight, 1e-6, plus_one=plus_one, rounding=rounding), (x, weight)
    )


def test_gradient_of_one_input_only():
    torch.manual_seed(3)
    x, weight = torch.randn(4, 9, requires_grad=True), torch.randn(9, requires_grad=True)
    (both, _), (alone,) = (
        torch.autograd.grad(rms_norm(x, w, 1e-6).square().sum(), wanted)
        for w, wanted in ((weight, (x, weight)), (weight.detach(), (x,)))
    )
    assert torch.equal(both, alone)
    (only,) = torch.autograd.grad(rms_norm(x.detach(), weight, 1e-6).sum(), (weight,))
    assert only.shape == weight.shape


def test_no_float32_copy_is_saved():
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(256, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    assert sum(kept) <= x.nbytes + weight.nbytes + 64 * 4


def test_inputs_are_not_modified():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    before, upward = x.detach().clone(), torch.randn(3, 8)
    was = upward.clone()
    rms_norm(x, weight, 1e-6).backward(upward)
    assert torch.equal(x.detach(), before)
    assert torch.equal(upward, was)
