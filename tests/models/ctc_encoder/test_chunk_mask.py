"""Chunked attention: the stock net under its mask, and the same chunk by chunk from caches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCTC

import mowa
from mowa.data import audio
from mowa.errors import ModelError
from mowa.models.causal import attention_interface
from mowa.models.ctc_encoder import chunk_mask, streaming
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, ChunkLayout, TrainedChunking, apply_chunk_mask
from mowa.models.ctc_encoder.cpu_plan import CpuPlan
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.models.ctc_encoder.streaming import EagerPlan
from tests.checkpoints import clip, tiny

KINDS = {
    "stable": {},
    "post-norm": {"do_stable_layer_norm": False},
    "odd kernel": {"num_conv_pos_embeddings": 15},
    "hubert": {"family": "hubert"},
    "adapters": {"adapter_attn_dim": 4},
    "unispeech-sat": {"family": "unispeech-sat"},
    "data2vec": {"family": "data2vec-audio"},
    "data2vec even kernel": {"family": "data2vec-audio", "conv_pos_kernel_size": 6},
}
SAMPLE = Path(mowa.__file__).parent / "assets" / "sample.flac"
CLIP = torch.from_numpy(audio.normalize(clip(3, 40_123)))


def net_of(folder):
    return AutoModelForCTC.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS)
def net(request, tmp_path_factory):
    changes = dict(KINDS[request.param])
    return net_of(tiny(tmp_path_factory.mktemp("net"), changes.pop("family", "wav2vec2"), "layer", **changes))


@pytest.fixture(scope="module")
def absolute():
    """pl-tiny in float32, which has absolute positions and a longer receptive field."""
    net = mowa.load("pl-tiny").net.float().eval().requires_grad_(False)
    assert precompute_absolute_positions(net)
    return net


def test_layout_and_visibility():
    layout = ChunkLayout(ChunkConfig(2, 3), 6)
    assert layout.frame_index.tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.visible.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
    ]
    layout = ChunkLayout(ChunkConfig(2, None, 1), 5)
    assert layout.frame_index.tolist() == [0, 1, 2, 2, 3, 4, 4]
    assert layout.is_main.int().tolist() == [1, 1, 0, 1, 1, 0, 1]
    assert layout.visible.int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 1, 0],
        [1, 1, 0, 1, 1, 1, 0],
        [1, 1, 0, 1, 1, 1, 0],
        [1, 1, 0, 1, 1, 0, 1],
    ]
    assert ChunkLayout(ChunkConfig(1, 0), 3).visible.equal(torch.eye(3, dtype=torch.bool))
    assert not len(ChunkLayout(ChunkConfig(4, 2, 1), 0).frame_index)


@pytest.mark.parametrize("kind", ["sdpa", "eager", "mowa"])
@pytest.mark.parametrize(
    "config", [ChunkConfig(16), ChunkConfig(7, 10, 3), ChunkConfig(1, 0), ChunkConfig(4, None, 9), ChunkConfig(500)]
)
@torch.inference_mode()
def test_chunks_do_not_depend_on_later_audio_or_padding(net, kind, config):
    restore = attention_interface.install_attention(net) if kind == "mowa" else lambda: None
    if kind != "mowa":
        net.set_attn_implementation(kind)
    with apply_chunk_mask(net, config):
        whole = net(CLIP[None]).logits
        ends = (config.size * 2 + config.lookahead) * 320 + 80
        part = net(CLIP[None, :ends]).logits
        padded, mask = torch.zeros(2, 50_000), torch.zeros(2, 50_000, dtype=torch.long)
        padded[0, : len(CLIP)], mask[0, : len(CLIP)] = CLIP, 1
        padded[1, :20_000], mask[1, :20_000] = CLIP[:20_000], 1
        both = net(padded, attention_mask=mask).logits
    known = min(config.size * 2, part.shape[1])
    torch.testing.assert_close(part[0, :known], whole[0, :known], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[0, : whole.shape[1]], whole[0], atol=1e-5, rtol=0)
    assert both.isfinite().all()
    restore()
    net.set_attn_implementation("sdpa")


@torch.inference_mode()
def test_the_net_is_restored(net):
    before, hooks = net(CLIP[None]).logits, [len(m._forward_pre_hooks) for m in net.modules()]
    with apply_chunk_mask(net, ChunkConfig(5)):
        assert not torch.equal(net(CLIP[None]).logits, before)
    with pytest.raises(KeyError), apply_chunk_mask(net, ChunkConfig(5)):
        raise KeyError
    with apply_chunk_mask(net, None):
        assert torch.equal(net(CLIP[None]).logits, before)
    assert torch.equal(net(CLIP[None]).logits, before)
    assert [len(m._forward_pre_hooks) for m in net.modules()] == hooks


def in_chunks(plan, net, clip, config):
    """`encode_chunk` over `clip`, chunk by chunk."""
    shape, field = streaming.cache_shape(net), frame_geometry(net.config).receptive_field
    kv_cache = torch.zeros(shape.num_layers, 2, 0, shape.num_heads, shape.head_dim)
    conv_cache = torch.zeros(shape.conv_frames, shape.conv_size)
    out, position = [], 0
    for start in range(0, len(clip) - field + 1, config.size * 320):
        samples = clip[start : start + (config.size + config.lookahead) * 320 + field - 320]
        logits, new_kv, new_conv = streaming.encode_chunk(plan, samples, position, kv_cache, conv_cache)
        count = min(config.size, len(logits))
        kv_cache = torch.cat([kv_cache, new_kv[:, :, :count].float()], 2)
        if config.left_context is not None:
            kv_cache = kv_cache[:, :, max(0, kv_cache.shape[2] - config.left_context) :]
        conv_cache = torch.cat([conv_cache, new_conv[:count]])[count:]
        position += count
        out.append(logits[:count])
    return torch.cat(out)


@torch.inference_mode()
@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(1, 60),
    left=st.one_of(st.none(), st.integers(0, 90)),
    ahead=st.integers(0, 20),
    samples=st.integers(400, 40_123),
)
def law(net, size, left, ahead, samples):
    config, clip = ChunkConfig(size, left, ahead), CLIP[:samples]
    with apply_chunk_mask(net, config):
        expected = net(clip[None]).logits[0]
    for plan in (EagerPlan(net), CpuPlan(net, "float32")):
        logits = in_chunks(plan, net, clip, config)
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_chunk_by_chunk_equals_the_masked_net(net):
    law(net)


@pytest.mark.parametrize("config", [ChunkConfig(16), ChunkConfig(16, None, 8), ChunkConfig(9, 40, 5)])
@torch.inference_mode()
def test_pl_tiny_chunk_by_chunk_equals_the_masked_net(absolute, config):
    """Compares probabilities: log-probabilities go down to -35, where float32 itself is off by 1e-4."""
    clip = torch.from_numpy(audio.normalize(audio.load_audio(SAMPLE)[:70_001]))
    with apply_chunk_mask(absolute, config):
        expected = absolute(clip[None]).logits[0].softmax(-1)
    for plan in (EagerPlan(absolute), CpuPlan(absolute, "float32")):
        probabilities = in_chunks(plan, absolute, clip, config).softmax(-1)
        torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)


def test_unsupported_nets(tmp_path):
    group, other = net_of(tiny(tmp_path / "group", norm="group")), net_of(tiny(tmp_path / "wavlm", "wavlm"))
    assert "normalizes over the whole recording" in chunk_mask.unsupported_reason(group)
    assert "has an attention of its own" in chunk_mask.unsupported_reason(other)
    more = net_of(tiny(tmp_path / "more", add_adapter=True, num_adapter_layers=1, output_hidden_size=32))
    assert "convolutional adapter" in chunk_mask.unsupported_reason(more)
    with pytest.raises(ValueError, match="normalizes"), apply_chunk_mask(group, ChunkConfig(4)):
        pass


def test_trained_chunking_is_read_from_the_config(tmp_path):
    net = net_of(tiny(tmp_path / "a", streaming={"chunk_frames": [16, 32], "left_context_frames": None}))
    assert chunk_mask.get_trained_chunking(net.config) == TrainedChunking((16, 32))
    more = {"chunk_frames": [16], "left_context_frames": 100, "lookahead_frames": [0, 8]}
    assert chunk_mask.get_trained_chunking(net_of(tiny(tmp_path / "c", streaming=more)).config) == TrainedChunking(
        (16,), 100, (0, 8)
    )
    assert chunk_mask.get_trained_chunking(net_of(tiny(tmp_path / "b")).config) is None


def test_gradients_of_a_chunk_do_not_reach_later_audio(net):
    values = CLIP[None, :20_000].clone().requires_grad_()
    with apply_chunk_mask(net, ChunkConfig(8)):
        net(values).logits[0, :8].sum().backward()
    reached = values.grad[0].abs().nonzero().max()
    assert 8 * 320 - 1 <= reached < 8 * 320 + 80
    assert np.isfinite(values.grad.numpy()).all()


def test_streaming_settings_of_an_older_version_are_refused():
    config = AutoConfig.for_model("wav2vec2", streaming={"chunk_frames": [16], "left_frames": 8, "ahead_frames": [4]})
    with pytest.raises(ModelError, match=r"ahead_frames, written by an older version .*; train the"):
        chunk_mask.get_trained_chunking(config)
