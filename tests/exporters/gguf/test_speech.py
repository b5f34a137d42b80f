"""A CTC model goes to GGUF and back: net, vocabulary and audio settings from the file alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mowa
from mowa.adapters import bottleneck, lora
from mowa.errors import DataError, ModelError
from mowa.exporters.gguf.speech import choose_speech_types, to_gguf_ctc
from mowa.families import get_family
from mowa.io.gguf import TensorInfo, open_writer, read_gguf
from mowa.io.hub import SAMPLE_CLIP
from mowa.kernels.quant.gguf_blocks import encode
from mowa.loading import ctc, gguf_ctc
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.chunk_mask import get_trained_chunking
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from tests.checkpoints import CLASSES, KINDS, clip, tiny

MAX_ERROR = 1e-5  # of logits


def write(model, path, scheme="f32", *, change=lambda metadata, tensors: None):
    """Write a model as the exporter does, after `change` of metadata and tensors."""
    metadata, tensors = to_gguf_ctc(model)
    change(metadata, tensors)
    types = choose_speech_types({name: tensor.shape for name, tensor in tensors.items()}, scheme)
    infos = {name: TensorInfo(tensor.shape, types[name]) for name, tensor in tensors.items()}
    with open_writer(path, metadata, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, encode(tensor.load().contiguous(), types[name]).numpy())
    return path


def logits(model, seed=3):
    """Return logits, float32 [T, V], and those of a second recording padded to the first."""
    samples = torch.from_numpy(np.stack([clip(seed, 8_000), clip(seed + 1, 8_000)]))
    with torch.inference_mode():
        return model.net(samples.to(model.net.dtype)).logits.float()


def assert_round_trip(model, path):
    """Write and read a model in f32 and compare everything."""
    loaded = gguf_ctc.load(write(model, path))
    assert (loaded.vocabulary, loaded.preprocessing) == (model.vocabulary, model.preprocessing)
    assert loaded.family == model.family
    difference = (logits(loaded) - logits(model)).abs().max()
    assert difference < MAX_ERROR, difference
    return loaded


def relevant(config):
    """Return a config without what says where it came from."""
    ignored = ("_name_or_path", "architectures", "dtype", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in ignored}


@pytest.mark.parametrize(("family", "norm"), KINDS)
def test_every_family(family, norm, tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint", family, norm)))
    loaded = assert_round_trip(model, tmp_path / "model.gguf")
    assert type(loaded.net) is type(model.net)
    assert not loaded.net.training
    assert relevant(loaded.net.config) == relevant(model.net.config)


def test_all_registered_speech_families_are_tested():
    assert {family.name for family in mowa.families.list_families() if family.task == "ctc"} == set(CLASSES)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("wav2vec2", {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 24}),
        ("wav2vec2", {"adapter_attn_dim": 8}),
        ("wav2vec2", {"hidden_act": "relu", "feat_extract_activation": "gelu_new", "layer_norm_eps": 1e-3}),
        ("hubert", {"conv_pos_batch_norm": True}),
        ("hubert", {"feat_proj_layer_norm": False}),
        ("wavlm", {"num_buckets": 16, "max_bucket_distance": 40}),
        ("data2vec-audio", {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}),
    ],
)
def test_variants(family, changes, tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint", family, **changes)))
    loaded = assert_round_trip(model, tmp_path / "model.gguf")
    assert relevant(loaded.net.config) == relevant(model.net.config)


def test_metadata_and_names(tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint")))
    model = replace(model, origin=replace(model.origin, name="someone/tiny", license="mit", target_lang="pol"))
    metadata, tensors = to_gguf_ctc(model)
    expected = {
        "general.architecture": "wav2vec2-ctc",
        "general.name": "tiny",
        "general.license": "mit",
        "general.languages": ["pol"],
        "wav2vec2-ctc.model_type": "wav2vec2",
        "wav2vec2-ctc.block_count": 2,
        "wav2vec2-ctc.attention.norm_first": True,
        "wav2vec2-ctc.conv.norm": "layer",
        "wav2vec2-ctc.position.kernel_size": 16,
        "wav2vec2-ctc.audio.sample_rate": 16_000,
        "wav2vec2-ctc.audio.normalize": True,
        "tokenizer.ggml.model": "ctc",
        "tokenizer.ggml.tokens": list(model.vocabulary.tokens),
        "tokenizer.ctc.texts": list(model.vocabulary.texts),
        "tokenizer.ctc.blank_token_id": 0,
        "tokenizer.ctc.delimiter_token_id": 4,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["wav2vec2-ctc.conv.channels"].tolist() == [16] * 7
    assert metadata["tokenizer.ctc.special_token_ids"].tolist() == [1, 2, 3]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["conv.6.weight"] == (16, 16, 2)
    assert shapes["pos_conv.weight"] == (32, 8, 16)
    assert shapes["blk.1.ffn_up.weight"] == (64, 32)
    assert {"conv.0.norm.bias", "proj.weight", "proj_norm.bias", "enc_norm.weight", "output.bias"} <= set(shapes)
    assert max(map(len, tensors)) < 64


def test_vocabulary_of_phonemes(tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint")))
    vocabulary = replace(model.vocabulary, delimiter=None, separator=" ", specials=frozenset(), lower_case=True)
    model = replace(model, processor=replace(model.processor, vocabulary=vocabulary))
    assert_round_trip(model, tmp_path / "model.gguf")


def test_adapters_are_merged_or_kept(tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint")))
    lora.add(model.net, get_family("wav2vec2"), rank=4, alpha=8)
    with torch.no_grad():
        for name, weight in model.net.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    assert_round_trip(model, tmp_path / "lora.gguf")
    model = ctc.load(str(tmp_path / "checkpoint"))
    bottleneck.add(model.net, get_family("wav2vec2"), 8)
    with torch.no_grad():
        for block in model.net.base_model.encoder.layers:
            block.adapter_layer.linear_2.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert_round_trip(model, tmp_path / "bottleneck.gguf")


def test_streaming_settings(tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint")))
    model.net.config.streaming = {"chunk_frames": [8, 16], "left_context_frames": None, "lookahead_frames": [0, 4]}
    loaded = assert_round_trip(model, tmp_path / "model.gguf")
    assert loaded.net.config.streaming == model.net.config.streaming
    assert get_trained_chunking(loaded.net.config) == get_trained_chunking(model.net.config)


def test_half_precision(tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint")))
    loaded = gguf_ctc.load(write(model, tmp_path / "model.gguf"), dtype="bfloat16")
    assert {weight.dtype for weight in loaded.net.parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def pl_tiny():
    return mowa.load("pl-tiny")


@pytest.mark.parametrize("scheme", ["f32", "f16", "q8_0"])
def test_the_bundled_model_transcribes_the_bundled_sample(scheme, pl_tiny, tmp_path):
    path = write(pl_tiny, tmp_path / "model.gguf", scheme)
    loaded = gguf_ctc.load(path)
    assert relevant(loaded.net.config) == relevant(pl_tiny.net.config)
    assert precompute_absolute_positions(loaded.net)
    text = mowa.transcribe(SAMPLE_CLIP, loaded).text
    assert text == mowa.transcribe(SAMPLE_CLIP, pl_tiny).text
    assert text.startswith("dzień dobry to jest mowa")


def test_absolute_positions_are_those_of_the_model(pl_tiny, tmp_path):
    loaded = gguf_ctc.load(write(pl_tiny, tmp_path / "model.gguf"))
    tables = []
    for net in (pl_tiny.net, loaded.net):
        precompute_absolute_positions(net)
        tables.append(read_anatomy(net).absolute_positions.table)
    assert torch.allclose(*tables, atol=1e-5)


def test_types(pl_tiny):
    shapes = {name: tensor.shape for name, tensor in to_gguf_ctc(pl_tiny)[1].items()}
    types = choose_speech_types(shapes, "q4_k_m")
    assert types["blk.0.attn_q.weight"] == types["blk.5.ffn_down.weight"] == "q4_k"
    assert types["conv.1.weight"] == types["pos_conv.weight"] == types["output.weight"] == types["proj.weight"] == "f16"
    assert types["blk.0.attn_norm.weight"] == types["output.bias"] == "f32"
    assert set(choose_speech_types(shapes, "f32").values()) == {"f32"}
    small = {"blk.0.ffn_up.weight": (1536, 384), "blk.0.ffn_down.weight": (384, 40), "blk.0.attn_k.bias": (384,)}
    assert list(choose_speech_types(small, "q4_k_m").values()) == ["q5_0", "f16", "f32"]
    assert list(choose_speech_types(small, "bf16").values()) == ["bf16", "bf16", "f32"]
    with pytest.raises(ModelError, match="unknown GGUF scheme 'int8'"):
        choose_speech_types(shapes, "int8")


def test_relative_positions_are_not_quantized(tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint", "wavlm")))
    shapes = {name: tensor.shape for name, tensor in to_gguf_ctc(model)[1].items()}
    types = choose_speech_types(shapes, "q8_0")
    assert types["blk.0.attn_rel_attn_embed.weight"] == "f16"
    assert types["blk.0.attn_q.weight"] == "q8_0"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda metadata, _: metadata.update({"general.architecture": "llama"}), "holds a llama model"),
        (lambda metadata, _: metadata.pop("wav2vec2-ctc.audio.normalize"), "no metadata wav2vec2-ctc.audio.normalize"),
        (lambda metadata, _: metadata.update({"wav2vec2-ctc.model_type": "nonsense"}), "describes no nonsense model"),
        (lambda metadata, _: metadata.update({"wav2vec2-ctc.model_type": "llama"}), "llama"),
        (lambda metadata, _: metadata.update({"wav2vec2-ctc.block_count": 3}), "no tensor blk.2.attn_k.bias"),
        (lambda metadata, _: metadata.update({"wav2vec2-ctc.block_count": 1}), "has the tensor blk.1"),
        (lambda metadata, _: metadata.update({"wav2vec2-ctc.block_count": 2**31}), "describes 2147483648 layers"),
        (lambda metadata, _: metadata.update({"wav2vec2-ctc.feed_forward_length": 32}), r"requires \[32"),
        (
            lambda metadata, _: metadata.update({"wav2vec2-ctc.embedding_length": 33}),
            "describes no wav2vec2 model|requires",
        ),
        (lambda metadata, _: metadata.update({"wav2vec2-ctc.activation": "nonsense"}), "nonsense"),
        (lambda metadata, _: metadata["tokenizer.ggml.tokens"].append("x"), "16 tokens, and its head has 15"),
        (lambda metadata, _: metadata.update({"tokenizer.ctc.blank_token_id": 99}), "no token 99"),
        (lambda _, tensors: tensors.pop("output.bias"), "no tensor output.bias"),
    ],
)
def test_files_that_do_not_fit_are_errors(change, problem, tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint")))
    path = write(model, tmp_path / "model.gguf", change=change)
    with pytest.raises(ModelError, match=problem):
        gguf_ctc.load(path)


def test_damaged_files(tmp_path):
    model = ctc.load(str(tiny(tmp_path / "checkpoint")))
    path = write(model, tmp_path / "model.gguf")
    assert gguf_ctc.is_ctc_file(read_gguf(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError):
        gguf_ctc.load(path)
