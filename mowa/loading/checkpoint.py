"""What loading a checkpoint needs whatever it is of: its family, a device and a dtype that are there, and quiet."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from mowa.errors import ModelError
from mowa.families import find
from mowa.files import quiet, read_json, weights
from mowa.nouns import Family

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no type of its own for this
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used here ({reason}): try cpu") from error


def family_of(folder: Path) -> Family:
    """The family that `folder`'s config.json names; ModelError if it names none, or mowa knows no such family."""
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise ModelError(f"{folder}/config.json names no model_type, so it is not a transformers checkpoint")
    return find(str(config["model_type"]))


def config_of(folder: Path, family: Family) -> Any:
    """The transformers config in `folder`; ModelError where it does not describe a model of `family`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except (ValueError, TypeError, StrictDataclassError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"{folder}/config.json does not describe a {family.name} model: {reason}") from error


def net_of(auto: Any, folder: Path, family: Family, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The net in `folder` as `auto`, an AutoModel class, makes it, and what did not fit. ModelError: damaged weights.

    A weight of another shape is no error here: `refuse_misfits` names it.
    """
    from safetensors import SafetensorError

    config = config_of(folder, family)
    with quiet():
        try:
            loaded: tuple[Any, dict[str, Any]] = auto.from_pretrained(
                weights(folder),
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


def refuse_misfits(folder: Path, encoder: str, report: Mapping[str, Any], *, spared: Container[str] = ()) -> None:
    """Refuse a net that is not wholly the checkpoint's: transformers fills gaps with random numbers and only warns.

    `report` is its loading info. A weight of the `encoder` (by prefix) that found no place is refused too: a layer or
    an adapter would be left out of the sum. Heads of other tasks that nobody asked for are not.
    """
    missing = sorted(key for key in report["missing_keys"] if key not in spared)
    if missing:
        raise ModelError(f"the weights of {folder} lack {some(missing)}: the checkpoint is incomplete")
    if mismatched := sorted(report["mismatched_keys"]):
        key, found, wanted = mismatched[0]
        raise ModelError(f"{key} in {folder} has shape {list(found)}, its config.json asks for {list(wanted)}")
    if homeless := sorted(key for key in report["unexpected_keys"] if key.startswith(f"{encoder}.")):
        raise ModelError(
            f"the config.json of {folder} has no place for its weights {some(homeless)}: they do not match"
        )


def some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
