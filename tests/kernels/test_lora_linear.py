"""lora_linear compared with PEFT's layer, float64 and finite differences."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from mowa.kernels.lora_linear import lora_linear


def layer(width, out, *, rank=4, bias=True, base=torch.float32, update=torch.float32):
    """Return PEFT's layer around an nn.Linear, with a nonzero update."""
    settings = peft.LoraConfig(r=rank, lora_alpha=7, target_modules=["0"])
    net = peft.inject_adapter_in_model(settings, nn.Sequential(nn.Linear(width, out, bias)).to(base))
    made = net[0]
    nn.init.normal_(made.lora_B["default"].weight, std=0.3)
    for part in (made.lora_A, made.lora_B):
        part.to(update)
    return made


def parts(made):
    base, name = made.base_layer, "default"
    return base.weight, base.bias, made.lora_A[name].weight, made.lora_B[name].weight, made.scaling[name]


def run(function, made, x, upward):
    _, _, a, b, _ = parts(made)
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), *torch.autograd.grad(out, (x, a, b), upward.to(out.dtype))


def ours_of(made):
    return lambda x: lora_linear(x, *parts(made))


def assert_as_close(ours, theirs, exact):
    largest = max(float(truth.abs().max()) for truth in exact if truth.numel())  # in a single gradient terms may cancel
    for found, peer, truth in zip(ours, theirs, exact, strict=True):
        assert found.dtype == peer.dtype
        assert found.shape == peer.shape
        if truth.numel():
            allowed = 2 * (peer.double() - truth).abs().max() + torch.finfo(found.dtype).eps * largest
            assert (found.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (1, 4097, 5), (2, 3, 33), (1, 0, 8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("base", "update"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float32", "bf16", "bf16 with a float32 update"],
)
def test_equals_pefts_layer(shape, bias, base, update, monkeypatch):
    torch.manual_seed(0)
    made = layer(shape[-1], 9, bias=bias, base=base, update=update)
    x, upward = torch.randn(shape).to(base), torch.randn(*shape[:-1], 9).to(base)
    theirs, double = run(made, made, x, upward), layer(shape[-1], 9, bias=bias).double()
    double.load_state_dict(made.state_dict())
    exact = run(double, double, x.double(), upward.double())
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: real(*a, **k).fill_(float("nan")))
    assert_as_close(run(ours_of(made), made, x, upward), theirs, exact)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_equals_pefts_layer_under_autocast(base):
    torch.manual_seed(1)
    made, x, upward = layer(65, 33, base=base), torch.randn(2, 31, 65).to(base), torch.randn(2, 31, 33)
    made.cast_input_dtype_enabled = False  # as mowa sets it: autocast does the casts
    double = layer(65, 33).double()
    double.load_state_dict(made.state_dict())
    exact = run(double, double, x.double(), upward.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = run(made, made, x, upward), run(ours_of(made), made, x, upward)
    assert ours[0].dtype == torch.bfloat16
    assert_as_close(ours, theirs, exact)
    assert ours[2].dtype == ours[3].dtype == torch.float32


def test_gradients_by_finite_differences():
    torch.manual_seed(2)
    made = layer(5, 4, rank=2).double()
    weight, bias, a, b, scale = parts(made)
    x, bias = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: lora_linear(x, weight, bias, a, b, scale), (x, bias, a.detach().requires_grad_(), b)
    )


def test_gradients_of_one_input_only():
    torch.manual_seed(3)
    weight, _, a, b, scale = parts(layer(6, 5))
    x = torch.randn(4, 6, requires_grad=True)
    every = torch.autograd.grad(lora_linear(x, weight, None, a, b, scale).sum(), (x, a, b))
    for index, inputs in enumerate(
        ((x, a.detach(), b.detach()), (x.detach(), a, b.detach()), (x.detach(), a.detach(), b))
    ):
        out = lora_linear(inputs[0], weight, None, *inputs[1:], scale)
        assert torch.equal(torch.autograd.grad(out.sum(), inputs[index])[0], every[index])
    assert weight.grad is None


def test_linears_with_one_input_save_it_once():
    made = [layer(64, 48, base=torch.float32) for _ in range(3)]
    x, kept = torch.randn(32, 64, requires_grad=True), {}
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t),
    ):
        for one in made:
            lora_linear(x, *parts(one))
    weights = {part.data_ptr() for one in made for part in parts(one)[:4] if isinstance(part, torch.Tensor)}
    others = [tensor for tensor in kept.values() if tensor.data_ptr() not in weights]
    assert sum(tensor.numel() for tensor in others) == x.numel() + 3 * 32 * 4


def test_a_trainable_weight_is_refused():
    weight, bias, a, b, scale = parts(layer(6, 5))
    with pytest.raises(ValueError, match="must be frozen"):
        lora_linear(torch.randn(2, 6), weight.requires_grad_(), bias, a, b, scale)
