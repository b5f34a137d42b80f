"""A net heard in chunks: the stock net under its mask, and the same chunk by chunk from a memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCTC

import mowa
from mowa.data import audio
from mowa.models.causal import attention_interface
from mowa.models.ctc_encoder import chunk_mask, streaming
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, ChunkLayout, TrainedChunking, apply_chunk_mask
from mowa.models.ctc_encoder.cpu_plan import CpuPlan
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.models.ctc_encoder.streaming import EagerPlan
from tests.checkpoints import clip, tiny

KINDS = {
    "stable": {},
    "post-norm": {"do_stable_layer_norm": False},
    "odd kernel": {"num_conv_pos_embeddings": 15},
    "hubert": {"family": "hubert"},
    "adapters": {"adapter_attn_dim": 4},
}
SAMPLE = Path(mowa.__file__).parent / "assets" / "sample.flac"
SOUND = torch.from_numpy(audio.normalize(clip(3, 40_123)))


def net_of(folder):
    return AutoModelForCTC.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS)
def net(request, tmp_path_factory):
    how = dict(KINDS[request.param])
    return net_of(tiny(tmp_path_factory.mktemp("net"), how.pop("family", "wav2vec2"), "layer", **how))


@pytest.fixture(scope="module")
def absolute():
    """pl-tiny, in float32: its positions are absolute, and its first frame reaches further."""
    net = mowa.load("pl-tiny").net.float().eval().requires_grad_(False)
    assert precompute_absolute_positions(net)
    return net


def test_a_frame_sees_its_chunk_what_was_before_and_what_is_ahead():
    now = ChunkLayout(ChunkConfig(2, 3), 6)
    assert now.frame_index.tolist() == [0, 1, 2, 3, 4, 5]
    assert now.visible.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
    ]
    now = ChunkLayout(ChunkConfig(2, None, 1), 5)
    assert now.frame_index.tolist() == [0, 1, 2, 2, 3, 4, 4]
    assert now.is_main.int().tolist() == [1, 1, 0, 1, 1, 0, 1]
    assert now.visible.int().tolist() == [
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
    "how", [ChunkConfig(16), ChunkConfig(7, 10, 3), ChunkConfig(1, 0), ChunkConfig(4, None, 9), ChunkConfig(500)]
)
@torch.inference_mode()
def test_nothing_later_changes_a_chunk_and_padding_is_not_heard(net, kind, how):
    restore = attention_interface.install_attention(net) if kind == "mowa" else lambda: None
    if kind != "mowa":
        net.set_attn_implementation(kind)
    with apply_chunk_mask(net, how):
        whole = net(SOUND[None]).logits
        ends = (how.size * 2 + how.ahead) * 320 + 80
        part = net(SOUND[None, :ends]).logits
        padded, mask = torch.zeros(2, 50_000), torch.zeros(2, 50_000, dtype=torch.long)
        padded[0, : len(SOUND)], mask[0, : len(SOUND)] = SOUND, 1
        padded[1, :20_000], mask[1, :20_000] = SOUND[:20_000], 1
        both = net(padded, attention_mask=mask).logits
    known = min(how.size * 2, part.shape[1])
    torch.testing.assert_close(part[0, :known], whole[0, :known], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[0, : whole.shape[1]], whole[0], atol=1e-5, rtol=0)
    assert both.isfinite().all()
    restore()
    net.set_attn_implementation("sdpa")


@torch.inference_mode()
def test_afterwards_the_net_is_as_before(net):
    before, hooks = net(SOUND[None]).logits, [len(m._forward_pre_hooks) for m in net.modules()]
    with apply_chunk_mask(net, ChunkConfig(5)):
        assert not torch.equal(net(SOUND[None]).logits, before)
    with pytest.raises(KeyError), apply_chunk_mask(net, ChunkConfig(5)):
        raise KeyError
    with apply_chunk_mask(net, None):
        assert torch.equal(net(SOUND[None]).logits, before)
    assert torch.equal(net(SOUND[None]).logits, before)
    assert [len(m._forward_pre_hooks) for m in net.modules()] == hooks


def in_chunks(parts, net, sound, how):
    """`streaming.hear` over `sound`, chunk by chunk."""
    kept, far = streaming.cache_shape(net), chunk_mask.receptive_field(net.config)
    cache, low = (
        torch.zeros(kept.num_layers, 2, 0, kept.num_heads, kept.head_dim),
        torch.zeros(kept.conv_frames, kept.hidden_size),
    )
    said, position = [], 0
    for start in range(0, len(sound) - far + 1, how.size * 320):
        piece = sound[start : start + (how.size + how.ahead) * 320 + far - 320]
        logits, made, below = streaming.encode_chunk(parts, piece, position, cache, low)
        count = min(how.size, len(logits))
        cache = torch.cat([cache, made[:, :, :count].float()], 2)
        cache = cache if how.left is None else cache[:, :, max(0, cache.shape[2] - how.left) :]
        low = torch.cat([low, below[:count]])[count:]
        position += count
        said.append(logits[:count])
    return torch.cat(said)


@torch.inference_mode()
@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(1, 60),
    left=st.one_of(st.none(), st.integers(0, 90)),
    ahead=st.integers(0, 20),
    samples=st.integers(400, 40_123),
)
def law(net, size, left, ahead, samples):
    how, sound = ChunkConfig(size, left, ahead), SOUND[:samples]
    with apply_chunk_mask(net, how):
        expected = net(sound[None]).logits[0]
    for parts in (EagerPlan(net), CpuPlan(net, "float32")):
        said = in_chunks(parts, net, sound, how)
        assert said.shape == expected.shape
        torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def test_chunk_by_chunk_is_the_net_under_its_mask(net):
    law(net)


@pytest.mark.parametrize("how", [ChunkConfig(16), ChunkConfig(16, None, 8), ChunkConfig(9, 40, 5)])
@torch.inference_mode()
def test_pl_tiny_chunk_by_chunk_is_the_net_under_its_mask(absolute, how):
    """Its unlikely letters are as unlikely as e⁻³⁵, where float32 itself errs by 10⁻⁴: compared are probabilities."""
    sound = torch.from_numpy(audio.normalize(audio.load_audio(SAMPLE)[:70_001]))
    with apply_chunk_mask(absolute, how):
        expected = absolute(sound[None]).logits[0].softmax(-1)
    for parts in (EagerPlan(absolute), CpuPlan(absolute, "float32")):
        said = in_chunks(parts, absolute, sound, how).softmax(-1)
        torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def test_what_cannot_hear_in_chunks_says_why(tmp_path):
    group, other = net_of(tiny(tmp_path / "group", norm="group")), net_of(tiny(tmp_path / "wavlm", "wavlm"))
    assert "normalises over the whole recording" in chunk_mask.unsupported_reason(group)
    assert "WavLMForCTC attends in a way of its own" in chunk_mask.unsupported_reason(other)
    more = net_of(tiny(tmp_path / "more", add_adapter=True, num_adapter_layers=1, output_hidden_size=32))
    assert "last frames" in chunk_mask.unsupported_reason(more)
    with pytest.raises(ValueError, match="normalises"), apply_chunk_mask(group, ChunkConfig(4)):
        pass


def test_what_a_net_was_trained_for_stands_in_its_config(tmp_path):
    net = net_of(tiny(tmp_path / "a", streaming={"chunk_frames": [16, 32], "left_frames": None}))
    assert chunk_mask.get_trained_chunking(net.config) == TrainedChunking((16, 32))
    more = {"chunk_frames": [16], "left_frames": 100, "ahead_frames": [0, 8]}
    assert chunk_mask.get_trained_chunking(net_of(tiny(tmp_path / "c", streaming=more)).config) == TrainedChunking(
        (16,), 100, (0, 8)
    )
    assert chunk_mask.get_trained_chunking(net_of(tiny(tmp_path / "b")).config) is None


def test_training_goes_through_the_mask(net):
    """Gradients of one chunk's frames reach no later sound."""
    values = SOUND[None, :20_000].clone().requires_grad_()
    with apply_chunk_mask(net, ChunkConfig(8)):
        net(values).logits[0, :8].sum().backward()
    reached = values.grad[0].abs().nonzero().max()
    assert 8 * 320 - 1 <= reached < 8 * 320 + 80
    assert np.isfinite(values.grad.numpy()).all()
