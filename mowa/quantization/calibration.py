"""Collect calibration data: sample clips and record the activations that enter each linear layer.

Memory holds a sample of the activations (for input ranges) or their second moments (for GPTQ), never all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.data import audio
from mowa.data.quality.unreadable import read_measurable
from mowa.errors import AudioError, DataError
from mowa.types import CTCModel, Example

log = logging.getLogger("mowa")

CALIBRATION_S = 60.0
MAX_CLIP_S = 20.0  # longer recordings are cut: the memory of attention grows with the square of the length
MIN_CLIP_S = 0.1
MAX_SAMPLED_VALUES = 65_536  # activations kept per linear to choose its input range
CLIP_RATIOS = (1.0, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # fractions of the observed range to try


class StopForward(Exception):
    """Raised by a hook to skip the rest of a forward pass."""


def load_clips(source: str, model: CTCModel, *, split: str = "", seconds: float = CALIBRATION_S) -> list[np.ndarray]:
    """Load about `seconds` of audio from a manifest, folder or dataset, preprocessed as the model needs it.

    Args:
        source: anything that `mowa.data.manifests.examples` reads.
        model: its sampling rate and normalization are applied.
        split: split of the dataset, where it has several.
        seconds: total length.

    Returns:
        Randomly chosen recordings (fixed seed), float32 [n] each.

    Raises:
        DataError: no recording can be read, is long enough and not silent.
    """
    return sample_clips(read_measurable(source, split), model, seconds=seconds)


def sample_clips(examples: Sequence[Example], model: CTCModel, *, seconds: float = CALIBRATION_S) -> list[np.ndarray]:
    """Return calibration clips as `load_clips` does, from examples.

    Recordings at a lower rate than the model's cause a warning, and so does one that cannot be read, which is left out.
    """
    rate_hz, clips, total = model.preprocessing.rate_hz, [], 0
    lower_rates = []
    for index in np.random.default_rng(0).permutation(len(examples)):
        example = examples[index]
        if (source_rate_hz := _source_rate_hz(example)) and source_rate_hz < rate_hz:
            lower_rates.append(source_rate_hz)
        try:
            samples = audio.load_audio(example.audio, rate_hz)[: int(MAX_CLIP_S * rate_hz)]
        except AudioError as error:
            log.warning("not used for calibration: %s", error)
            continue
        if len(samples) < int(MIN_CLIP_S * rate_hz) or not samples.any():
            continue
        clips.append(audio.preprocess(samples, model.preprocessing))
        total += len(samples)
        if total >= seconds * rate_hz:
            break
    if not clips:
        raise DataError(
            f"no calibration data: no recording can be read, is at least {MIN_CLIP_S} s long and not silent"
        )
    if lower_rates:
        log.warning(
            "%d of %d calibration recordings have a sampling rate of %d Hz, below the %d Hz of %s: without their high"
            " frequencies, input ranges may come out too small",
            *(len(lower_rates), len(clips), min(lower_rates), rate_hz, model.origin.name),
        )
    return clips


def _source_rate_hz(example: Example) -> int | None:
    try:
        return audio.probe_audio(example.audio).rate_hz
    except AudioError:
        return None


def estimate_input_ranges(net: Any, names: Iterable[str], clips: Sequence[np.ndarray]) -> dict[str, tuple[float, int]]:
    """Return scale and zero point, for uint8, of each linear's inputs over the clips.

    Of several fractions of the observed range, the one with the smallest squared error on a sample wins.
    """
    names = list(names)
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    samples_per_clip = max(1, MAX_SAMPLED_VALUES // len(clips))

    def observe(name: str, x: Tensor) -> None:
        flat = x.reshape(-1)
        low[name], high[name] = min(low[name], float(flat.min())), max(high[name], float(flat.max()))
        samples[name].append(flat[:: max(1, len(flat) // samples_per_clip)].clone())

    with observe_inputs(net, names, observe):
        for clip in clips:
            compute_log_probs(net, clip)
    return {name: _choose_range(low[name], high[name], torch.cat(samples[name])) for name in names}


def _choose_range(low: float, high: float, sample: Tensor) -> tuple[float, int]:
    best_error, best = float("inf"), (1.0, 0)
    for ratio in CLIP_RATIOS:
        scale = max((high - low) * ratio / 255, 1e-12)
        zero_point = round(min(max(-low * ratio / scale, 0.0), 255.0))
        rounded = ((sample / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
        error = float((rounded - sample).square().mean())
        if error < best_error:
            best_error, best = error, (scale, zero_point)
    return best


def accumulate_hessians(net: Any, block: str, names: Iterable[str], clips: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Return Σ x xᵀ, float32 [K, K], over the inputs x of each linear in `names`; layers after `block` do not run."""
    hessians: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        hessians[name] = hessians[name].addmm_(rows.T, rows) if name in hessians else rows.T @ rows

    def stop(*_: Any) -> None:
        raise StopForward

    handle = net.get_submodule(block).register_forward_hook(stop)
    try:
        with observe_inputs(net, names, observe):
            for clip in clips:
                with suppress(StopForward):
                    compute_log_probs(net, clip)
    finally:
        handle.remove()
    return hessians


def compute_log_probs(net: Any, clip: np.ndarray) -> Tensor:
    """Return the log-probabilities, float32 [T, V], of one preprocessed recording, float32 [n]."""
    with torch.inference_mode():
        log_probs: Tensor = net(torch.from_numpy(np.ascontiguousarray(clip))[None]).logits[0].float().log_softmax(-1)
    return log_probs


@contextmanager
def observe_inputs(net: Any, names: Iterable[str], observer: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `observer(name, x)` for every input x of the modules in `names`, inside the context."""
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: observer(name, args[0]))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
