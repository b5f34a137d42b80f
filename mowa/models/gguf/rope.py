"""Positions: the parameters of rotary embeddings as metadata and tensors, and back.

With linear scaling and YaRN, llama.cpp divides positions by `rope.scaling.factor`. Llama 3's scaling and longrope are
divisors of each frequency, stored as tensors, float32 [D / 2]: `rope_freqs`, or `rope_factors_long` and `_short`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mowa.errors import ModelError
from mowa.models.gguf.architecture import Architecture, head_dim

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)
DEFAULT_THETA = 10_000.0
LLAMA3_DEFAULTS = (1.0, 4.0, 8192)  # low and high frequency factor, original context
_PREFIX = "rope.scaling."
_YARN_KEYS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def rope_metadata(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Return the metadata of a config's positions, with keys as in `KeyRule`.

    Raises ModelError if llama.cpp cannot compute them in this architecture.
    """
    full, sliding = _parameters(config)
    rope_type = full["rope_type"]
    if rope_type not in architecture.rope_types or (sliding is not None and sliding["rope_type"] != "default"):
        raise ModelError(
            f"{config.model_type} with positions of type {rope_type!r} cannot be written as GGUF: llama.cpp computes"
            f" {', '.join(sorted(architecture.rope_types))} for it"
        )
    found: dict[str, Any] = {"rope.freq_base": float(full["rope_theta"])}
    rotated = int(head_dim(config) * full.get("partial_rotary_factor", 1.0))
    if not hasattr(config, "kv_lora_rank"):  # DeepSeek rotates a part of each head of its own
        found["rope.dimension_count"] = rotated
        if rotated != head_dim(config) and architecture.name != "phi3":
            raise ModelError(f"{config.model_type} rotates {rotated} of {head_dim(config)} dimensions: llama.cpp, all")
    if sliding is not None:
        found["rope.freq_base_swa"] = float(sliding["rope_theta"])
    return found | _scaling_metadata(full, config, architecture)


