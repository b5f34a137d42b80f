"""A Whisper encoder as a teacher in PyTorch, and its blocks as the beginning of a wav2vec2 net.

Whisper's encoder block (pre-norm attention, pre-norm GELU feed-forward; Radford et al. 2022, arXiv:2212.04356) is the
block of `Wav2Vec2EncoderStableLayerNorm`, so six of them and the final norm move over exactly. What lies below them
differs: log-mel frames, two convolutions and sinusoidal positions there; convolutions on the waveform (`front`) and a
positional convolution (`positions`) here.
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

RATE_HZ, HOP, WINDOW, BANDS = 16_000, 160, 400, 80
FRAME = 2 * HOP  # samples a frame of the encoder
LEVEL = 0.06  # root mean square of the recordings as the teacher hears them: that of ordinary speech
LOUDEST = 0.9  # log10 of the loudest mel energy at that level; Whisper cuts off 8 below a recording's own maximum
Arrays = Mapping[str, np.ndarray]


class Ear(nn.Module):
    """The teacher: a frozen Whisper encoder. `width` features a frame, as many frames as it has `positions` at most."""

    filters: Tensor
    window: Tensor
    positions: Tensor

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        sizes = shape(arrays)
        self.width = sizes["hidden_size"]
        filters = mel_filter_bank(WINDOW // 2 + 1, BANDS, 0.0, RATE_HZ / 2, RATE_HZ, "slaney", "slaney")
        self.register_buffer("filters", torch.from_numpy(filters.astype(np.float32)))
        self.register_buffer("window", torch.hann_window(WINDOW))
        self.register_buffer("positions", _tensor(arrays, "position_encodings/encodings"))
        self.conv1 = nn.Conv1d(BANDS, self.width, 3, padding=1)
        self.conv2 = nn.Conv1d(self.width, self.width, 3, stride=2, padding=1)
        for name in ("conv1", "conv2"):
            getattr(self, name).load_state_dict(
                {part: _tensor(arrays, f"{name}/{part}") for part in ("weight", "bias")}
            )
        config = AutoConfig.for_model("wav2vec2", **sizes, do_stable_layer_norm=True, attn_implementation="sdpa")
        self.blocks = AutoModel.from_config(config).encoder
        transplant(arrays, self.blocks)
        del self.blocks.pos_conv_embed
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Ear:
        return super().train(False)

    def mel(self, samples: Tensor, loudest: float | None = None) -> Tensor:
        """Samples [B, N] → Whisper's log-mel features [B, 80, N / 160]; `loudest` stands for the clip's own maximum."""
        spectrum = torch.stft(samples.float(), WINDOW, HOP, window=self.window, center=True, return_complex=True)
        power = spectrum[..., :-1].abs().square()
        log = torch.log10((power.transpose(1, 2) @ self.filters).clamp(min=1e-10))
        top = log.amax((1, 2), keepdim=True) if loudest is None else torch.full_like(log[:, :1, :1], loudest)
        return ((torch.maximum(log, top - 8) + 4) / 4).transpose(1, 2)

    def front(self, mel: Tensor) -> Tensor:
        """Log-mel [B, 80, 2T] → frames [B, T, width], before positions are added."""
        frames: Tensor = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        return frames

    def hear(self, frames: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Frames [B, T, width], true [B, T] in `mask` → features after each block; the last ones are normed."""
        state = frames + self.positions[: frames.shape[1]]
        seen = None if mask is None else mask[:, None, None, :]
        states = []
        for block in self.blocks.layers:
            out = block(state, attention_mask=seen)
            state = out[0] if isinstance(out, tuple) else out  # transformers 5.17 gives a tuple
            states.append(state)
        states[-1] = self.blocks.layer_norm(state)
        return tuple(states)


def shape(arrays: Arrays) -> dict[str, int]:
    """The sizes of the encoder in these arrays, as keys of a wav2vec2 config. ModelError where it is none."""
    try:
        layers = {int(found[1]) for name in arrays if (found := re.match(r"encoder/layer_(\d+)/", name))}
        inner, hidden = arrays["encoder/layer_0/ffn/linear_0/weight"].shape
        heads = int(arrays["encoder/num_heads"])
    except (KeyError, ValueError) as wrong:
        raise ModelError(f"the teacher is no Whisper encoder: {wrong} is missing") from None
    return {
        "num_hidden_layers": len(layers),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }


def transplant(arrays: Arrays, encoder: nn.Module) -> None:
    """Whisper's blocks and final norm into a `Wav2Vec2EncoderStableLayerNorm` of the same sizes, exactly.

    `linear_0` of its attention is query, key and value one under another; its key bias is zero.
    """
    state = {}
    sizes = shape(arrays)
    for layer in range(sizes["num_hidden_layers"]):
        here, there = f"layers.{layer}", f"layer_{layer}"
        for part in ("weight", "bias"):
            fused = _tensor(arrays, f"{there}/self_attention/linear_0/{part}").chunk(3)
            for name, value in zip("qkv", fused, strict=True):
                state[f"{here}.attention.{name}_proj.{part}"] = value
            for name, source in (
                ("attention.out_proj", "self_attention/linear_1"),
                ("feed_forward.intermediate_dense", "ffn/linear_0"),
                ("feed_forward.output_dense", "ffn/linear_1"),
            ):
                state[f"{here}.{name}.{part}"] = _tensor(arrays, f"{there}/{source}/{part}")
        state |= _norm(arrays, f"{here}.layer_norm", f"{there}/self_attention/layer_norm")
        state |= _norm(arrays, f"{here}.final_layer_norm", f"{there}/ffn/layer_norm")
    state |= _norm(arrays, "layer_norm", "layer_norm")
    try:
        missing, unknown = encoder.load_state_dict(state, strict=False)
    except RuntimeError as wrong:
        raise RecipeError(
            f"net: other sizes than the teacher's; set {sizes} ({str(wrong).splitlines()[1].strip()})"
        ) from None
    missing = [name for name in missing if not name.startswith("pos_conv_embed")]
    if missing or unknown:
        raise RecipeError(f"net: must have the teacher's blocks; set do_stable_layer_norm and {sizes}")


def _tensor(arrays: Arrays, name: str) -> Tensor:
    try:
        return torch.from_numpy(arrays[f"encoder/{name}"].astype(np.float32))
    except KeyError:
        raise ModelError(f"the teacher is no Whisper encoder: encoder/{name} is missing") from None


def _norm(arrays: Arrays, here: str, there: str) -> dict[str, Tensor]:
    return {
        f"{here}.{ours}": _tensor(arrays, f"{there}/{theirs}")
        for ours, theirs in (("weight", "gamma"), ("bias", "beta"))
    }
