"""Checkpointing with inputs in host memory: gradients bit-identical to plain checkpointing."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mowa.kernels.offload import OffloadedCheckpoint


def blocks(width, device="cpu"):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.3)) for _ in range(5)).to(
        device
    )


def gradients(layers, x, run):
    torch.manual_seed(1)
    hidden = x
    for layer in layers:
        hidden = run(layer, hidden)
    return torch.autograd.grad(hidden.square().sum(), (x, *layers.parameters()))


def equal(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("length", [1, 63])
def test_on_cpu_it_is_plain_checkpointing(length):
    layers, x = blocks(8), torch.randn(length, 8, requires_grad=True)
    plain = gradients(layers, x, partial(checkpoint, use_reentrant=False))
    assert equal(gradients(layers, x, OffloadedCheckpoint()), plain)
    assert equal(gradients(layers, x, lambda layer, hidden: layer(hidden)), plain)


def test_only_the_inputs_of_blocks_are_saved():
    """They are saved through the hooks that copy them to the host on a GPU."""
    saved = []

    class Recording(OffloadedCheckpoint):
        def _offload(self, tensor):
            saved.append(tensor.shape)
            return super()._offload(tensor)

    layers, x = blocks(8), torch.randn(3, 8, requires_grad=True)
    gradients(layers, x, Recording())
    assert saved == [x.shape] * 5


def test_without_gradients_nothing_is_saved():
    layers, x = blocks(8), torch.randn(3, 8)
    offload = OffloadedCheckpoint()
    with torch.no_grad():
        assert torch.equal(offload(layers[0].eval(), x), layers[0](x))


def test_keyword_arguments_and_several_outputs():
    x = torch.randn(3, requires_grad=True)
    found = OffloadedCheckpoint()(lambda a, b, *, c: (a * b, a + c), x, 2.0, c=3.0)
    assert torch.equal(found[0], x * 2)
    assert torch.equal(torch.autograd.grad(found[1].sum(), x)[0], torch.ones(3))


def test_copies_start_empty():
    offload = OffloadedCheckpoint()
    for other in (copy.deepcopy(offload), pickle.loads(pickle.dumps(offload))):
        x = torch.randn(2, requires_grad=True)
        assert torch.equal(torch.autograd.grad(other(torch.sin, x).sum(), x)[0], x.cos())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_gpu_bit_identical_with_less_memory():
    layers = blocks(1024, "cuda")
    x = torch.randn(4097, 1024, device="cuda", requires_grad=True)
    plain_checkpointing = partial(checkpoint, use_reentrant=False)
    gradients(layers, x, plain_checkpointing)
    peaks, found = {}, {}
    for name, run in (("plain", plain_checkpointing), ("offloaded", OffloadedCheckpoint())):
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            hidden = x
            torch.manual_seed(1)
            for layer in layers:
                hidden = run(layer, hidden)
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.memory_allocated()
            found[name] = torch.autograd.grad(hidden.square().sum(), (x, *layers.parameters()))
    assert equal(found["offloaded"], found["plain"])
    assert peaks["offloaded"] <= peaks["plain"] - 3 * x.nbytes
