"""Load an adapter by mowa or by PEFT alone over its base model, for speech or text, and merge it."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors import SafetensorError

from mowa.adapters import causal, checkpoint, embeddings, lora, merge
from mowa.errors import ModelError
from mowa.io.atomic import atomic_folder, read_json
from mowa.io.hashing import sha256_file
from mowa.io.manifest import find_manifest, write_manifest
from mowa.io.weights import weight_files
from mowa.types import AnyModel, CausalModel, CTCModel, TextProcessor

log = logging.getLogger("mowa")

PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

ModelT = TypeVar("ModelT", bound=AnyModel)


def is_adapter(folder: Path) -> bool:
    """Return whether `folder` holds an adapter, and no checkpoint of its own. Raises ModelError as `find_manifest`.

    Other trainers write the base's config.json beside an adapter.
    """
    if not folder.is_dir() or weight_files(folder):
        return False
    if (folder / "config.json").is_file() and not (folder / PEFT_CONFIG_FILE).is_file():
        return False
    manifest = find_manifest(folder)
    return _is_peft_adapter(folder) or (manifest is not None and manifest.artifact == "adapter")


def read_base_name(folder: Path) -> str:
    """Return the name by which to load the base model of the adapter in `folder`. Raises ModelError if it has none."""
    if _is_peft_adapter(folder):
        config = read_json(folder / PEFT_CONFIG_FILE)
        if not (name := config.get("base_model_name_or_path")):
            raise ModelError(f"{folder}/{PEFT_CONFIG_FILE} names no base model: pass it, and the adapter beside it")
        return f"{name}@{config['revision']}" if config.get("revision") else str(name)
    if causal.is_causal_adapter(folder):
        return causal.read_adapter(folder).base.load_name
    return checkpoint.read_adapter(folder).base.load_name


def adapter_sha256(folder: Path) -> str:
    """Return the SHA-256 (hex) of the weights of the speech adapter in `folder`."""
    if _is_peft_adapter(folder):
        return sha256_file(folder / PEFT_WEIGHTS_FILE)
    return checkpoint.read_adapter(folder).sha256


def load_adapter(model: ModelT, folder: str | Path) -> ModelT:
    """Load the adapter in `folder` over its base `model` and return a new model; `model` does not change.

    Raises ModelError if there is no adapter, it is for another task or base model, `model` has an adapter already, or
    files are damaged; MissingDependency for LoRA without PEFT.
    """
    folder = Path(folder)
    if _is_peft_adapter(folder):
        return _load_peft_adapter(model, folder)
    is_causal = causal.is_causal_adapter(folder)
    if is_causal != (model.task == "causal"):
        task = "language" if is_causal else "speech"
        raise ModelError(f"{folder} is an adapter of a {task} model, and {model.origin.name} is not one")
    if is_causal:
        return cast(ModelT, causal.load_adapter(model, folder))
    return cast(ModelT, checkpoint.load_adapter(model, folder))


def merge_adapter(model: ModelT, dtype: str = "auto") -> ModelT:
    """Return a copy of `model`, of any task, whose LoRA is merged into the weights and that needs no PEFT.

    `dtype` is that of a language model's weights; auto: as they are.
    """
    if model.task == "causal":
        return cast(ModelT, causal.merge_adapter(cast(CausalModel, model), dtype))
    return cast(ModelT, merge.merge_adapter(cast(CTCModel, model)))


@contextmanager
def atomic_checkpoint(model: AnyModel, out: Path) -> Iterator[Path]:
    """Write the checkpoint of `model` to a temporary folder and yield it; it becomes `out` as in `atomic_folder`."""
    with atomic_folder(out) as folder:
        (causal if model.task == "causal" else merge).write_checkpoint(model, folder)
        write_manifest(
            folder,
            "checkpoint",
            task=model.task,
            family=model.family.name,
            origin=model.origin,
            files=[file.name for file in weight_files(folder)],
        )
        yield folder


def _is_peft_adapter(folder: Path) -> bool:
    """Return whether PEFT alone wrote the adapter in `folder`: it has no manifest. Raises as `find_manifest`."""
    return find_manifest(folder) is None and (folder / PEFT_CONFIG_FILE).is_file()


def _load_peft_adapter(model: ModelT, folder: Path) -> ModelT:
    """Load what PEFT's `save_pretrained` wrote. It does not say which weights it was trained over, only a name."""
    if present := getattr(model.net, "mowa_adapter", None):
        raise ModelError(f"{folder} cannot be loaded over the adapter {present}: load it over the base model")
    config = read_json(folder / PEFT_CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter of PEFT; mowa loads LoRA only")
    if not (folder / PEFT_WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder} has no {PEFT_WEIGHTS_FILE}: save it again with PEFT's save_pretrained")
    log.info("%s was written by PEFT: that %s is its base model is not checked", folder, model.origin.name)
    net = copy.deepcopy(model.net) if _writes_base(config) else checkpoint.copy_sharing_weights(model.net)
    try:
        if model.task == "causal":
            rows = embeddings.saved_rows(net, folder, folder / PEFT_WEIGHTS_FILE)
            embeddings.resize(net, rows, mean_resizing=False)
            net = lora.load_peft_model(net, folder, autocast_adapter_dtype=False)
            validate_tensors(net, folder)
        else:
            _insert_peft_lora(cast(CTCModel, model), net, folder)
    except (RuntimeError, ValueError, KeyError, TypeError, re.error, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise ModelError(f"{folder} does not fit {model.origin.name}: {reason}") from error
    net.mowa_adapter = str(folder)
    suffix = folder.resolve().name
    origin = replace(model.origin, name=f"{model.origin.name}+{suffix}", source=f"{model.origin.source}+{suffix}")
    if model.task == "causal":
        tokenizer = causal.adapter_tokenizer(cast(CausalModel, model), folder)
        model = replace(model, processor=TextProcessor(tokenizer))
    return replace(model, net=net.eval().requires_grad_(False), origin=origin)


def _writes_base(config: dict[str, Any]) -> bool:
    """Return whether PEFT writes into tensors of the base model when it loads this adapter."""
    plain_init = config.get("init_lora_weights", True) in (True, False, "gaussian")
    return config.get("bias", "none") != "none" or not plain_init


def validate_tensors(net: Any, folder: Path) -> None:
    """Raise ValueError if the file lacks tensors of the adapter of `net`, or has others, which PEFT ignores."""
    from safetensors import safe_open

    with safe_open(folder / PEFT_WEIGHTS_FILE, "pt") as file:
        found = set(file.keys())
    expected = set(lora.import_peft().get_peft_model_state_dict(net, save_embedding_layers=False))
    embeddings = {name for name in found - expected if ".lora_" not in name and name.endswith(".weight")}
    for problem, names in (("missing", expected - found), ("unexpected", found - expected - embeddings)):
        if names:
            raise ValueError(f"{min(names)} is {problem}")


def _insert_peft_lora(model: CTCModel, net: Any, folder: Path) -> None:
    """Insert LoRA layers, and the head if PEFT trained it (`modules_to_save`), which keeps the vocabulary."""
    from safetensors.torch import load_file

    peft = lora.import_peft()
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.modules_to_save, config.inference_mode = None, True
    peft.inject_adapter_in_model(config, net, lora.ADAPTER_NAME, low_cpu_mem_usage=True)
    like = next(net.parameters())
    state = {name: value.to(like.device, like.dtype) for name, value in load_file(folder / PEFT_WEIGHTS_FILE).items()}
    prefix = f"{checkpoint.PEFT_PREFIX}{model.family.head}."
    head = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    rest = {name: value for name, value in state.items() if not name.startswith(prefix)}
    report = peft.set_peft_model_state_dict(net, rest, lora.ADAPTER_NAME, low_cpu_mem_usage=True)
    missing = [name for name in report.missing_keys if ".lora_" in name]
    if missing or report.unexpected_keys:
        raise ValueError(f"{missing[0]} is missing" if missing else f"{report.unexpected_keys[0]} is unexpected")
    if head:
        target = net.get_submodule(model.family.head)
        if head["weight"].shape != target.weight.shape:
            raise ValueError(
                f"its head has {len(head['weight'])} outputs, the vocabulary of the base model {len(target.weight)}"
            )
        copied = type(target)(target.in_features, target.out_features, "bias" in head, device="meta")
        copied.load_state_dict(head, assign=True)
        net.set_submodule(model.family.head, copied)
