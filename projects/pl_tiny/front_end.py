"""Write Whisper's log-mel front end into the convolutions of a wav2vec2 net.

A wav2vec2 front end is four times convolution, layer norm over the channels, GELU. It can represent log-mel frames and
Whisper's two convolutions, but training does not find the solution in acceptable time: gradient descent stays at an
error of a tenth of the variance, which a deep encoder amplifies to a half. Written down, the error is a fortieth:

1. A Hann-windowed Fourier basis, each frequency in eight phases: the sum of the rectified outputs is the magnitude of
   the frequency, to within 0.7 dB whatever the phase of the wave. Constant channels preserve the level of the input,
   which the layer norm would remove.
2. The magnitudes summed into mel bands m, each band several times, rectified as GELU(1 − g·m) with gains g three times
   apart: ramps that end one after another, a basis in which the logarithm is linear.
3. and 4. Whisper's own convolutions; the least-squares map from the ramps to log-mel is multiplied into the first.
   Large constant channels and balancing ones make the layer norm close to an identity.
5. The projection, by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.errors import RecipeError
from projects.pl_tiny.whisper_encoder import HOP_LENGTH, INPUT_RMS, LOG_MEL_MAX, N_FFT, N_MELS, WhisperEncoder

PHASES, FREQUENCIES = 8, 128
CONSTANTS = 16  # constant channels per layer; layers 3 and 4 have as many balancing ones
LAYER1_CONSTANT = 0.3  # the constants of layer 1, for samples of unit variance
LAYER1_GAIN = 100.0  # norm weight of layer 1: large, so that GELU acts as a rectifier
LEVEL_GAINS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the ramps over the level of layer 1
BAND_GAINS = (1.0, 3.0, 9.0, 27.0, 81.0, 243.0, 0.3, -1.0)  # of the ramps over mel bands; the last is linear
SCALE_GAINS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the ramps over the scale of layer 2
BYPASS_CONSTANT = 50.0  # the constants of layers 3 and 4


def front_end_config(hidden_size: int) -> dict[str, list[int] | int]:
    """Return the keys of a wav2vec2 config that this front end needs, for a teacher of `hidden_size`."""
    width = hidden_size + 2 * CONSTANTS
    bands = len(BAND_GAINS) * N_MELS + 2 * len(LEVEL_GAINS) + len(SCALE_GAINS)
    dims = [PHASES * FREQUENCIES + CONSTANTS, bands, width, width]
    return {
        "conv_dim": dims,
        "conv_kernel": [N_FFT, 1, 3, 3],
        "conv_stride": [HOP_LENGTH, 1, 1, 2],
        "num_feat_extract_layers": len(dims),
    }


@torch.no_grad()
def write_front_end(net: Any, encoder: WhisperEncoder, recordings: Sequence[np.ndarray]) -> None:
    """Write the teacher's front end into `feature_extractor` and `feature_projection` of a Wav2Vec2Model.

    The least-squares maps are fitted on normalized `recordings` (float32 [N] each). Raise RecipeError if the net's
    convolutions have other sizes.
    """
    config = net.config
    for key, value in front_end_config(encoder.hidden_size).items():
        if list(np.atleast_1d(getattr(config, key))) != list(np.atleast_1d(value)):
            raise RecipeError(f"model_config: {key} is {getattr(config, key)}; the teacher's front end needs {value}")
    if not config.conv_bias or config.feat_extract_norm != "layer":
        raise RecipeError("model_config: the teacher's front end needs conv_bias: true and feat_extract_norm: layer")
    one, two, three, four = net.feature_extractor.conv_layers
    cycles = _write_fourier(one)
    _write_mel_bands(two, cycles, encoder.mel_filters.numpy())
    waves = [torch.from_numpy(recording)[None, None].float() for recording in recordings]
    ramps = torch.cat([two(one(wave))[0].T for wave in waves])
    mels = torch.cat([_log_mel(encoder, wave) for wave in waves])
    read_out, offset = _least_squares(ramps, mels)
    first: Any = encoder.conv1
    second: Any = encoder.conv2
    bias = first.bias + first.weight.sum(2) @ offset
    _write_bypass(three, torch.einsum("obk,bc->ock", first.weight, read_out), bias)
    _write_bypass(four, second.weight, second.bias)
    norm, projection = net.feature_projection.layer_norm, net.feature_projection.projection
    norm.weight.fill_(1.0)
    norm.bias.zero_()
    inputs, targets = [], []
    for wave in waves:
        frames = norm(net.feature_extractor(wave[0]).transpose(1, 2))[0]
        target = encoder.embed(encoder.log_mel(wave[0, :, N_FFT // 2 :] * INPUT_RMS, LOG_MEL_MAX))[0, 1:]
        count = min(len(frames), len(target))
        inputs.append(frames[:count])
        targets.append(target[:count])
    weight, bias = _least_squares(torch.cat(inputs), torch.cat(targets))
    projection.weight.copy_(weight)
    projection.bias.copy_(bias)


def _write_fourier(layer: Any) -> np.ndarray:
    """Write layer 1; return its frequencies in cycles per window.

    They are as dense as the window resolves below 2 kHz, then spread to the top.
    """
    dense = int(FREQUENCIES * 0.62)
    cycles = np.concatenate([np.arange(1, dense + 1), np.linspace(dense + 1, N_FFT / 2 - 2, FREQUENCIES - dense)])
    time, window = np.arange(N_FFT) / N_FFT, np.hanning(N_FFT + 1)[:N_FFT]
    waves = [np.cos(2 * np.pi * (cycles[:, None] * time + phase / PHASES)) * window for phase in range(PHASES)]
    count = PHASES * FREQUENCIES
    layer.conv.weight.zero_()
    layer.conv.weight[:count] = torch.from_numpy(np.concatenate(waves)[:, None]).float()
    layer.conv.bias.zero_()
    layer.conv.bias[count::2] = LAYER1_CONSTANT
    layer.conv.bias[count + 1 :: 2] = -LAYER1_CONSTANT
    layer.layer_norm.weight.fill_(LAYER1_GAIN)
    layer.layer_norm.bias.zero_()
    layer.layer_norm.weight[count:] = 0
    layer.layer_norm.weight[count::2] = -torch.tensor(LEVEL_GAINS)
    layer.layer_norm.bias[count::2] = 1
    return cycles


def _write_mel_bands(layer: Any, cycles: np.ndarray, filters: np.ndarray) -> None:
    """Write layer 2: mel bands as ramps, and ramps over the level. `filters` [bins, bands] is Whisper's filter bank."""
    bins = np.arange(len(filters))
    bank = np.stack([np.interp(cycles, bins, band) for band in filters.T])
    for band, row in zip(filters.T, bank, strict=True):
        if row.sum() < 1e-4:  # the band is narrower than the distance between two frequencies
            row[np.abs(cycles - (band * bins).sum() / band.sum()).argmin()] = 1
    bank /= PHASES * bank.sum(1, keepdims=True)
    sums = torch.from_numpy(np.tile(bank, PHASES)).float()
    count, bands = PHASES * FREQUENCIES, len(BAND_GAINS) * N_MELS
    weight, bias, norm = layer.conv.weight, layer.conv.bias, layer.layer_norm
    for part in (weight, bias, norm.weight, norm.bias):
        part.zero_()
    for place, gain in enumerate(BAND_GAINS):  # alternating signs: the mean over the channels is zero
        rows, sign = slice(place * N_MELS, (place + 1) * N_MELS), (-1) ** place
        weight[rows, :count, 0] = sums * sign
        norm.weight[rows] = -gain * sign
        norm.bias[rows] = float(gain > 0)
    for place in range(len(LEVEL_GAINS)):
        row = bands + 2 * place
        weight[row, count + 2 * place, 0], weight[row + 1, count + 2 * place, 0] = 30.0, -30.0
        norm.weight[row], norm.weight[row + 1] = 1.0, 2.0
        norm.bias[row + 1] = 1.0
    for place, gain in enumerate(SCALE_GAINS):
        row, sign = bands + 2 * len(LEVEL_GAINS) + place, (-1) ** place
        bias[row], norm.weight[row], norm.bias[row] = 10.0 * sign, -gain * sign, 1.0


