"""Tiny random checkpoints with the files of a Hub repository, and noise as their input."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    HubertConfig,
    HubertForCTC,
    UniSpeechSatConfig,
    UniSpeechSatForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

# Two convolutions instead of seven, for tests of names, shapes and files.
SMALLEST = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"aąbcdeęłoó"]
CLASSES = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2ForCTC),
    "hubert": (HubertConfig, HubertForCTC),
    "wavlm": (WavLMConfig, WavLMForCTC),
    "unispeech-sat": (UniSpeechSatConfig, UniSpeechSatForCTC),
    "data2vec-audio": (Data2VecAudioConfig, Data2VecAudioForCTC),
}
# Every family with both front ends: layer norm with pre-norm blocks, group norm with post-norm blocks. data2vec has one
# net, with layer norm and post-norm blocks, and ignores these keys of its config.
KINDS = [(family, norm) for family in CLASSES for norm in ("layer", "group")][:-1]
DATA2VEC_POSITIONS = {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 9}  # a stack of three convolutions


def tiny(folder: Path, family: str = "wav2vec2", norm: str = "layer", **changes: object) -> Path:
    """Save a random two-layer net with vocabulary and audio settings into `folder`, and return it."""
    config_class, net_class = CLASSES[family]
    torch.manual_seed(7)
    settings = {
        "vocab_size": len(TOKENS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer",
        "conv_bias": norm == "layer", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    settings |= DATA2VEC_POSITIONS if family == "data2vec-audio" else {}
    net = net_class(config_class(**settings | changes)).eval()
    with torch.no_grad():  # else a random head predicts nearly always the same token
        net.lm_head.weight.mul_(8)
    net.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer").save_pretrained(folder)
    return folder


def clip(seed: int, samples: int) -> np.ndarray:
    """Return noise of varying loudness and frequency, so that frames differ: float32 [samples]."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(samples).astype(np.float32)
    steps = max(2, samples // 1600)
    loudness = np.interp(np.arange(samples), np.linspace(0, samples, steps), rng.uniform(0.01, 0.3, steps))
    tone = np.sin(
        np.cumsum(np.interp(np.arange(samples), np.linspace(0, samples, steps), rng.uniform(0.02, 1.2, steps)))
    )
    return ((noise * 0.3 + tone) * loudness).astype(np.float32)


def corpus(folder: Path, count: int) -> str:
    """Write `count` clips of noise, 0.4 s and longer, with short texts, and return the path of their manifest."""
    folder.mkdir(exist_ok=True)
    rows = []
    for index in range(count):
        samples = 6_000 + 400 * index
        soundfile.write(folder / f"{index}.wav", clip(index, samples), 16_000)
        text = "ala ma kota"[: 3 + index % 8].strip()
        rows.append({"id": str(index), "audio": f"{index}.wav", "text": text, "duration_s": samples / 16_000})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl")
