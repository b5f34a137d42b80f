"""A function over tiles of the sequence against the function over all of it."""

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
        self.widest = 0

    def forward(self, x):
        self.widest = max(self.widest, x.shape[-2])
        return self.down(self.drop(torch.tanh(self.up(x))))


@pytest.mark.parametrize("length", [1, 63, 64, 4097])
@pytest.mark.parametrize("tile", [1024, 63, 20])
def test_gradients_are_those_of_the_whole(length, tile):
    torch.manual_seed(0)
    mlp, x = Mlp().double(), torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    upward, wanted = torch.randn(2, length, 6, dtype=torch.float64), (x, *mlp.parameters())
    whole = mlp(x)
    expected = torch.autograd.grad(whole, wanted, upward)
    mlp.widest = 0
    out = apply_tiled(mlp, x, tile)
    assert torch.allclose(out, whole, rtol=1e-12)
    for found, truth in zip(torch.autograd.grad(out, wanted, upward), expected, strict=True):
        assert torch.allclose(found, truth, rtol=1e-10, atol=1e-12)
    assert mlp.widest <= tile


def test_gradients_by_finite_differences():
    torch.manual_seed(1)
    mlp, x = Mlp(3, 4).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: apply_tiled(mlp, x, 2), (x, *mlp.parameters()))


def test_reaches_low_rank_updates_and_nothing_frozen():
    torch.manual_seed(2)
    net = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "down"]), Mlp().double())
    learning = [weight for weight in net.parameters() if weight.requires_grad]
    for weight in learning:
        nn.init.normal_(weight)
    x = torch.randn(1, 63, 6, dtype=torch.float64)  # as after a frozen embedding: it wants no gradient itself
    expected = torch.autograd.grad(net(x).sin().sum(), learning)
    found = torch.autograd.grad(apply_tiled(net, x, 10).sin().sum(), learning)
    assert all(torch.allclose(ours, truth) for ours, truth in zip(found, expected, strict=True))


def test_where_only_the_input_learns():
    mlp, x = Mlp().requires_grad_(False), torch.randn(1, 9, 6, requires_grad=True)
    (found,) = torch.autograd.grad(apply_tiled(mlp, x, 4).sum(), x)
    assert torch.allclose(found, torch.autograd.grad(mlp(x).sum(), x)[0], atol=1e-6)


def test_the_same_is_dropped_when_a_tile_is_gone_through_again():
    torch.manual_seed(3)
    mlp, x, seen = Mlp(dropout=0.5), torch.randn(1, 9, 6, requires_grad=True), []
    mlp.drop.register_forward_hook(lambda part, inputs, out: seen.append(out == 0))
    apply_tiled(mlp, x, 3).sum().backward()
    first, again = seen[:3], seen[3:]
    assert len(again) == 3
    assert all(torch.equal(one, other) for one, other in zip(first, reversed(again), strict=True))


def test_inner_values_are_never_there_for_more_than_a_tile():
    mlp, x, kept = Mlp(6, 64), torch.randn(1, 4096, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = apply_tiled(mlp, x, 100)
    assert max(kept) <= x.numel()
    out.sum().backward()


def test_a_tile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        apply_tiled(Mlp(), torch.randn(1, 3, 6), 0)
