"""Gated activations compared with float64, finite differences and transformers' activations."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from mowa.kernels.glu import geglu, swiglu

KINDS = {
    "swiglu": (swiglu, ACT2FN["silu"]),
    "geglu": (geglu, ACT2FN["gelu_pytorch_tanh"]),
    "exact geglu": (lambda gate, up: geglu(gate, up, "none"), ACT2FN["gelu"]),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(function, gate, up, upward):
    gate, up = (part.detach().requires_grad_() for part in (gate, up))
    out = function(gate, up)
    return (out.detach(), *torch.autograd.grad(out, (gate, up), upward))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (1, 63), (2, 3, 4097), (1, 0, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_close_to_float64_as_transformers(kind, shape, dtype, monkeypatch):
    torch.manual_seed(0)
    ours, act = KINDS[kind]
    inputs = [(torch.randn(shape) * 3).to(dtype) for _ in range(3)]
    exact = run(lambda gate, up: act(gate) * up, *(part.double() for part in inputs))
    theirs = run(lambda gate, up: act(gate) * up, *inputs)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: real(*a, **k).fill_(float("nan")))
    for found, peer, truth in zip(run(ours, *inputs), theirs, exact, strict=True):
        assert found.dtype == dtype
        if found.numel():
            allowed = 2 * (peer.double() - truth).abs().max() + torch.finfo(dtype).eps
            assert (found.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_bit_identical_to_transformers(kind):
    ours, act = KINDS[kind]
    gate, up = torch.randn(2, 63, 33), torch.randn(2, 63, 33)
    assert torch.equal(ours(gate, up), act(gate) * up)
    assert torch.equal(ours(gate.bfloat16(), up.bfloat16()), act(gate.bfloat16()) * up.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    torch.manual_seed(1)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(KINDS[kind][0], (gate, up))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_halves_of_one_tensor(kind):
    torch.manual_seed(2)
    ours, act = KINDS[kind]
    both = torch.randn(2, 7, 10, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(ours(*both.chunk(2, -1)).sin().sum(), both)[0]
    gate, up = both.chunk(2, -1)
    assert torch.allclose(found, torch.autograd.grad((act(gate) * up).sin().sum(), both)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_two_inputs_are_saved_and_not_modified(kind):
    gate, up = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    before, kept = [part.detach().clone() for part in (gate, up)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = KINDS[kind][0](gate, up)
    assert set(kept) == {gate.data_ptr(), up.data_ptr()}
    upward = torch.ones_like(out)
    torch.autograd.backward(out, upward)
    assert all(torch.equal(part.detach(), was) for part, was in zip((gate, up), before, strict=True))
    assert torch.equal(upward, torch.ones_like(out))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_input_only(kind):
    gate, up = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    both = torch.autograd.grad(KINDS[kind][0](gate, up).sum(), (gate, up))
    assert torch.equal(torch.autograd.grad(KINDS[kind][0](gate, up.detach()).sum(), gate)[0], both[0])
    assert torch.equal(torch.autograd.grad(KINDS[kind][0](gate.detach(), up).sum(), up)[0], both[1])
