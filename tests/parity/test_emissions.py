"""Emissions in float32, batched at random, equal those of transformers in float64, one clip at a time, within 1e-5.

transformers in float32 differs from itself in float64 by up to 1e-5.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCTC, Wav2Vec2FeatureExtractor

import mowa
from mowa.data import audio
from mowa.engines import protocol
from mowa.models.ctc_encoder.geometry import frame_geometry
from tests.checkpoints import KINDS, clip, tiny


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request, tmp_path_factory):
    folder = tiny(tmp_path_factory.mktemp("-".join(request.param)), *request.param)
    engine = mowa.open_engine(mowa.load(str(folder)), device="cpu", dtype="float32")
    return (
        engine,
        AutoModelForCTC.from_pretrained(folder).double().eval(),
        Wav2Vec2FeatureExtractor.from_pretrained(folder),
    )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(400, 40_000) | st.sampled_from([400, 401, 719, 720, 16_000]), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    budget=st.integers(400, 120_000),
)
def test_batches_equal_transformers_without_batches(pair, lengths, seed, budget):
    engine, net, extractor = pair
    clips = [clip(seed + index, length) for index, length in enumerate(lengths)]
    groups = protocol.batch_by_length(lengths, budget, engine.batch_policy)
    assert sorted(index for group in groups for index in group) == list(range(len(clips)))
    for group in groups:
        ours = engine.emissions([audio.normalize(clips[index]) for index in group])
        for index, scores in zip(group, ours, strict=True):
            inputs = extractor(clips[index], sampling_rate=16_000, return_tensors="pt")
            with torch.inference_mode():
                theirs = torch.log_softmax(net(inputs["input_values"].double()).logits[0], -1).numpy()
            assert scores.shape == theirs.shape
            assert np.abs(scores - theirs).max() <= 1e-5


def test_num_frames_equals_transformers(pair):
    _, net, _ = pair
    for samples in (1, 399, 400, 719, 720, 16_000, 480_000):
        expected = int(net._get_feat_extract_output_lengths(torch.tensor(samples))) if samples >= 400 else 0
        assert frame_geometry(net.config).num_frames(samples) == expected


def test_conv_adapter_changes_the_hop(tmp_path):
    folder = tiny(tmp_path, add_adapter=True, num_adapter_layers=2, adapter_stride=2, output_hidden_size=32)
    engine = mowa.open_engine(mowa.load(str(folder)), device="cpu", dtype="float32")
    assert frame_geometry(engine.model.net.config).hop == 1280
    for samples in (400, 5_000, 16_000, 33_333):
        scores = engine.emissions([clip(1, samples)])[0]
        assert (
            len(scores)
            == frame_geometry(engine.model.net.config).num_frames(samples)
            == len(engine.model.net(torch.from_numpy(clip(1, samples))[None]).logits[0])
        )


def test_lengths_that_cannot_share_a_batch_are_refused(pair):
    engine, _, _ = pair
    if engine.batch_policy is not protocol.BatchPolicy.PADDED:
        with pytest.raises(ValueError, match="cannot share"):
            engine.emissions([clip(0, 800), clip(0, 900)])
