"""Dropout on CPUs: probability, independence, reproducibility."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mowa.kernels.attention.dispatch import AttentionMask, attend
from mowa.kernels.attention.varlen import PackedSequences
from mowa.kernels.dropout import cpu_dropout, sample_keep_mask
from mowa.models.ctc_encoder.fast_training import fast_dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_fraction_is_dropped_and_the_mean_stays(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    y = cpu_dropout(x, p)
    assert abs(float((y == 0).float().mean()) - p) < 0.002
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1.0) * (1 / (1 - p)))}
    assert abs(float(y.mean()) - 1) < 0.01


def test_rows_columns_and_calls_are_independent():
    torch.manual_seed(0)
    masks = torch.stack([sample_keep_mask(torch.Size((500, 503)), 0.3).double() for _ in range(3)]) - 0.7
    for shifted in (masks[:, 1:] * masks[:, :-1], masks[..., 1:] * masks[..., :-1], masks[1:] * masks[:-1]):
        assert abs(float(shifted.mean())) < 0.003


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_has_the_same_mask(dtype):
    x = torch.randn(7, 13, dtype=dtype, requires_grad=True)
    y = cpu_dropout(x, 0.4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == dtype
    torch.testing.assert_close(gradient, torch.where(y != 0, torch.tensor(1 / 0.6, dtype=dtype), 0))


def test_probability_zero_and_empty_tensors():
    x = torch.randn(3)
    assert cpu_dropout(x, 0.0) is x
    assert cpu_dropout(torch.zeros(0, 4), 0.5).shape == (0, 4)


def test_torchs_seed_determines_the_masks():
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = cpu_dropout(x, 0.5), cpu_dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(cpu_dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_recomputing_draws_the_same_mask():
    torch.manual_seed(0)
    x = torch.randn(50, 50, requires_grad=True)
    y = checkpoint(lambda x: cpu_dropout(cpu_dropout(x, 0.5).exp(), 0.5), x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    dropped = y == 0
    assert torch.equal(gradient == 0, dropped | torch.isclose(y, torch.tensor(2.0)))


def test_fast_dropout_is_used_in_training_and_undone():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(100, 4)
    torch.manual_seed(0)
    before = net(x)
    with fast_dropout(net):
        torch.manual_seed(0)
        during = net(x)
        torch.testing.assert_close(net.eval()(x), net[0](x))
    torch.manual_seed(0)
    assert not torch.equal(before, during)
    assert torch.equal(net.train()(x), before)
    assert "forward" not in vars(net[1])


def test_attention_with_dropout_keeps_its_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    mask = AttentionMask(documents=(PackedSequences((4, 5)),))
    mean = sum(attend(q, k, v, mask, scale=0.5, dropout=0.2) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, attend(q, k, v, mask, scale=0.5), atol=0.05, rtol=0)
