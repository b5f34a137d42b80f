"""Compare an export with the net that it was written from, and reject it if it differs too much."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.data import audio
from mowa.errors import ModelError
from mowa.io.hub import SAMPLE_CLIP
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.diff import ModelDiff
from mowa.models.tolerances import MAX_ABS_DIFF, MAX_KL_CAUSAL, MIN_AGREEMENT
from mowa.types import AnyModel, CausalModel, CTCModel

log = logging.getLogger("mowa")

SAMPLE_S = 5
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog, who was asleep, does not notice. What happens next?",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3.5]))  # 2.1666666666666665\n",
    "Zażółć gęślą jaźń. Heute ist Montag, der 3. März. ¿Qué hora es? 今日は良い天気ですね。",
)
MAX_SAMPLE_TOKENS = 128  # of a text
RANDOM_TOKENS = 64


def load_inputs(model: AnyModel) -> list[np.ndarray]:
    """Return inputs on which models are compared: `load_clips` or `load_token_ids`, by the task."""
    return load_token_ids(model) if model.task == "causal" else load_clips(model)


def load_token_ids(model: CausalModel) -> list[np.ndarray]:
    """Return token ids, int64 [n] each: texts in several languages, and random tokens."""
    count = model.net.get_input_embeddings().num_embeddings
    ids = [model.tokenizer(text)["input_ids"][:MAX_SAMPLE_TOKENS] for text in SAMPLE_TEXTS]
    random = np.random.default_rng(1).integers(0, count, RANDOM_TOKENS)
    return [*(np.array(one, np.int64) for one in ids), random]


def load_clips(model: CTCModel) -> list[np.ndarray]:
    """Return preprocessed clips, float32 [n] each: the bundled sample, noise, and noise of one frame."""
    noise = np.random.default_rng(1).standard_normal(4_097).astype(np.float32)
    frame = noise[: frame_geometry(model.net.config).receptive_field]
    return [audio.preprocess(clip, model.preprocessing) for clip in (load_sample(model), noise, frame)]


def load_sample(model: CTCModel) -> np.ndarray:
    """Return the first `SAMPLE_S` seconds of the bundled sample, float32 [n], not normalized."""
    return audio.load_audio(SAMPLE_CLIP, model.preprocessing.rate_hz)[: SAMPLE_S * model.preprocessing.rate_hz]


def compute_logits(net: Any, inputs: Sequence[np.ndarray]) -> list[Tensor]:
    """Return the logits of each input (a clip or token ids), float32 [T, V], computed one at a time."""
    with torch.inference_mode():
        return [net(torch.from_numpy(one)[None]).logits[0].float() for one in inputs]


def verify_tolerance(
    model: AnyModel, label: str, diff: ModelDiff, *, exact: bool | None = None, alternative: str = ""
) -> None:
    """Raise ModelError if an export differs too much from the net, and suggest `alternative`.

    With `exact` (by default for float32) log-probabilities may differ by `MAX_ABS_DIFF`; else the top token must be the
    same in `MIN_AGREEMENT` of the frames, and none may be NaN. A language model has near ties at many positions, so its
    KL divergence is limited instead (`MAX_KL_CAUSAL`).
    """
    name, scheme = model.origin.name, model.scheme
    if exact if exact is not None else scheme.weights == "float32":
        if not diff.max_abs_diff <= MAX_ABS_DIFF:
            raise ModelError(
                f"the {label} export of {name} differs from the model by {diff.max_abs_diff:.2g} nats (limit"
                f" {MAX_ABS_DIFF})" + (f"; use {alternative}" if alternative else "")
            )
        return
    if not math.isfinite(diff.max_abs_diff):
        raise ModelError(
            f"{scheme.name} overflows for {name} in {label}: NaN in the output; use {alternative or 'float32'}"
        )
    if model.task == "causal":
        if diff.kl > MAX_KL_CAUSAL:
            raise ModelError(
                f"{scheme.name} is too lossy for {name} in {label}: the KL divergence of the next token is"
                f" {diff.kl:.2g} nats (limit {MAX_KL_CAUSAL}); use {alternative or 'float32'}"
            )
        log.info("%s: %s", scheme.name, diff)
        return
    if diff.agreement < MIN_AGREEMENT:
        raise ModelError(
            f"{scheme.name} is too lossy for {name} in {label}: the top token changes in"
            f" {100 * (1 - diff.agreement):.0f} % of frames (limit {100 * (1 - MIN_AGREEMENT):.0f} %);"
            f" use {alternative or 'float32'}"
        )
    log.info("%s: same top token in %.1f %% of the sample's frames", scheme.name, diff.agreement * 100)
