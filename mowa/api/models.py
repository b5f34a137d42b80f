"""Load models and accelerate them (`mowa.load`, `mowa.accelerate`, `mowa.restore`), and read finished runs (`Run`)."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch

from mowa import loading
from mowa.adapters import causal
from mowa.adapters.loading import is_adapter, load_adapter, read_base_name
from mowa.api.options import LoadOptions
from mowa.engines.selection import describe_format
from mowa.errors import ModelError
from mowa.exporters.gguf.lora import read_layers
from mowa.exporters.gguf.tokenizer import GGUFTokenizer, compare_token_ids
from mowa.exporters.gguf.tokenizer.battery import hard_texts
from mowa.io.atomic import read_json
from mowa.io.gguf import read_gguf
from mowa.io.hub import MODEL_ALIASES, fetch_config
from mowa.io.manifest import find_manifest
from mowa.loading import gguf, quantized
from mowa.loading.checkpoint import load_config, read_family
from mowa.models.causal import accelerate as accelerate_model
from mowa.models.causal.accelerate import Change, accelerate, restore
from mowa.models.explain import (
    LayerExplanation,
    build_on_meta,
    default_device,
    explain_layers,
    explain_modules,
)
from mowa.types import AnyModel, CausalModel, CTCModel, Model

__all__ = ["Change", "LayerExplanation", "Run", "accelerate", "explain", "load", "restore"]

log = logging.getLogger("mowa")


@overload
def load(name: str | Path, *, task: Literal["ctc"], **options: Unpack[LoadOptions]) -> CTCModel: ...
@overload
def load(name: str | Path, *, task: Literal["causal"], **options: Unpack[LoadOptions]) -> CausalModel: ...
@overload
def load(name: str | Path, *, task: None = ..., **options: Unpack[LoadOptions]) -> AnyModel: ...
def load(
    name: str | Path,
    *,
    task: Literal["ctc", "causal"] | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    accelerate: bool | Literal["auto"] = "auto",
    offline: bool = False,
    target_lang: str | None = None,
) -> AnyModel:
    """Load a model of speech (CTC) or text (causal), in eval mode and without gradients.

    Args:
        name: an alias (`mowa models`), a folder (a checkpoint, a finished run, or what `mowa export --to safetensors`
            wrote), a Hub id `owner/name[@revision]`, a GGUF file, whose weights are dequantized, or the folder of an
            adapter, whose base model is then loaded too.
        task: the task that the model must be of; None: whichever its config says.
        adapter: folder of an adapter, by `mowa train` or PEFT, to load over the model.
        dtype: float32, bfloat16 or float16; auto: float32, but on a GPU a language model's own.
        device: cpu, cuda, cuda:1, …; auto: a GPU if there is one.
        accelerate: replace a language model's attention, norms and MLPs by mowa's; auto: on a GPU. `restore` undoes it;
            what was replaced is logged.
        offline: use cached files only.
        target_lang: language of an MMS checkpoint, such as pol; None: the default of its tokenizer.

    Raises:
        ModelError: the model or adapter is unknown, damaged, unsupported or of another task, or the folder holds an
            export; the message says what runs it.
    """
    name = str(name)
    if name not in MODEL_ALIASES:
        _reject_export(Path(name))
        if adapter is None and is_adapter(Path(name)):
            name, adapter = read_base_name(Path(name)), name
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = dtype
    if dtype == "auto":
        resolved = "float32" if device == "cpu" else _stored_dtype(name, revision, offline)
    options: loading.LoadOptions = {"revision": revision, "dtype": resolved, "device": device, "offline": offline}
    model: AnyModel = loading.load(name, task=task, target_lang=target_lang, **options)
    if getattr(getattr(model.processor, "tokenizer", None), "mowa_from_gguf", False):
        _compare_token_ids(name, model.processor.tokenizer)
    if adapter is not None:
        model = load_adapter(model, adapter)
    if accelerate is True and model.task != "causal":
        raise ModelError(f"{model.origin.name} is a speech model: accelerate replaces layers of language models only")
    if model.task == "causal" and (accelerate is True or (accelerate == "auto" and device != "cpu")):
        for change in accelerate_model.accelerate(model.net):
            log.info("accelerate: %s", change)
    elif model.task == "causal":
        log.info("accelerate: nothing is replaced on a CPU; accelerate=True does" if accelerate else "accelerate: off")
    return model


@dataclass(frozen=True)
class Run:
    """A finished training run: the folder with its checkpoint or adapter."""

    folder: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json: metrics of every data set, numbers of parameters, versions."""
        return read_json(self.folder / "report.json")

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of every dev and test set, by name."""
        metrics: dict[str, Any] = self.report["metrics"]
        return metrics

    @cached_property
    def model(self) -> AnyModel:
        """The trained model, loaded from the folder; an adapter over its base model."""
        return load(self.folder)


def resolve_model(
    model: Run | str | Path | AnyModel,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    target_lang: str | None = None,
    offline: bool = False,
) -> AnyModel:
    """Return a model: itself, that of a run, or the one with this name; with `adapter`, the adapter over it.

    Raises ModelError if `model` is none of these, or is loaded already and `revision` or `target_lang` is given.
    """
    if isinstance(model, str | Path):
        return load(model, adapter=adapter, revision=revision, target_lang=target_lang, offline=offline)
    if not isinstance(model, Run | Model):
        raise ModelError(f"expected a model, its name or folder, or a Run, not {type(model).__name__}")
    if given := next((name for name, one in (("revision", revision), ("target_lang", target_lang)) if one), None):
        raise ModelError(f"the model is loaded already: give {given} to mowa.load")
    loaded = model.model if isinstance(model, Run) else model
    return loaded if adapter is None else load_adapter(loaded, adapter)


def can_stay_on_disk(
    name: str | Path, adapter: str | Path | None = None, revision: str | None = None, *, offline: bool = False
) -> bool:
    """Return whether the weights of a model can be read one by one, with the adapter merged into them.

    They can for language models in full precision, and adapters that hold nothing but LoRA of linear layers. Raises
    ModelError as `load`.
    """
    if Path(name).suffix == ".gguf" or read_task(name, revision=revision, offline=offline) != "causal":
        return False
    if adapter is not None:
        try:
            read_layers(Path(adapter))
        except ModelError:
            return False
    return not quantized.read_quantization_config(fetch_config(str(name), revision=revision, offline=offline))


def explain(
    name: str | Path,
    *,
    seq_length: int = 2048,
    device: str = "",
    dtype: str = "bfloat16",
    packing: bool = False,
    offline: bool = False,
) -> list[LayerExplanation]:
    """Explain which implementation each layer of a model would use, and why. Weights are not loaded.

    Args:
        name: as in `load`; only the config files of a Hub model are downloaded. An adapter is that of its base model.
        seq_length: sequence length in tokens.
        device: cpu, cuda, or cuda:8.0 (that compute capability); empty: this machine's.
        dtype: compute dtype.
        packing: whether sequences are packed.
        offline: use cached files only.

    Raises: ModelError as `load`.
    """
    base = read_base_name(Path(name)) if is_adapter(Path(name)) else str(name)
    folder = fetch_config(base, offline=offline)
    family = read_family(folder, base)
    config, device = load_config(folder, family), device or default_device()
    rows = explain_layers(config, family, length=seq_length, device=device, dtype=dtype, packed=packing)
    if family.task in ("ctc", "causal"):
        rows += explain_modules(build_on_meta(config, family), family, device=device, dtype=dtype)
    return rows


def read_task(name: str | Path, *, revision: str | None = None, offline: bool = False) -> str:
    """Return the task of a model or adapter, without fetching weights. Raises ModelError as `load`."""
    name = read_base_name(Path(name)) if is_adapter(Path(name)) else str(name)
    return loading.read_task(name, revision=revision, offline=offline)


def _compare_token_ids(path: str, tokenizer: Any) -> None:
    """Warn if the tokenizer that transformers read from a GGUF file makes other token ids than llama.cpp."""
    with suppress(ModelError):  # a vocabulary that mowa does not know
        ours = GGUFTokenizer(read_gguf(path).metadata)

        def encode(text: str, add_special: bool) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"]
            return ids

        report = compare_token_ids(encode, ours.encode, hard_texts([], []))
        if report.unexplained:
            log.warning(
                "transformers reads the tokenizer of %s otherwise than llama.cpp: %d of %d hard texts have other token"
                " ids, such as %s. Put tokenizer.json of the original model beside the file",
                path,
                len(report.unexplained),
                report.checked,
                report.unexplained[0],
            )


def _reject_export(folder: Path) -> None:
    manifest = find_manifest(folder)
    if manifest is not None and manifest.artifact == "export":
        raise ModelError(
            f"{folder} cannot be loaded, it is {describe_format(manifest.sections['format'])};"
            f" the original model is {manifest.origin['name']}"
        )


def _stored_dtype(name: str, revision: str | None, offline: bool) -> str:
    """Return the dtype of a language model's checkpoint; float32 for a speech model."""
    if gguf.is_gguf(name):
        return gguf.stored_dtype(name) if gguf.read_task(name) == "causal" else "float32"
    folder = fetch_config(name, revision=revision, offline=offline)
    if read_family(folder, name).task == "ctc":
        return "float32"
    return causal.stored_dtype(folder)
