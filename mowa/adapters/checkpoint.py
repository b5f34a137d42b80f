"""Save adapters of CTC models to disk, and load several of them over one base model.

A folder holds `mowa.json` (type, base and metrics), the weights, and vocabulary and audio settings in transformers'
files:

- lora: `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, with the head in full
  (`modules_to_save`). `PeftModel.from_pretrained(base, folder)` reads it if the base's head has as many outputs as the
  vocabulary: `AutoModelForCTC.from_pretrained(base, vocab_size=…, ignore_mismatched_sizes=True)`.
- bottleneck: `adapter.<name>.safetensors` as in MMS, with the head; `<name>` is the language, or else the folder's
  name. `Wav2Vec2ForCTC.load_adapter(name)` reads it over a base with `adapter_attn_dim`.

`load_adapter` returns a new model per adapter, with its own modules, head and vocabulary, whose other weights are the
base's tensors. Nothing is switched, so several can be used at once, also from several threads. Move or convert the base
before loading adapters, not after.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mowa.adapters import bottleneck, lora
from mowa.errors import ModelError
from mowa.families import get_family
from mowa.io.atomic import atomic_update, read_json
from mowa.io.hashing import hash_weights
from mowa.io.hub import MODEL_ALIASES
from mowa.io.manifest import MANIFEST_FILE, Manifest, damaged, find_manifest, write_manifest
from mowa.io.processor import read_preprocessing, vocabulary_from_dict, vocabulary_to_dict, write_processor
from mowa.types import CTCModel, Family, Origin, Preprocessing, SpeechProcessor, Vocabulary

LORA, BOTTLENECK = "lora", "bottleneck"
MERGED_SUFFIX = " (merged)"  # after the name of the adapter in `net.mowa_adapter`; no other is loaded over it
PEFT_PREFIX = "base_model.model."  # of every name in PEFT's files


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """The checkpoint that an adapter was trained over. `sha256` is that of its weights (`hash_weights`)."""

    name: str
    source: str
    revision: str | None
    sha256: str

    @property
    def load_name(self) -> str:
        """Name to load it by."""
        return f"{self.source}@{self.revision}" if self.revision else self.source


@dataclass(frozen=True, slots=True)
class Adapter:
    """Contents of an adapter's manifest, with its vocabulary and audio settings."""

    folder: Path
    adapter_type: str
    base: BaseCheckpoint
    language: str
    weights_file: str
    sha256: str
    parameters: int
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    package_versions: Mapping[str, str | None]
    metrics: Mapping[str, Any]


def save_adapter(
    net: Any,
    folder: Path,
    *,
    adapter_type: str,
    base: Origin,
    vocabulary: Vocabulary,
    preprocessing: Preprocessing,
    metrics: Mapping[str, Any],
    language: str = "",
) -> Path:
    """Write the adapter of `net`, of type lora or bottleneck, with its head into `folder`, and return `folder`.

    `base` is the origin of the net's other weights; its files must still exist. Other files in the folder are kept. An
    interrupted write leaves no mowa.json, so that the folder is not taken for an adapter. Raises ModelError if `net`
    has no such adapter.
    """
    family = get_family(net.config.model_type)
    name = re.sub(r"[^\w-]+", "-", language or folder.resolve().name) or "adapter"
    with atomic_update(folder, MANIFEST_FILE) as staging:
        collect = _collect_lora if adapter_type == LORA else _collect_bottlenecks
        file, tensors = collect(net, family, name, base, staging)
        _write_tensors(tensors, staging / file)
        write_processor(vocabulary, preprocessing, staging)
        write_manifest(
            staging,
            "adapter",
            task=family.task,
            family=family.name,
            origin=asdict(base_from_origin(base)),
            files=[file],
            adapter={
                "type": adapter_type,
                "language": language,
                "parameters": sum(value.numel() for value in tensors.values()),
            },
            vocabulary=vocabulary_to_dict(vocabulary),
            metrics=metrics,
        )
    return folder


