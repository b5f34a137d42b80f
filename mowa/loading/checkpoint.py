"""Load config and weights of a transformers checkpoint, and validate dtype, device and completeness of the weights."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from mowa.errors import ModelError
from mowa.families import resolve_family
from mowa.io.atomic import read_json
from mowa.io.hub import silence_transformers
from mowa.io.weights import ensure_safetensors
from mowa.types import Family

DTYPES = ("float32", "bfloat16", "float16")


def validate_dtype(dtype: str) -> None:
    """Raise ModelError if `dtype` is not in `DTYPES`."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def validate_device(device: str) -> None:
    """Raise ModelError if torch cannot allocate on `device`."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used here ({reason}): try cpu") from error


def read_family(folder: Path, name: str = "") -> Family:
    """Return the family of the checkpoint in `folder`, which is called `name` (see `resolve_family`).

    Raises ModelError if mowa does not support it.
    """
    return resolve_family(name, read_json(folder / "config.json"))


def load_config(folder: Path, family: Family) -> Any:
    """Load the transformers config in `folder`. Raises ModelError if it is not valid for `family`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    config_class: Any = AutoConfig
    if not read_json(folder / "config.json").get("model_type"):  # the family was resolved by name or architecture
        config_class = type(AutoConfig.for_model(family.model_types[0]))
    with silence_transformers():
        try:
            return config_class.from_pretrained(folder, local_files_only=True)
        except (ValueError, TypeError, StrictDataclassError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"{folder}/config.json is not a valid {family.name} config: {reason}") from error


def load_net(auto_class: Any, folder: Path, family: Family, dtype: str) -> tuple[Any, dict[str, Any]]:
    """Load the net in `folder` with `auto_class`, and return it with transformers' loading info.

    Missing and mismatched weights are not an error here; see `validate_loading_info`. Raises ModelError if the weights
    are missing or damaged.
    """
    from safetensors import SafetensorError

    config = load_config(folder, family)
    with silence_transformers():
        try:
            loaded: tuple[Any, dict[str, Any]] = auto_class.from_pretrained(
                ensure_safetensors(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise ModelError(f"the weights of {folder} are damaged: {error}") from error
    return loaded


def validate_loading_info(
    folder: Path, base_prefix: str, loading_info: Mapping[str, Any], *, ignored_missing: Container[str] = ()
) -> None:
    """Raise ModelError if a net was not loaded completely: transformers fills missing weights with random numbers.

    A weight of the base model (by `base_prefix`) that the net has no parameter for is an error too, because a layer or
    an adapter would be missing from the computation; heads for other tasks are ignored.
    """
    missing = sorted(key for key in loading_info["missing_keys"] if key not in ignored_missing)
    if missing:
        other = next((key for key in loading_info["unexpected_keys"] if key.endswith(f".{missing[0]}")), None)
        instead = f"; they have {other} instead: rename it, and what else has this prefix" if other else ""
        raise ModelError(f"the weights of {folder} are incomplete: {summarize_keys(missing)} missing{instead}")
    if mismatched := sorted(loading_info["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise ModelError(f"{key} in {folder} has shape {list(found)}, but config.json requires {list(expected)}")
    if unexpected := sorted(key for key in loading_info["unexpected_keys"] if key.startswith(f"{base_prefix}.")):
        raise ModelError(
            f"the weights of {folder} do not match its config.json: no parameter for {summarize_keys(unexpected)}"
        )


def summarize_keys(keys: list[str]) -> str:
    """Return the first key and the number of others."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
