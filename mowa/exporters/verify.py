"""What was written, beside the net it was written of: what both are asked, how far apart they are, and how far they may
be. How a format is run is not known here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.data import audio
from mowa.errors import ModelError
from mowa.models.ctc_encoder.chunk_mask import receptive_field
from mowa.types import Model

log = logging.getLogger("mowa")

MAX_ABS_DIFF = 1e-3  # nats: what float32 may be away from the net in any log-probability
MIN_LOG_PROB = -50.0  # nats: what is less likely than this is not compared, float32 itself is too coarse there
MIN_AGREEMENT = 0.8  # the share of frames in which a narrow one must find the same output likeliest
SAMPLE = Path(__file__).parents[1] / "assets" / "sample.flac"
SAMPLE_S = 5


def load_clips(model: Model) -> list[np.ndarray]:
    """The bundled sample, noise, and as little noise as makes a frame, float32 [n] each, as the net hears them."""
    noise = np.random.default_rng(1).standard_normal(4_097).astype(np.float32)
    return [preprocess(model, clip) for clip in (load_sample(model), noise, noise[: receptive_field(model.net.config)])]


def load_sample(model: Model) -> np.ndarray:
    """The bundled sample, float32 [n], as it was recorded."""
    return audio.load_audio(SAMPLE, model.preprocessing.rate_hz)[: SAMPLE_S * model.preprocessing.rate_hz]


def preprocess(model: Model, clip: np.ndarray) -> np.ndarray:
    return audio.normalize(clip) if model.preprocessing.normalize else clip


def compute_logits(net: Any, clips: Sequence[np.ndarray]) -> list[Tensor]:
    """Logits [T, V] of each, alone."""
    with torch.inference_mode():
        return [net(torch.from_numpy(clip)[None]).logits[0].float() for clip in clips]


def compare_logits(logits: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[float, float]:
    """Logits [T, V] of some recordings beside others: the largest difference of a log-probability, infinite where one
    is not a number, and the share of frames with the same likeliest output."""
    ours, theirs = (torch.cat(list(side)).log_softmax(-1).clamp(min=MIN_LOG_PROB) for side in (logits, reference))
    farthest = float((ours - theirs).abs().nan_to_num(nan=torch.inf).max())
    alike = (ours.argmax(-1) == theirs.argmax(-1)) & ~ours.isnan().any(-1)
    return farthest, float(alike.double().mean())


def verify_tolerance(
    model: Model, label: str, max_abs_diff: float, agreement: float, *, exact: bool | None = None, alternative: str = ""
) -> None:
    """ModelError where `what` was written does not say what the net says: to `FARTHEST` where it is to be `exact`
    (without: in float32), else in `AGREEING` of frames; with what to write `instead`."""
    name, scheme = model.origin.name, model.scheme
    if exact if exact is not None else scheme.weights == "float32":
        if not max_abs_diff <= MAX_ABS_DIFF:
            raise ModelError(
                f"the {label} of {name} is not what the net is: {max_abs_diff:.2g} nats away, {MAX_ABS_DIFF} allowed"
                + (f"; use {alternative}" if alternative else "")
            )
        return
    if agreement < MIN_AGREEMENT:
        raise ModelError(
            f"{name} does not bear {scheme.name} as {label}: in {1 - agreement:.0%} of frames another letter is"
            f" likeliest; use {alternative or 'float32'}"
        )
    log.info("%s: the same output likeliest in %.1f %% of frames of the sample", scheme.name, agreement * 100)
