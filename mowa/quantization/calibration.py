"""What meets the weights of a net when it hears: recordings chosen, inputs looked at. What is made of it, `make` knows.

Only what linears are given is looked at; memory holds a sample of it, or its second moments, never all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from mowa.data import audio
from mowa.data.manifests import examples as sources
from mowa.errors import DataError
from mowa.types import Example, Model

log = logging.getLogger("mowa")

CALIBRATION_S = 60.0
MAX_CLIP_S = 20.0  # longer recordings are heard so far: attention needs memory by the square of it
MAX_SAMPLED_VALUES = 65_536  # inputs of a linear that the range is chosen by
CLIP_RATIOS = (
    1.0,
    0.98,
    0.95,
    0.9,
    0.85,
    0.8,
    0.7,
    0.6,
    0.5,
)  # of the range: outliers may be worth finer steps for the rest


class StopForward(Exception):
    """Raised in a hook, to leave the rest of the net alone."""


def load_clips(source: str, model: Model, *, split: str = "", seconds: float = CALIBRATION_S) -> list[np.ndarray]:
    """So many seconds of what is at `source` (`data.sources` says what it may be), spread over it, as the net hears it.

    At another rate they are resampled; a lower one is warned of, as the net was not made for it. DataError where there
    is nothing to hear.
    """
    examples = list(sources.read_examples(source, split, require_text=False))
    return sample_clips(examples, model, seconds=seconds)


def sample_clips(examples: Sequence[Example], model: Model, *, seconds: float = CALIBRATION_S) -> list[np.ndarray]:
    """As `sounds`, of examples."""
    rate_hz, chosen, total = model.preprocessing.rate_hz, [], 0
    order = np.random.default_rng(0).permutation(len(examples))
    low = []
    for index in order:
        example = examples[index]
        if (known := _rate_hz(example)) and known < rate_hz:
            low.append(known)
        sound = audio.load_audio(example.audio, rate_hz)[: int(MAX_CLIP_S * rate_hz)]
        if len(sound) < rate_hz // 10 or not sound.any():
            continue
        chosen.append(audio.normalize(sound) if model.preprocessing.normalize else sound)
        total += len(sound)
        if total >= seconds * rate_hz:
            break
    if not chosen:
        raise DataError("there is nothing to calibrate on: no recording of 0.1 s or more that is not silent")
    if low:
        log.warning(
            "%d of %d recordings are at %d Hz and %s hears %d: what is above is missing, so ranges may be too small",
            *(len(low), len(chosen), min(low), model.origin.name, rate_hz),
        )
    return chosen


def _rate_hz(example: Example) -> int | None:
    try:
        return int(soundfile.info(example.audio).samplerate)
    except (soundfile.LibsndfileError, TypeError):
        return None


def estimate_input_ranges(net: Any, names: Iterable[str], clips: Sequence[np.ndarray]) -> dict[str, tuple[float, int]]:
    """Linear → step and zero of its inputs in eight bits: of some cuts of what was seen, the one that errs least."""
    names = list(names)
    least, most = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    sample: dict[str, list[Tensor]] = {name: [] for name in names}
    each = max(1, MAX_SAMPLED_VALUES // len(clips))

    def look(name: str, x: Tensor) -> None:
        flat = x.reshape(-1)
        least[name], most[name] = min(least[name], float(flat.min())), max(most[name], float(flat.max()))
        sample[name].append(flat[:: max(1, len(flat) // each)].clone())

    with observe_inputs(net, names, look):
        for sound in clips:
            compute_log_probs(net, sound)
    return {name: _range(least[name], most[name], torch.cat(sample[name])) for name in names}


def _range(least: float, most: float, sample: Tensor) -> tuple[float, int]:
    best, found = float("inf"), (1.0, 0)
    for share in CLIP_RATIOS:
        step = max((most - least) * share / 255, 1e-12)
        zero = round(min(max(-least * share / step, 0.0), 255.0))
        made = ((sample / step).round() + zero).clamp(0, 255).sub(zero) * step
        wrong = float((made - sample).square().mean())
        if wrong < best:
            best, found = wrong, (step, zero)
    return found


def accumulate_hessians(net: Any, block: str, names: Iterable[str], clips: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Linear of `block` → Σ x xᵀ of its inputs, float32 [K, K]; what comes after the block is not computed."""
    sums: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        sums[name] = sums[name].addmm_(rows.T, rows) if name in sums else rows.T @ rows

    def stop(*_: Any) -> None:
        raise StopForward

    handle = net.get_submodule(block).register_forward_hook(stop)
    try:
        with observe_inputs(net, names, look):
            for sound in clips:
                with suppress(StopForward):
                    compute_log_probs(net, sound)
    finally:
        handle.remove()
    return sums


def compute_log_probs(net: Any, clip: np.ndarray) -> Tensor:
    """Log-probabilities [T, V] of one recording."""
    with torch.inference_mode():
        made: Tensor = net(torch.from_numpy(np.ascontiguousarray(clip))[None]).logits[0].float().log_softmax(-1)
    return made


@contextmanager
def observe_inputs(net: Any, names: Iterable[str], observer: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`look(name, x)` at all that the linears are given."""
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: observer(name, given[0]))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
