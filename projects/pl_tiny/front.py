"""Whisper's log-mel front end, written into the convolutions of a wav2vec2 net instead of learnt.

A wav2vec2 front end is convolution, layer norm over the channels, GELU, four times over. It can be made to say what
log-mel frames and Whisper's two convolutions say, but training does not find it in any time we have: gradient descent
stays at a tenth of the variance wrong, which a deep encoder makes a half of. Written down it is a fortieth wrong:

1. a Hann-windowed Fourier basis, every frequency in eight phases: rectified, their sum is the frequency's magnitude,
   and wavers by 0.7 dB only as the wave moves under the window. Constant channels keep the level of the sound, which
   the layer norm would take away.
2. the magnitudes summed into mel bands m, each band several times, rectified as GELU(1 − g·m) with gains g three apart:
   ramps that end one after another, a basis in which the logarithm is linear.
3. and 4. Whisper's own convolutions, the first with the least-squares read-out of log-mel from the ramps multiplied in.
   Large constant channels and balancing ones make of the layer norm next to an identity.
5. the projection, by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.errors import RecipeError
from projects.pl_tiny.transplant import BANDS, HOP, LEVEL, LOUDEST, WINDOW, Ear

PHASES, FREQUENCIES = 8, 128
SERVICE = 16  # constant channels of a layer; as many balance those of layers 3 and 4
QUIET = 0.3  # the constants of layer 1, beside samples of unit variance
SHARP = 100.0  # how far GELU of layer 1 is from linear
LEVELS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # gains of the ramps over the level of layer 1
RAMPS = (1.0, 3.0, 9.0, 27.0, 81.0, 243.0, 0.3, -1.0)  # of the ramps over mel bands; the last is linear
SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the ramps over the scale of layer 2
BYPASS = 50.0  # the constants of layers 3 and 4


def sizes(width: int) -> dict[str, list[int] | int]:
    """The keys of a wav2vec2 config that this front end needs, for a teacher of `width`."""
    wide = width + 2 * SERVICE
    dims = [PHASES * FREQUENCIES + SERVICE, len(RAMPS) * BANDS + 2 * len(LEVELS) + len(SCALES), wide, wide]
    return {
        "conv_dim": dims,
        "conv_kernel": [WINDOW, 1, 3, 3],
        "conv_stride": [HOP, 1, 1, 2],
        "num_feat_extract_layers": len(dims),
    }


@torch.no_grad()
def write(net: Any, ear: Ear, recordings: Sequence[np.ndarray]) -> None:
    """The teacher's front end into `net.feature_extractor` and `net.feature_projection` (a Wav2Vec2Model's).

    Least squares are taken over normalised `recordings`. RecipeError where the net's convolutions are of other sizes.
    """
    config = net.config
    for key, value in sizes(ear.width).items():
        if list(np.atleast_1d(getattr(config, key))) != list(np.atleast_1d(value)):
            raise RecipeError(f"net: {key} is {getattr(config, key)}; the teacher's front end needs {value}")
    if not config.conv_bias or config.feat_extract_norm != "layer":
        raise RecipeError("net: the teacher's front end needs conv_bias: true and feat_extract_norm: layer")
    one, two, three, four = net.feature_extractor.conv_layers
    turns = _fourier(one)
    _bands(two, turns, ear.filters.numpy())
    waves = [torch.from_numpy(recording)[None, None].float() for recording in recordings]
    ramps = torch.cat([two(one(wave))[0].T for wave in waves])
    mels = torch.cat([_mel(ear, wave) for wave in waves])
    read, offset = _least_squares(ramps, mels)
    first: Any = ear.conv1
    second: Any = ear.conv2
    _bypass(three, torch.einsum("obk,bc->ock", first.weight, read), first.bias + first.weight.sum(2) @ offset)
    _bypass(four, second.weight, second.bias)
    norm, projection = net.feature_projection.layer_norm, net.feature_projection.projection
    norm.weight.fill_(1.0)
    norm.bias.zero_()
    heard, meant = [], []
    for wave in waves:
        frames = norm(net.feature_extractor(wave[0]).transpose(1, 2))[0]
        target = ear.front(ear.mel(wave[0, :, WINDOW // 2 :] * LEVEL, LOUDEST))[0, 1:]
        count = min(len(frames), len(target))
        heard.append(frames[:count])
        meant.append(target[:count])
    weight, bias = _least_squares(torch.cat(heard), torch.cat(meant))
    projection.weight.copy_(weight)
    projection.bias.copy_(bias)


def _fourier(layer: Any) -> np.ndarray:
    """Layer 1. → the frequencies, in turns a window: as dense as it resolves below 2 kHz, then spread to the top."""
    dense = int(FREQUENCIES * 0.62)
    turns = np.concatenate([np.arange(1, dense + 1), np.linspace(dense + 1, WINDOW / 2 - 2, FREQUENCIES - dense)])
    time, window = np.arange(WINDOW) / WINDOW, np.hanning(WINDOW + 1)[:WINDOW]
    waves = [np.cos(2 * np.pi * (turns[:, None] * time + phase / PHASES)) * window for phase in range(PHASES)]
    voices = PHASES * FREQUENCIES
    layer.conv.weight.zero_()
    layer.conv.weight[:voices] = torch.from_numpy(np.concatenate(waves)[:, None]).float()
    layer.conv.bias.zero_()
    layer.conv.bias[voices::2] = QUIET
    layer.conv.bias[voices + 1 :: 2] = -QUIET
    layer.layer_norm.weight.fill_(SHARP)
    layer.layer_norm.bias.zero_()
    layer.layer_norm.weight[voices:] = 0
    layer.layer_norm.weight[voices::2] = -torch.tensor(LEVELS)
    layer.layer_norm.bias[voices::2] = 1
    return turns


def _bands(layer: Any, turns: np.ndarray, filters: np.ndarray) -> None:
    """Layer 2: mel bands by ramps, and ramps over the level. `filters` [bins, bands] is Whisper's filter bank."""
    bins = np.arange(len(filters))
    bank = np.stack([np.interp(turns, bins, band) for band in filters.T])
    for band, row in zip(filters.T, bank, strict=True):
        if row.sum() < 1e-4:  # narrower than the frequencies lie apart
            row[np.abs(turns - (band * bins).sum() / band.sum()).argmin()] = 1
    bank /= PHASES * bank.sum(1, keepdims=True)
    sums = torch.from_numpy(np.tile(bank, PHASES)).float()
    voices, bands = PHASES * FREQUENCIES, len(RAMPS) * BANDS
    weight, bias, norm = layer.conv.weight, layer.conv.bias, layer.layer_norm
    for part in (weight, bias, norm.weight, norm.bias):
        part.zero_()
    for place, gain in enumerate(RAMPS):  # half of them upside down: the mean over the channels is zero
        rows, sign = slice(place * BANDS, (place + 1) * BANDS), (-1) ** place
        weight[rows, :voices, 0] = sums * sign
        norm.weight[rows] = -gain * sign
        norm.bias[rows] = float(gain > 0)
    for place in range(len(LEVELS)):
        row = bands + 2 * place
        weight[row, voices + 2 * place, 0], weight[row + 1, voices + 2 * place, 0] = 30.0, -30.0
        norm.weight[row], norm.weight[row + 1] = 1.0, 2.0
        norm.bias[row + 1] = 1.0
    for place, gain in enumerate(SCALES):
        row, sign = bands + 2 * len(LEVELS) + place, (-1) ** place
        bias[row], norm.weight[row], norm.bias[row] = 10.0 * sign, -gain * sign, 1.0


