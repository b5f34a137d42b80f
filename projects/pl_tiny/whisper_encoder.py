"""A frozen Whisper encoder in PyTorch, and the copy of its blocks into a wav2vec2 encoder.

Whisper's encoder block (pre-norm attention, pre-norm GELU feed-forward; Radford et al. 2022, arXiv:2212.04356) is that
of `Wav2Vec2EncoderStableLayerNorm`, so blocks and final norm are copied exactly. The inputs differ: Whisper has log-mel
frames, two convolutions and sinusoidal positions; wav2vec2 has convolutions on the waveform (`front_end`) and a
positional convolution (`write_positions`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.audio_utils import mel_filter_bank

from mowa.errors import ModelError, RecipeError

RATE_HZ, HOP_LENGTH, N_FFT, N_MELS = 16_000, 160, 400, 80
FRAME_SAMPLES = 2 * HOP_LENGTH  # samples per frame of the encoder
INPUT_RMS = 0.06  # RMS of the samples given to the teacher: that of ordinary speech
LOG_MEL_MAX = 0.9  # maximal log10 mel energy at that RMS; Whisper clips at 8 below a recording's own maximum
Arrays = Mapping[str, np.ndarray]


class WhisperEncoder(nn.Module):
    """A frozen Whisper encoder: `hidden_size` features per frame, for at most `len(positions)` frames."""

    mel_filters: Tensor
    window: Tensor
    positions: Tensor

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        sizes = encoder_sizes(arrays)
        self.hidden_size = sizes["hidden_size"]
        filters = mel_filter_bank(N_FFT // 2 + 1, N_MELS, 0.0, RATE_HZ / 2, RATE_HZ, "slaney", "slaney")
        self.register_buffer("mel_filters", torch.from_numpy(filters.astype(np.float32)))
        self.register_buffer("window", torch.hann_window(N_FFT))
        self.register_buffer("positions", _tensor(arrays, "position_encodings/encodings"))
        self.conv1 = nn.Conv1d(N_MELS, self.hidden_size, 3, padding=1)
        self.conv2 = nn.Conv1d(self.hidden_size, self.hidden_size, 3, stride=2, padding=1)
        for name in ("conv1", "conv2"):
            getattr(self, name).load_state_dict(
                {part: _tensor(arrays, f"{name}/{part}") for part in ("weight", "bias")}
            )
        config = AutoConfig.for_model("wav2vec2", **sizes, do_stable_layer_norm=True, attn_implementation="sdpa")
        self.blocks = AutoModel.from_config(config).encoder
        copy_blocks(arrays, self.blocks)
        del self.blocks.pos_conv_embed
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> WhisperEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    def log_mel(self, samples: Tensor, log_max: float | None = None) -> Tensor:
        """Return Whisper's log-mel features [B, 80, N / 160] of samples [B, N].

        `log_max` replaces the maximum of each recording, from which the clipping threshold follows.
        """
        spectrum = torch.stft(samples.float(), N_FFT, HOP_LENGTH, window=self.window, center=True, return_complex=True)
        power = spectrum[..., :-1].abs().square()
        log = torch.log10((power.transpose(1, 2) @ self.mel_filters).clamp(min=1e-10))
        top = log.amax((1, 2), keepdim=True) if log_max is None else torch.full_like(log[:, :1, :1], log_max)
        return ((torch.maximum(log, top - 8) + 4) / 4).transpose(1, 2)

    def embed(self, mel: Tensor) -> Tensor:
        """Return frames [B, T, D] of log-mel features [B, 80, 2T], before positions are added."""
        frames: Tensor = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        return frames

    def encode(self, frames: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the output [B, T, D] of each block for frames [B, T, D]; the last one is normalized.

        `mask` bool [B, T] is true for frames that may be attended to.
        """
        return self.encode_from(0, frames + self.positions[: frames.shape[1]], mask)

    def encode_from(self, start: int, state: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the output [B, T, D] of the blocks from `start` on, given the output [B, T, D] of the block before."""
        attention_mask = None if mask is None else mask[:, None, None, :]
        states = []
        for block in self.blocks.layers[start:]:
            out = block(state, attention_mask=attention_mask)
            state = out[0] if isinstance(out, tuple) else out  # transformers 5.17 returns a tuple
            states.append(state)
        states[-1] = self.blocks.layer_norm(state)
        return tuple(states)


def encoder_sizes(arrays: Arrays) -> dict[str, int]:
    """Return the sizes of the encoder in `arrays` as keys of a wav2vec2 config. Raise ModelError if there is none."""
    try:
        layers = {int(found[1]) for name in arrays if (found := re.match(r"encoder/layer_(\d+)/", name))}
        inner, hidden = arrays["encoder/layer_0/ffn/linear_0/weight"].shape
        heads = int(arrays["encoder/num_heads"])
    except (KeyError, ValueError) as error:
        raise ModelError(f"the teacher is not a Whisper encoder: {error} is missing") from None
    return {
        "num_hidden_layers": len(layers),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }


def copy_blocks(arrays: Arrays, encoder: nn.Module) -> None:
    """Copy Whisper's blocks and final norm into a `Wav2Vec2EncoderStableLayerNorm` of the same sizes.

    `linear_0` of Whisper's attention is query, key and value stacked; its key bias is zero. Raise RecipeError if the
    sizes or the kind of block differ.
    """
    state = {}
    sizes = encoder_sizes(arrays)
    for layer in range(sizes["num_hidden_layers"]):
        target, source = f"layers.{layer}", f"layer_{layer}"
        for part in ("weight", "bias"):
            fused = _tensor(arrays, f"{source}/self_attention/linear_0/{part}").chunk(3)
            for name, value in zip("qkv", fused, strict=True):
                state[f"{target}.attention.{name}_proj.{part}"] = value
            for ours, theirs in (
                ("attention.out_proj", "self_attention/linear_1"),
                ("feed_forward.intermediate_dense", "ffn/linear_0"),
                ("feed_forward.output_dense", "ffn/linear_1"),
            ):
                state[f"{target}.{ours}.{part}"] = _tensor(arrays, f"{source}/{theirs}/{part}")
        state |= _norm(arrays, f"{target}.layer_norm", f"{source}/self_attention/layer_norm")
        state |= _norm(arrays, f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
    state |= _norm(arrays, "layer_norm", "layer_norm")
    try:
        missing, unknown = encoder.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise RecipeError(f"model_config: sizes differ from the teacher's; set {sizes} ({detail})") from None
    missing = [name for name in missing if not name.startswith("pos_conv_embed")]
    if missing or unknown:
        raise RecipeError(f"model_config: blocks differ from the teacher's; set do_stable_layer_norm and {sizes}")


def _tensor(arrays: Arrays, name: str) -> Tensor:
    try:
        return torch.from_numpy(arrays[f"encoder/{name}"].astype(np.float32))
    except KeyError:
        raise ModelError(f"the teacher is not a Whisper encoder: encoder/{name} is missing") from None


def _norm(arrays: Arrays, target: str, source: str) -> dict[str, Tensor]:
    return {
        f"{target}.{ours}": _tensor(arrays, f"{source}/{theirs}")
        for ours, theirs in (("weight", "gamma"), ("bias", "beta"))
    }