def _parameters(config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Return rope parameters of layers with full attention, and of others if they have their own."""
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        return parameters["full_attention"], parameters["sliding_attention"]
    return parameters, None


def _scaling_metadata(full: Mapping[str, Any], config: Any, architecture: Architecture) -> dict[str, Any]:
    original = full.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    length = {} if original is None else {f"{_PREFIX}original_context_length": int(original)}
    match full["rope_type"]:
        case "linear":
            return {f"{_PREFIX}type": "linear", f"{_PREFIX}factor": float(full["factor"])}
        case "yarn":
            return length | _yarn_metadata(full, config, architecture)
        case "longrope":
            factor = _longrope_attention_factor(full, config, length[f"{_PREFIX}original_context_length"])
            return length | {f"{_PREFIX}type": "longrope", f"{_PREFIX}attn_factor": factor}
        case _:
            return length


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of attention: 0.1 · scale · ln(factor) + 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_metadata(full: Mapping[str, Any], config: Any, architecture: Architecture) -> dict[str, Any]:
    factor = float(full["factor"] or config.max_position_embeddings / full["original_max_position_embeddings"])
    found: dict[str, Any] = {f"{_PREFIX}type": "yarn", f"{_PREFIX}factor": factor}
    for name, key in _YARN_KEYS.items():
        found[f"{_PREFIX}{key}"] = float(full.get(name) or _YARN_DEFAULTS[name])
    mscale, mscale_all_dim = full.get("mscale"), full.get("mscale_all_dim")
    wanted = full.get("attention_factor")
    if wanted is None:
        wanted = _magnitude(factor)
        if mscale and mscale_all_dim:
            wanted = _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    if not architecture.yarn_log_multiplier:
        mscale_all_dim = None
    if mscale_all_dim:
        found[f"{_PREFIX}yarn_log_multiplier"] = architecture.yarn_log_multiplier * mscale_all_dim
    computed = _default_attention_factor(factor, mscale_all_dim, architecture)
    if not math.isclose(wanted, computed, rel_tol=1e-6):
        found[f"{_PREFIX}attn_factor"] = wanted / computed
    return found


def _default_attention_factor(factor: float, mscale_all_dim: float | None, architecture: Architecture) -> float:
    """Return what llama.cpp multiplies queries and keys by with YaRN, before `attn_factor`."""
    if not mscale_all_dim:
        return _magnitude(factor)
    mscale = mscale_all_dim if architecture.name == "deepseek2" else 1.0
    return _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)


def _longrope_attention_factor(full: Mapping[str, Any], config: Any, original: int) -> float:
    if (given := full.get("attention_factor")) is not None:
        return float(given)
    factor = full.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Return divisors of the frequencies of a config, float32 [D / 2]; none for most types."""
    full, _ = _parameters(config)
    if full["rope_type"] == "longrope":
        return {LONG: torch.tensor(full["long_factor"]).float(), SHORT: torch.tensor(full["short_factor"]).float()}
    if full["rope_type"] != "llama3":
        return {}
    theta, dim = full["rope_theta"], head_dim(config)
    parameters = full["factor"], full["low_freq_factor"], full["high_freq_factor"]
    return {FREQUENCIES: llama3_divisors(theta, dim, *parameters, full["original_max_position_embeddings"])}


def llama3_divisors(theta: float, dim: int, factor: float, low: float, high: float, original: int) -> Tensor:
    """Return what Llama 3.1 divides frequencies by, float32 [dim / 2]: 1 for short waves, `factor` for long ones.

    Waves of `original / low` positions and more are long, those of `original / high` and less are short; between them,
    the frequency is interpolated.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = original * frequencies / (2 * math.pi)  # in the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def rope_config(
    metadata: Mapping[str, Any], architecture: Architecture, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Undo `rope_metadata` and `rope_tensors`: return attributes of the config.

    Raises ModelError if divisors of frequencies are not those of a type that transformers knows.
    """
    theta = float(metadata.get("rope.freq_base", DEFAULT_THETA))
    scaling = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    original = int(scaling.get("original_context_length", 0))
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if FREQUENCIES in tensors:
        full |= _fit_llama3(tensors[FREQUENCIES], theta, original or LLAMA3_DEFAULTS[2])
    elif LONG in tensors:
        full |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        full |= {"long_factor": tensors[LONG].tolist(), "short_factor": tensors[SHORT].tolist()}
        full |= {"attention_factor": scaling["attn_factor"]} if "attn_factor" in scaling else {}
    elif scaling.get("factor", 1.0) != 1.0 and scaling.get("type", "linear") in ("linear", "yarn"):
        full |= {"rope_type": scaling.get("type", "linear"), "factor": float(scaling["factor"])}
        full |= _yarn_config(scaling, architecture) if full["rope_type"] == "yarn" else {}
    size = int(metadata.get("attention.key_length", 0)) or (
        int(metadata["embedding_length"]) // int(metadata["attention.head_count"])
    )
    rotated = int(metadata.get("rope.dimension_count", size))
    if architecture.name == "phi3":
        full["partial_rotary_factor"] = rotated / size
    if architecture.name == "mistral3":
        full["llama_4_scaling_beta"] = float(metadata["attention.temperature_scale"])
    if architecture.name != "gemma3":
        top = {"original_max_position_embeddings": original} if architecture.name == "phi3" and original else {}
        return {"rope_parameters": full} | top
    sliding = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base_swa", DEFAULT_THETA))}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def _yarn_config(scaling: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    found: dict[str, Any] = {
        "original_max_position_embeddings": int(scaling["original_context_length"]),
        **{name: float(scaling.get(key, _YARN_DEFAULTS[name])) for name, key in _YARN_KEYS.items()},
    }
    mscale = float(scaling.get("yarn_log_multiplier", 0.0)) / (architecture.yarn_log_multiplier or 1.0)
    if mscale:
        found |= {"mscale": round(mscale, 6), "mscale_all_dim": round(mscale, 6)}
    if "attn_factor" in scaling:
        computed = _default_attention_factor(float(scaling["factor"]), mscale, architecture)
        found["attention_factor"] = float(scaling["attn_factor"]) * computed
    return found


def _fit_llama3(divisors: Tensor, theta: float, original: int) -> dict[str, Any]:
    """Return the parameters of `llama3_divisors`: of Llama's own, or else those that two interpolated values give."""
    dim, factor = 2 * len(divisors), float(divisors.max())
    low, high, _ = LLAMA3_DEFAULTS
    candidates = [(low, high)]
    between = ((divisors > 1.0001) & (divisors < factor * 0.9999)).nonzero().flatten().tolist()
    if len(between) >= 2:
        turns = [original * theta ** (-2 * index / dim) / (2 * math.pi) for index in (between[0], between[-1])]
        inverse = [1 / float(divisors[index]) for index in (between[0], between[-1])]
        smooth = [(value - 1 / factor) / (1 - 1 / factor) for value in inverse]
        slope = (smooth[0] - smooth[1]) / (turns[0] - turns[1])
        fitted_low = turns[0] - smooth[0] / slope
        candidates.append((round(fitted_low, 4), round(fitted_low + 1 / slope, 4)))
    for low, high in candidates:
        if torch.allclose(llama3_divisors(theta, dim, factor, low, high, original), divisors, rtol=1e-3):
            return {
                **{"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high},
                "original_max_position_embeddings": original,
            }
    raise ModelError(f"{FREQUENCIES} holds divisors that no rope type of transformers has: {divisors.tolist()[:4]} …")