def _bypass(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """A convolution whose layer norm is next to an identity: [width, in, k] and [width], then the service channels."""
    width, inner = weight.shape[:2]
    for part in (layer.conv.weight, layer.conv.bias, layer.layer_norm.weight, layer.layer_norm.bias):
        part.zero_()
    layer.conv.weight[:width, :inner], layer.conv.bias[:width] = weight, bias
    layer.conv.bias[width : width + SERVICE : 2] = BYPASS
    layer.conv.bias[width + 1 : width + SERVICE : 2] = -BYPASS
    layer.conv.weight[width + SERVICE :, :inner] = -weight.sum(0) / SERVICE
    layer.conv.bias[width + SERVICE :] = -bias.sum() / SERVICE
    layer.layer_norm.weight[:width] = BYPASS * (SERVICE / (width + 2 * SERVICE)) ** 0.5


def _mel(ear: Ear, wave: Tensor) -> Tensor:
    """Log-mel frames [T, 80] of a wave [1, 1, N], where the windows of layer 1 lie: the first has its middle at 200."""
    mel = ear.mel(wave[0, :, WINDOW // 2 - HOP :] * LEVEL, LOUDEST)[0].T[1:]
    return mel[: (wave.shape[-1] - WINDOW) // HOP + 1]


def _least_squares(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression: inputs [N, I], outputs [N, O] → weight [O, I], bias [O]."""
    count = min(len(inputs), len(outputs))
    inputs, outputs = inputs[:count].double(), outputs[:count].double()
    centre, mean = inputs.mean(0), outputs.mean(0)
    inputs = inputs - centre
    ridge = 1e-5 * count * torch.eye(inputs.shape[1], dtype=torch.double)
    weight = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ (outputs - mean)).T
    return weight.float(), (mean - weight @ centre).float()