def read_adapter(folder: str | Path) -> Adapter:
    """Read the manifest of the adapter in `folder`, without its weights.

    Raises ModelError if there is no adapter, it has another format version, or its files are missing or damaged.
    """
    folder = Path(folder)
    manifest = find_adapter_manifest(folder)
    ids = read_json(folder / "vocab.json")
    try:
        described, special = manifest.sections["adapter"], manifest.sections["vocabulary"]
        if described["type"] not in (LORA, BOTTLENECK):
            raise ModelError(f"{folder}/{MANIFEST_FILE}: unknown type of adapter {described['type']!r}")
        ((weights_file, sha256),) = manifest.files.items()
        return Adapter(
            folder=folder,
            adapter_type=described["type"],
            base=BaseCheckpoint(**manifest.origin),
            language=described["language"],
            weights_file=weights_file,
            sha256=sha256,
            parameters=described["parameters"],
            vocabulary=vocabulary_from_dict(sorted(ids, key=ids.__getitem__), special),
            preprocessing=read_preprocessing(folder),
            package_versions=manifest.package_versions,
            metrics=manifest.sections["metrics"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / MANIFEST_FILE, error) from None


def find_adapter_manifest(folder: Path, task: str = "ctc") -> Manifest:
    """Return the manifest of the adapter in `folder`. Raises ModelError if it holds none of a model of this task."""
    manifest = find_manifest(folder)
    if manifest is None or manifest.artifact != "adapter" or manifest.task != task:
        reason = "holds no adapter" if folder.is_dir() else "is not a folder"
        if manifest is not None and manifest.artifact == "adapter":
            reason = f"holds an adapter of a {manifest.task} model, not of a {task} model"
        raise ModelError(f"{folder} {reason}: use a folder with a {MANIFEST_FILE} that `mowa train` wrote")
    return manifest


def load_adapter(model: CTCModel, folder: str | Path) -> CTCModel:
    """Load the adapter in `folder` over its base `model` and return a new model, in eval mode and frozen.

    `model` does not change. Its tensors are shared, not copied; the adapter's are moved to its device and dtype.

    Raises ModelError if there is no adapter, it belongs to another base, `model` has an adapter already, or files are
    damaged; MissingDependency for LoRA without PEFT.
    """
    adapter = read_adapter(folder)
    validate_base(adapter, model)
    state = _read_tensors(adapter)
    base_requires_grad = [(parameter, parameter.requires_grad) for parameter in model.net.parameters()]
    net = copy_sharing_weights(model.net)
    like = next(net.parameters())
    state = {name: value.to(like.device, like.dtype) for name, value in state.items()}
    try:
        (_insert_lora if adapter.adapter_type == LORA else _insert_bottlenecks)(net, model.family, adapter, state)
        _insert_head(net, model.family, adapter, state)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(
            f"{adapter.folder}/{adapter.weights_file} does not fit {adapter.base.name}: {reason}"
        ) from error
    net.requires_grad_(False)
    for parameter, requires_grad in base_requires_grad:  # shared with the base
        parameter.requires_grad_(requires_grad)
    net.mowa_adapter = str(adapter.folder)
    suffix = adapter.folder.resolve().name
    origin = replace(model.origin, name=f"{model.origin.name}+{suffix}", source=f"{model.origin.source}+{suffix}")
    processor = SpeechProcessor(adapter.vocabulary, adapter.preprocessing)
    return replace(model, net=net.eval(), origin=origin, processor=processor)


def copy_sharing_weights(net: Any) -> Any:
    """Copy modules and config of `net`, but share its parameters and buffers."""
    memo = {id(tensor): tensor for tensor in chain(net.parameters(), net.buffers())}
    return copy.deepcopy(net, memo)


def base_from_origin(origin: Origin) -> BaseCheckpoint:
    """Describe a checkpoint as the base of an adapter: by Hub id or alias, or else by its absolute folder."""
    has_global_name = origin.revision is not None or origin.name in MODEL_ALIASES
    source = (origin.source if origin.revision else origin.name) if has_global_name else str(origin.folder.resolve())
    return BaseCheckpoint(origin.name, source, origin.revision, hash_weights(origin.folder))


def _collect_lora(net: Any, family: Family, name: str, base: Origin, out: Path) -> tuple[str, dict[str, Tensor]]:
    """Write adapter_config.json into `out`, and return name and tensors of the weights file."""
    if not lora.has(net):
        raise ModelError("this model has no LoRA to save")
    peft = lora.import_peft()
    config = copy.deepcopy(net.peft_config[lora.ADAPTER_NAME])
    config.modules_to_save, config.inference_mode = [family.head], True
    config.base_model_name_or_path = base_from_origin(base).source
    config.revision = base.revision
    config.save_pretrained(str(out))
    tensors = peft.get_peft_model_state_dict(net, adapter_name=lora.ADAPTER_NAME, save_embedding_layers=False)
    head = getattr(net, family.head).state_dict(prefix=f"{family.head}.")
    return "adapter_model.safetensors", {f"{PEFT_PREFIX}{key}": value for key, value in (tensors | head).items()}


def _collect_bottlenecks(net: Any, family: Family, name: str, base: Origin, out: Path) -> tuple[str, dict[str, Tensor]]:
    if not bottleneck.has(net):
        raise ModelError("this model has no bottleneck adapters to save")
    return f"adapter.{name}.safetensors", bottleneck.adapter_state_dict(net, family)


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    separate = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(separate, file, metadata={"format": "pt"})


def validate_base(adapter: Any, model: Any) -> None:
    """Raise ModelError if `adapter` was trained over another model than `model`, or `model` has an adapter already."""
    if present := getattr(model.net, "mowa_adapter", None):
        raise ModelError(f"{adapter.folder} cannot be loaded over the adapter {present}: load it over the base model")
    base, origin = adapter.base, model.origin
    if base.revision is not None and (base.source, base.revision) == (origin.source, origin.revision):
        return
    if base.sha256 != (found := hash_weights(origin.folder)):
        raise ModelError(
            f"{adapter.folder} was trained over {base.load_name} (weights {base.sha256[:12]}…), not over"
            f" {origin.name} (weights {found[:12]}…)"
        )


def _read_tensors(adapter: Adapter) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    find_adapter_manifest(adapter.folder).verify_files()
    return load_file(adapter.folder / adapter.weights_file)


def _insert_lora(net: Any, family: Family, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    if lora.has(net):
        raise ModelError(f"{adapter.folder} cannot be loaded over a model with LoRA: load it over the base model")
    peft = lora.import_peft()
    config = peft.LoraConfig.from_pretrained(str(adapter.folder))
    config.modules_to_save, config.inference_mode = None, True  # `_insert_head` adds the head
    peft.inject_adapter_in_model(config, net, lora.ADAPTER_NAME, low_cpu_mem_usage=True)
    head = f"{PEFT_PREFIX}{family.head}."
    tensors = {name: value for name, value in state.items() if not name.startswith(head)}
    report = peft.set_peft_model_state_dict(net, tensors, lora.ADAPTER_NAME, low_cpu_mem_usage=True)
    missing = [name for name in report.missing_keys if ".lora_" in name]
    if missing or report.unexpected_keys:
        raise ValueError(_describe_mismatch(missing, report.unexpected_keys))


def _insert_bottlenecks(net: Any, family: Family, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    layers = {name: value for name, value in state.items() if ".adapter_layer." in name}
    widths = {value.shape[0] for name, value in layers.items() if name.endswith(".linear_1.weight")}
    if len(widths) != 1:
        raise ModelError(
            f"{adapter.folder}/{adapter.weights_file} holds adapters of {len(widths)} widths, expected one"
        )
    bottleneck.insert_on_meta(net, family, widths.pop())
    report = net.load_state_dict(layers, strict=False, assign=True)
    missing = [name for name in report.missing_keys if ".adapter_layer." in name]
    if missing or report.unexpected_keys:
        raise ValueError(_describe_mismatch(missing, report.unexpected_keys))


def _insert_head(net: Any, family: Family, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    prefix = f"{PEFT_PREFIX if adapter.adapter_type == LORA else ''}{family.head}."
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    vocabulary = adapter.vocabulary
    head = nn.Linear(getattr(net, family.head).in_features, len(vocabulary), bias="bias" in tensors, device="meta")
    head.load_state_dict(tensors, assign=True)
    setattr(net, family.head, head)
    net.config.vocab_size, net.config.pad_token_id = len(vocabulary), vocabulary.blank
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    net.config.bos_token_id, net.config.eos_token_id = ids.get("<s>"), ids.get("</s>")


def _describe_mismatch(missing: list[str], unexpected: list[str]) -> str:
    return f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unexpected"
