"""Metadata under `general.`: what a file says about the model that it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mowa.types import Origin

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def general_metadata(origin: Origin, num_weights: int) -> dict[str, Any]:
    """Return name, size and license of a model, and the repository on the Hub that it was made from."""
    found: dict[str, Any] = {
        "general.type": "model",
        "general.name": model_name(origin),
        "general.size_label": size_label(num_weights),
    }
    if origin.license:
        found["general.license"] = origin.license
    if re.fullmatch(r"[\w.-]+/[\w.-]+", origin.source):
        found |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": origin.source.rpartition("/")[2],
            "general.base_model.0.repo_url": f"https://huggingface.co/{origin.source}",
        }
    return found


def model_name(origin: Origin) -> str:
    """Return the last part of a model's name."""
    return origin.name.rstrip("/").rpartition("/")[2].partition("@")[0] or "model"


def file_stem(origin: Origin) -> str:
    """Return a model's name as the beginning of a file name."""
    return re.sub(r"[^\w.-]+", "-", model_name(origin)).strip("-.") or "model"


def size_label(num_weights: int) -> str:
    """Return the number of weights as llama.cpp writes it: 135M, 1.1B."""
    for unit, letter in _UNITS:
        if num_weights >= unit:
            number = num_weights / unit
            return f"{number:.1f}{letter}" if number < 10 else f"{number:.0f}{letter}"
    return str(num_weights)


def describe_types(types: Mapping[str, str]) -> dict[str, int]:
    """Return how many tensors have each type, the most frequent first."""
    counts: dict[str, int] = {}
    for one in types.values():
        counts[one] = counts.get(one, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
