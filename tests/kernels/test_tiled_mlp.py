"""apply_tiled compared with the function applied to the whole sequence."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from mowa.kernels.tiled_mlp import apply_tiled


class Mlp(nn.Module):
    def __init__(self, width=6, inner=24, dropout=0.0):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, inner), nn.Linear(inner, width), nn.Dropout(dropout)
        self.longest = 0

    def forward(self, x):
        self.longest = max(self.longest, x.shape[-2])
        return self.down(self.drop(torch.tanh(self.up(x))))


@pytest.mark.parametrize("length", [1, 63, 64, 4097])
@pytest.mark.parametrize("tile", [1024, 63, 20])
def test_gradients_equal_those_of_the_whole(length, tile):
    torch.manual_seed(0)
    mlp, x = Mlp().double(), torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    upward, wanted = torch.randn(2, length, 6, dtype=torch.float64), (x, *mlp.parameters())
    whole = mlp(x)
    expected = torch.autograd.grad(whole, wanted, upward)
    mlp.longest = 0
    out = apply_tiled(mlp, x, tile)
    assert torch.allclose(out, whole, rtol=1e-12)
    for found, truth in zip(torch.autograd.grad(out, wanted, upward), expected, strict=True):
        assert torch.allclose(found, truth, rtol=1e-10, atol=1e-12)
    assert mlp.longest <= tile


def test_gradients_by_finite_differences():
    torch.manual_seed(1)
    mlp, x = Mlp(3, 4).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: apply_tiled(mlp, x, 2), (x, *mlp.parameters()))


def test_lora_weights_get_gradients():
    torch.manual_seed(2)
    net = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "down"]), Mlp().double())
    learning = [weight for weight in net.parameters() if weight.requires_grad]
    for weight in learning:
        nn.init.normal_(weight)
    x = torch.randn(1, 63, 6, dtype=torch.float64)  # no gradient, as after a frozen embedding
    expected = torch.autograd.grad(net(x).sin().sum(), learning)
    found = torch.autograd.grad(apply_tiled(net, x, 10).sin().sum(), learning)
    assert all(torch.allclose(ours, truth) for ours, truth in zip(found, expected, strict=True))


def test_gradient_of_the_input_only():
    mlp, x = Mlp().requires_grad_(False), torch.randn(1, 9, 6, requires_grad=True)
    (found,) = torch.autograd.grad(apply_tiled(mlp, x, 4).sum(), x)
    assert torch.allclose(found, torch.autograd.grad(mlp(x).sum(), x)[0], atol=1e-6)


def test_recomputation_drops_the_same_elements():
    torch.manual_seed(3)
    mlp, x, seen = Mlp(dropout=0.5), torch.randn(1, 9, 6, requires_grad=True), []
    mlp.drop.register_forward_hook(lambda part, inputs, out: seen.append(out == 0))
    apply_tiled(mlp, x, 3).sum().backward()
    first, again = seen[:3], seen[3:]
    assert len(again) == 3
    assert all(torch.equal(one, other) for one, other in zip(first, reversed(again), strict=True))


def test_intermediate_values_of_one_tile_at_a_time():
    mlp, x, kept = Mlp(6, 64), torch.randn(1, 4096, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = apply_tiled(mlp, x, 100)
    assert max(kept) <= x.numel()
    out.sum().backward()


def test_tile_size_zero_is_refused():
    with pytest.raises(ValueError, match="tile_size must be at least 1"):
        apply_tiled(Mlp(), torch.randn(1, 3, 6), 0)
