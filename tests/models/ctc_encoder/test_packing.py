"""Packed recordings compared with the stock net on each recording alone."""

import numpy as np
import pytest
import torch
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    HubertConfig,
    HubertForCTC,
    UniSpeechSatConfig,
    UniSpeechSatForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from mowa.errors import ModelError
from mowa.models.ctc_encoder import packing
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.tasks import ctc
from mowa.training.gradient_checkpointing import set_gradient_checkpointing

SMALL = {
    "vocab_size": 12,
    "pad_token_id": 0,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.05,
    "apply_spec_augment": False,
}
KINDS = {
    "stable": (Wav2Vec2ForCTC, Wav2Vec2Config, {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "base": (Wav2Vec2ForCTC, Wav2Vec2Config, {"do_stable_layer_norm": False, "feat_extract_norm": "group"}),
    "odd kernel": (Wav2Vec2ForCTC, Wav2Vec2Config, {"num_conv_pos_embeddings": 15, "feat_extract_norm": "layer"}),
    "long kernel": (
        Wav2Vec2ForCTC,
        Wav2Vec2Config,
        {"num_conv_pos_embeddings": 3000, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    ),
    "hubert": (HubertForCTC, HubertConfig, {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "unispeech-sat": (UniSpeechSatForCTC, UniSpeechSatConfig, {"do_stable_layer_norm": True}),
    "data2vec": (
        Data2VecAudioForCTC,
        Data2VecAudioConfig,
        {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 9},
    ),
    "data2vec even kernel": (
        Data2VecAudioForCTC,
        Data2VecAudioConfig,
        {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 6},
    ),
}
LENGTHS = (1000, 31, 4097, 777)


@pytest.fixture(params=KINDS, scope="module")
def net(request):
    kind, config, settings = KINDS[request.param]
    torch.manual_seed(0)
    return kind(config(**(SMALL | settings))).double()


def sounds(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(n).astype(np.float32) for n in lengths]


def laid(net, clips, grid=1):
    row = packing.pack_samples(clips, frame_geometry(net.config), pad_to_multiple_of=grid)
    lengths = [len(clip) for clip in clips]
    return (
        torch.from_numpy(row)[None].double(),
        lengths,
        [frame_geometry(net.config).num_frames(n) for n in lengths],
    )


def alone(net, clip):
    return net(torch.from_numpy(clip)[None].double()).logits[0]


@pytest.mark.parametrize("grid", [1, 1600])
def test_each_recording_is_computed_as_if_alone(net, grid):
    net.eval()
    clips = sounds()
    values, lengths, counts = laid(net, clips, grid)
    with torch.no_grad(), packing.packed_attention(net):
        logits = packing.forward_packed(net, values, lengths)[0]
        for row, count, clip in zip(logits, counts, clips, strict=True):
            expected = alone(net, clip)
            assert len(expected) == count
            torch.testing.assert_close(row[:count], expected, rtol=1e-9, atol=1e-9)
            assert not row[count:].any()


def test_a_frozen_front_end_computes_the_same_in_chunks(net, monkeypatch):
    monkeypatch.setattr(packing, "FRONT_END_CHUNK_FRAMES", 7)
    clips = sounds()
    values, lengths, _ = laid(net, clips)
    front = net.base_model.feature_extractor
    with packing.packed_attention(net.eval()):
        whole = packing.forward_packed(net, values, lengths)[0]
        front.requires_grad_(False)
        pieces = packing.forward_packed(net, values, lengths)[0]
        front.requires_grad_(True)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


def test_loss_and_gradients_equal_those_of_single_recordings(net):
    net.train()
    clips = sounds((1500, 900, 2000))
    labels = torch.tensor([[1, 2, 3, 3], [4, 5, -100, -100], [6, 7, 8, -100]])
    values, lengths, counts = laid(net, clips)
    with packing.packed_attention(net):
        packed = ctc.ctc_losses(packing.forward_packed(net, values, lengths)[0], torch.tensor(counts), labels, 0)
    single = torch.stack(
        [
            ctc.ctc_losses(alone(net, clip)[None], torch.tensor([count]), row[None], 0)[0]
            for clip, count, row in zip(clips, counts, labels, strict=True)
        ]
    )
    torch.testing.assert_close(packed, single, rtol=1e-4, atol=0)  # losses are float32
    ours, theirs = gradients(net, packed.sum()), gradients(net, single.sum())
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-9, name


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None and n != "masked_spec_embed"}


def test_forward_padded_is_the_stock_net():
    kind, config, settings = KINDS["stable"]
    torch.manual_seed(0)
    net = kind(config(**(SMALL | settings))).double().eval()
    batch = ctc.collate(sounds(), [[]] * len(LENGTHS), packing_preprocessing())
    counts = [frame_geometry(net.config).num_frames(n) for n in LENGTHS]
    with torch.no_grad():
        ours = packing.forward_padded(net, batch["input_values"].double(), LENGTHS, use_attention_mask=True)
        theirs = net(batch["input_values"].double(), attention_mask=batch["attention_mask"]).logits
    for a, b, count in zip(ours, theirs, counts, strict=True):
        torch.testing.assert_close(a[:count], b[:count])


def test_forward_padded_applies_a_convolutional_adapter():
    kind, config, settings = KINDS["stable"]
    torch.manual_seed(0)
    more = {"add_adapter": True, "num_adapter_layers": 2, "adapter_stride": 2, "output_hidden_size": 32}
    net = kind(config(**(SMALL | settings | more))).double().eval()
    values = torch.from_numpy(sounds((4097,))[0])[None].double()
    with torch.no_grad():
        ours = packing.forward_padded(net, values, [4097], use_attention_mask=True)
        theirs = net(values).logits
    assert ours.shape[1] == frame_geometry(net.config).num_frames(4097)
    torch.testing.assert_close(ours, theirs)


def packing_preprocessing():
    from mowa.types import Preprocessing

    return Preprocessing()


def test_spec_augment_masks_are_the_same_in_both_layouts():
    kind, config, settings = KINDS["stable"]
    torch.manual_seed(0)
    net = kind(config(**(SMALL | settings))).double().eval()
    clips = sounds()
    values, lengths, counts = laid(net, clips)
    rng = np.random.default_rng(1)
    time = torch.from_numpy(rng.random(sum(counts)) < 0.3)
    features = torch.from_numpy(rng.random((len(clips), 32)) < 0.2)
    batch = ctc.collate(clips, [[]] * len(clips), packing_preprocessing())
    masks = {"mask_time_indices": time, "mask_feature_indices": features}
    with torch.no_grad(), packing.packed_attention(net):
        packed = packing.forward_packed(net, values, lengths, **masks)[0]
        padded = packing.forward_padded(net, batch["input_values"].double(), LENGTHS, use_attention_mask=True, **masks)
        plain = packing.forward_packed(net, values, lengths)[0]
    for a, b, c, count in zip(packed, padded, plain, counts, strict=True):
        torch.testing.assert_close(a[:count], b[:count])
        assert not torch.allclose(a[:count], c[:count])


def test_gradient_checkpointing(net):
    net.train()
    values, lengths, _ = laid(net, sounds())
    with packing.packed_attention(net):
        plain = gradients(net, packing.forward_packed(net, values, lengths)[0].square().sum())
        set_gradient_checkpointing(net)
        again = gradients(net, packing.forward_packed(net, values, lengths)[0].square().sum())
        set_gradient_checkpointing(net, False)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_packed_attention_is_undone(net):
    before = net.config._attn_implementation
    with packing.packed_attention(net):
        assert net.config._attn_implementation == packing.ATTN_IMPLEMENTATION
    assert net.config._attn_implementation == before


@pytest.mark.parametrize("samples", [0, 1, 24, 25, 26, 400, 16000, 16001])
def test_num_frames_equals_transformers(net, samples):
    expected = int(net._get_feat_extract_output_lengths(torch.tensor(samples)))
    assert frame_geometry(net.config).num_frames(samples) == max(0, expected)


def test_a_recording_without_a_frame_is_refused(net):
    with pytest.raises(ModelError, match="5 samples, less than one frame"):
        packing.pack_samples(sounds((1000, 5)), frame_geometry(net.config))


def test_unsupported_nets():
    def reason(kind, config, **settings):
        return packing.unsupported_reason(kind(config(**(SMALL | settings))))

    assert "has an attention of its own" in reason(WavLMForCTC, WavLMConfig)
    assert "neighboring frames" in reason(Wav2Vec2ForCTC, Wav2Vec2Config, add_adapter=True, num_adapter_layers=1)
    assert "batch norm" in reason(HubertForCTC, HubertConfig, conv_pos_batch_norm=True)
    assert not reason(Wav2Vec2ForCTC, Wav2Vec2Config)
    assert "Linear is not supported, only Data2VecAudioForCTC" in packing.unsupported_reason(torch.nn.Linear(1, 1))
