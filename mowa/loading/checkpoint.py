"""What loading a checkpoint needs whatever it is of: its family, a device and a dtype that are there, and quiet."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from mowa.errors import ModelError
from mowa.families import get_family
from mowa.io.atomic import read_json
from mowa.io.hub import silence_transformers
from mowa.io.weights import ensure_safetensors
from mowa.types import Family

DTYPES = ("float32", "bfloat16", "float16")


def validate_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def validate_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no type of its own for this
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used here ({reason}): try cpu") from error


def read_family(folder: Path) -> Family:
    """The family that `folder`'s config.json names; ModelError if it names none, or mowa knows no such family."""
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise ModelError(f"{folder}/config.json names no model_type, so it is not a transformers checkpoint")
    return get_family(str(config["model_type"]))


def load_config(folder: Path, family: Family) -> Any:
    """The transformers config in `folder`; ModelError where it does not describe a model of `family`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    with silence_transformers():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except (ValueError, TypeError, StrictDataclassError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"{folder}/config.json does not describe a {family.name} model: {reason}") from error


def load_net(auto_class: Any, folder: Path, family: Family, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The net in `folder` as `auto`, an AutoModel class, makes it, and what did not fit. ModelError: damaged weights.

    A weight of another shape is no error here: `refuse_misfits` names it.
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
    """Refuse a net that is not wholly the checkpoint's: transformers fills gaps with random numbers and only warns.

    `report` is its loading info. A weight of the `encoder` (by prefix) that found no place is refused too: a layer or
    an adapter would be left out of the sum. Heads of other tasks that nobody asked for are not.
    """
    missing = sorted(key for key in loading_info["missing_keys"] if key not in ignored_missing)
    if missing:
        raise ModelError(f"the weights of {folder} lack {summarize_keys(missing)}: the checkpoint is incomplete")
    if mismatched := sorted(loading_info["mismatched_keys"]):
        key, found, wanted = mismatched[0]
        raise ModelError(f"{key} in {folder} has shape {list(found)}, its config.json asks for {list(wanted)}")
    if homeless := sorted(key for key in loading_info["unexpected_keys"] if key.startswith(f"{base_prefix}.")):
        raise ModelError(
            f"the config.json of {folder} has no place for its weights {summarize_keys(homeless)}: they do not match"
        )


def summarize_keys(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
