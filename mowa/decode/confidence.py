"""Warn about recordings on which a model has low confidence throughout.

The threshold was chosen for `pl-tiny`: hardly any recordings of Polish speakers are below it, clean, with noise or in
telephone quality, and most music is. Confidence does not tell languages from each other: `pl-tiny` writes Russian or
Czech in Polish letters with confidences as high as Polish.
"""

from __future__ import annotations

import logging

from mowa.types import Transcript

log = logging.getLogger("mowa")

MIN_CONFIDENCE = {"pl-tiny": 0.65}
"""Model → mean confidence of the words below which a recording gets a warning. Other models were not measured."""


def warn_if_low(transcript: Transcript, model_name: str) -> None:
    """Log a warning if the words of a transcript have a mean confidence below the model's threshold."""
    threshold = MIN_CONFIDENCE.get(model_name)
    if threshold is None or not transcript.words or transcript.confidence >= threshold:
        return
    log.warning(
        "%s: the mean confidence of %s is only %.2f: the recording may be music or noise, and its transcript wrong",
        transcript.file,
        model_name,
        transcript.confidence,
    )
