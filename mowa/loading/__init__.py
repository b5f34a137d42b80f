"""Load a checkpoint by name into memory, as a `Model` of the task that its config says.

Start with `load`. `ctc` and `causal` load the two kinds, `checkpoint` holds what they share, `quantized` rebuilds
quantized linear layers, and `gguf` loads files of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict, Unpack, overload

from mowa.adapters.loading import is_adapter, read_base_name
from mowa.errors import ModelError
from mowa.io.hub import MODEL_ALIASES, fetch_config, resolve_model
from mowa.loading import causal, ctc, gguf, languages
from mowa.loading.checkpoint import read_family
from mowa.types import AnyModel, CausalModel, CTCModel, Family

__all__ = ["load", "read_task"]


def read_task(name: str, *, revision: str | None = None, offline: bool = False) -> str:
    """Return the task of a model, or of an adapter's base, by its config, without fetching weights.

    Raises ModelError as `load`.
    """
    if gguf.is_gguf(name):
        return gguf.read_task(name)
    if name not in MODEL_ALIASES and is_adapter(Path(name)):
        name = read_base_name(Path(name))
    return read_family(fetch_config(name, revision=revision, offline=offline), name).task


class LoadOptions(TypedDict, total=False):
    """Options of `load`, all optional.

    revision  branch, tag or commit of a Hub model
    dtype     float32 (the default), bfloat16 or float16
    device    as torch names it; cpu by default
    offline   use cached files only
    """

    revision: str | None
    dtype: str
    device: str
    offline: bool


@overload
def load(
    name: str,
    *,
    task: Literal["ctc"],
    require_head: bool = ...,
    target_lang: str | None = ...,
    **options: Unpack[LoadOptions],
) -> CTCModel: ...
@overload
def load(
    name: str,
    *,
    task: Literal["causal"],
    require_head: bool = ...,
    target_lang: str | None = ...,
    **options: Unpack[LoadOptions],
) -> CausalModel: ...
@overload
def load(
    name: str,
    *,
    task: str | None = ...,
    require_head: bool = ...,
    target_lang: str | None = ...,
    **options: Unpack[LoadOptions],
) -> AnyModel: ...
def load(
    name: str,
    *,
    task: str | None = None,
    require_head: bool = True,
    target_lang: str | None = None,
    **options: Unpack[LoadOptions],
) -> AnyModel:
    """Load a model by alias, folder, Hub id or GGUF file, in eval mode and without gradients.

    Args:
        name: the model.
        task: ctc or causal, which the model must be of; None: whichever its config says.
        require_head, target_lang: as in `ctc.load`.
        options: see `LoadOptions`.

    Raises:
        ModelError: the checkpoint is incomplete, damaged, unsupported or of another task; and as `resolve_model`.
    """
    if gguf.is_gguf(name):
        return _load_gguf(name, task, target_lang, options)

    def read_task_family(folder: Path) -> Family:
        if (task or read_family(folder, name).task) == "ctc":
            languages.validate_language(folder, target_lang, name)
            return ctc.read_ctc_family(folder, name, require_head=require_head)
        if target_lang is not None:
            raise ModelError(f"{name} is not a speech model and takes no target_lang: omit {target_lang!r}")
        return causal.read_causal_family(folder, name)

    revision, offline = options.get("revision"), options.get("offline", False)
    origin = resolve_model(
        name,
        revision=revision,
        offline=offline,
        validate=read_task_family,
        extra_files=languages.adapter_files(target_lang),
    )
    if read_task_family(origin.folder).task == "ctc":
        return ctc.load(name, require_head=require_head, target_lang=target_lang, **options)
    return causal.load(name, **options)


def _load_gguf(name: str, task: str | None, target_lang: str | None, options: LoadOptions) -> AnyModel:
    """Load a GGUF file. Raises ModelError for options that it does not take, and as `gguf.load`."""
    for option, value in (("revision", options.get("revision")), ("target_lang", target_lang)):
        if value is not None:
            raise ModelError(f"{name} is a file and takes no {option}: omit {value!r}")
    if task not in (None, found := gguf.read_task(name)):
        kinds = {"ctc": "a speech model", "causal": "a language model"}
        raise ModelError(f"{name} is {kinds[found]}; {kinds.get(str(task), task)} is needed here")
    return gguf.load(name, dtype=options.get("dtype", "float32"), device=options.get("device", "cpu"))
