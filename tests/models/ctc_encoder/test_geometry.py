"""Frames of samples and samples of frames are inverse, with and without a convolutional adapter."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mowa.models.ctc_encoder.geometry import FrameGeometry


@given(st.integers(1, 5_000), st.lists(st.integers(1, 3), max_size=3))
def test_samples_of_frames_are_the_fewest_that_give_them(frames, adapter_strides):
    geometry = FrameGeometry((5, 10, 320), 400, tuple(adapter_strides))
    samples = geometry.num_samples(frames)
    assert geometry.num_frames(samples) == frames == geometry.num_frames(samples - 1) + 1
    assert geometry.num_samples(torch.tensor([frames])).tolist() == [samples]
    features = geometry.num_feature_samples(frames)
    assert geometry.num_features(features) == frames == geometry.num_features(features - 1) + 1
