"""Emissions on a CUDA device equal those on the CPU, batched or not."""

import numpy as np
import pytest
import torch

import mowa
from mowa.data import audio
from mowa.engines import protocol
from tests.checkpoints import KINDS, clip, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_emissions_equal_those_of_the_cpu(kind, tmp_path):
    folder = str(tiny(tmp_path, *kind))
    gpu = mowa.open_engine(mowa.load(folder), device="cuda")
    cpu = mowa.open_engine(mowa.load(folder), device="cpu", dtype="float32")
    assert gpu.precision.dtype == "float32"
    lengths = [400, 16_000, 23_457, 16_000]
    clips = [audio.normalize(clip(seed, length)) for seed, length in enumerate(lengths)]
    for group in protocol.batch_by_length(lengths, 100_000, gpu.batch_policy):
        ours = gpu.emissions([clips[index] for index in group])
        for index, scores in zip(group, ours, strict=True):
            assert np.abs(scores - cpu.emissions([clips[index]])[0]).max() <= 1e-4


def test_half_precision_runs():
    engine = mowa.open_engine(mowa.load("pl-tiny"), device="cuda", dtype="float16")
    assert np.isfinite(engine.emissions([audio.normalize(clip(0, 16_000))])[0]).all()
