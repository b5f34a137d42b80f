"""What the pages show of each result: VIEWS[result][view] is a table or a sentence; see `figures` for the markers."""

from __future__ import annotations

from typing import Any

from benchmarks.views import quantization, training, transcription

VIEWS: dict[str, dict[str, Any]] = transcription.VIEWS | training.VIEWS | quantization.VIEWS
