"""Metadata under `general.`: what a file says about the model that it holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

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
    return found | base_model_metadata(origin.source)


def sampling_metadata(generation_config: Any) -> dict[str, Any]:
    """Return the sampling settings of a model that samples by default; nothing for one that decodes greedily."""
    if not getattr(generation_config, "do_sample", False):
        return {}
    found = {
        "general.sampling.temp": ("temperature", np.float32),
        "general.sampling.top_p": ("top_p", np.float32),
        "general.sampling.top_k": ("top_k", np.int32),
        "general.sampling.penalty_repeat": ("repetition_penalty", np.float32),
    }
    values = {key: (getattr(generation_config, name, None), kind) for key, (name, kind) in found.items()}
    settings = {key: kind(value) for key, (value, kind) in values.items() if value is not None}
    return {"general.sampling.temp": np.float32(1)} | settings


def base_model_metadata(source: str) -> dict[str, Any]:
    """Return what names a repository on the Hub as the base model; nothing for a folder."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or Path(source).exists():
        return {}
    return {
        "general.base_model.count": 1,
        "general.base_model.0.name": source.rpartition("/")[2],
        "general.base_model.0.repo_url": f"https://huggingface.co/{source}",
    }


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
