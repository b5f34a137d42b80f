"""How recordings are transcribed, as one value. Kept apart so that the command line can read its defaults cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that may change a transcript or its cost, beside the model. Times in seconds.

    `speech` is how sure the speech detector must be, at its surest moment in a window, for the window to be read at
    all; 0 reads everything. `batch_s` bounds the (padded) audio in one batch.
    """

    resample: Literal["best", "fast"] = "best"
    window_s: float = 20.0
    context_s: float = 2.0
    batch_s: float = 32.0
    speech: float = 0.1