def _write_bypass(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Write a convolution (weight [D, C, k], bias [D]) and the channels that make its layer norm near an identity."""
    width, inner = weight.shape[:2]
    for part in (layer.conv.weight, layer.conv.bias, layer.layer_norm.weight, layer.layer_norm.bias):
        part.zero_()
    layer.conv.weight[:width, :inner], layer.conv.bias[:width] = weight, bias
    layer.conv.bias[width : width + CONSTANTS : 2] = BYPASS_CONSTANT
    layer.conv.bias[width + 1 : width + CONSTANTS : 2] = -BYPASS_CONSTANT
    layer.conv.weight[width + CONSTANTS :, :inner] = -weight.sum(0) / CONSTANTS
    layer.conv.bias[width + CONSTANTS :] = -bias.sum() / CONSTANTS
    layer.layer_norm.weight[:width] = BYPASS_CONSTANT * (CONSTANTS / (width + 2 * CONSTANTS)) ** 0.5


def _log_mel(encoder: WhisperEncoder, wave: Tensor) -> Tensor:
    """Return log-mel frames [T, 80] of a wave [1, 1, N] at the windows of layer 1, the first centered at sample 200."""
    mel = encoder.log_mel(wave[0, :, N_FFT // 2 - HOP_LENGTH :] * INPUT_RMS, LOG_MEL_MAX)[0].T[1:]
    return mel[: (wave.shape[-1] - N_FFT) // HOP_LENGTH + 1]


def _least_squares(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [O, I] and bias [O] of the ridge regression from inputs [N, I] to outputs [N, O]."""
    count = min(len(inputs), len(outputs))
    inputs, outputs = inputs[:count].double(), outputs[:count].double()
    center, mean = inputs.mean(0), outputs.mean(0)
    inputs = inputs - center
    ridge = 1e-5 * count * torch.eye(inputs.shape[1], dtype=torch.double)
    weight = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ (outputs - mean)).T
    return weight.float(), (mean - weight @ center).float()
