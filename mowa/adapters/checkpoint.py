"""Adapters on disk, a few megabytes each, and several of them over one base in memory.

A folder holds `mowa.json` (what it is, and of which base), its weights, and the files of its vocabulary and its audio
settings as transformers has them:

- lora: `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, the head whole (`modules_to_save`).
  `PeftModel.from_pretrained(base, folder)` reads it, once the base's head has as many outputs as the vocabulary:
  `AutoModelForCTC.from_pretrained(base, vocab_size=…, ignore_mismatched_sizes=True)`.
- adapters: `adapter.<name>.safetensors` as MMS has them, head included; `<name>` is the language, or else the folder's.
  `Wav2Vec2ForCTC.load_adapter(name)` reads it on a base made with `adapter_attn_dim`.

`load` gives a net of its own for each adapter: its own modules, head and vocabulary over the very tensors of the base,
which are held once. So choosing an adapter is choosing a `Model`; nothing is switched, and several can be asked at the
same time, from several threads. Move or convert the base before adapters are loaded, not after.

How a net is loaded or trained is not known here.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from mowa.adapters import bottleneck, lora
from mowa.errors import ModelError
from mowa.families import get_family
from mowa.io import processor
from mowa.io.atomic import read_json
from mowa.io.hashing import hash_weights, sha256_file
from mowa.io.hub import MODEL_ALIASES
from mowa.types import Family, Model, Origin, Preprocessing, Vocabulary

MANIFEST, FORMAT_VERSION = "mowa.json", 1
LORA, BOTTLENECK = "lora", "bottleneck"
PEFT_PREFIX = "base_model.model."  # before every name in PEFT's files


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """The checkpoint that an adapter was made over. `sha256` is that of its weights (`fingerprint`)."""

    name: str
    source: str
    revision: str | None
    sha256: str

    @property
    def load_name(self) -> str:
        """By which name it can be loaded."""
        return f"{self.source}@{self.revision}" if self.revision else self.source


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter's folder says of itself."""

    folder: Path
    adapter_type: str
    base: BaseCheckpoint
    language: str
    weights_file: str
    sha256: str
    parameters: int
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    package_versions: Mapping[str, str]
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
    """Write the adapter of `kind` (lora or adapters) that `net` has, with its head, into `folder`. → folder.

    `base` says where the net's other weights came from; its files must still be there. What else is in the folder
    stays. A folder whose writing was broken off has no mowa.json, and is no adapter.
    """
    family = get_family(net.config.model_type)
    name = re.sub(r"[^\w-]+", "-", language or folder.resolve().name) or "adapter"
    with atomic_update(folder) as made:
        file, tensors = (_peft if adapter_type == LORA else _mms)(net, family, name, base, made)
        _write_tensors(tensors, made / file)
        processor.write_processor(vocabulary, preprocessing, made)
        note = {
            "format": FORMAT_VERSION,
            "kind": adapter_type,
            "base": asdict(base_from_origin(base)),
            "language": language,
            "weights": {
                "file": file,
                "sha256": sha256_file(made / file),
                "parameters": sum(value.numel() for value in tensors.values()),
            },
            "vocabulary": {
                "blank": vocabulary.blank,
                "delimiter": vocabulary.delimiter,
                "specials": sorted(vocabulary.specials),
            },
            "made_by": package_versions(),
            "metrics": metrics,
        }
        (made / MANIFEST).write_text(json.dumps(note, ensure_ascii=False, indent=1, default=float), encoding="utf-8")
    return folder


def read_adapter(folder: str | Path) -> Adapter:
    """What the adapter in `folder` is, without its weights. ModelError where there is none, or another format's."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        what = "holds no adapter" if folder.is_dir() else "is no folder"
        raise ModelError(f"{folder} {what}: an adapter is a folder with a {MANIFEST}, as `mowa train` writes it")
    note = read_json(folder / MANIFEST)
    if note.get("format") != FORMAT_VERSION or note.get("kind") not in (LORA, BOTTLENECK):
        raise ModelError(f"{folder}/{MANIFEST} is of a format that this mowa does not know: update mowa")
    ids = read_json(folder / "vocab.json")
    sound = read_json(folder / "preprocessor_config.json")
    try:
        special = note["vocabulary"]
        return Adapter(
            folder=folder,
            adapter_type=note["kind"],
            base=BaseCheckpoint(**note["base"]),
            language=note["language"],
            weights_file=note["weights"]["file"],
            sha256=note["weights"]["sha256"],
            parameters=note["weights"]["parameters"],
            vocabulary=Vocabulary(
                tuple(sorted(ids, key=ids.__getitem__)),
                blank=special["blank"],
                delimiter=special["delimiter"],
                specials=frozenset(special["specials"]),
            ),
            preprocessing=Preprocessing(
                rate_hz=sound["sampling_rate"],
                normalize=sound["do_normalize"],
                attention_mask=sound["return_attention_mask"],
                padding_value=sound["padding_value"],
            ),
            package_versions=note["made_by"],
            metrics=note["metrics"],
        )
    except (KeyError, TypeError) as missing:
        raise ModelError(f"{folder} is damaged: its files do not say {missing}") from None


def load_adapter(model: Model, folder: str | Path) -> Model:
    """The adapter in `folder` over the weights of `model`, its base, which stays as it is. In eval mode, frozen.

    The tensors of the base are shared, not copied; the adapter's own take its device and dtype.

    Raises ModelError: no adapter there, an adapter of another base, an adapter over an adapter, damaged files.
    MissingPart: a LoRA without PEFT.
    """
    adapter = read_adapter(folder)
    validate_base(adapter, model)
    state = _tensors(adapter)
    learning = [(parameter, parameter.requires_grad) for parameter in model.net.parameters()]
    net = copy_sharing_weights(model.net)
    like = next(net.parameters())
    state = {name: value.to(like.device, like.dtype) for name, value in state.items()}
    try:
        (_put_lora if adapter.adapter_type == LORA else _put_bottlenecks)(net, model.family, adapter, state)
        _put_head(net, model.family, adapter, state)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(
            f"{adapter.folder}/{adapter.weights_file} does not fit {adapter.base.name}: {reason}"
        ) from error
    net.requires_grad_(False)
    for parameter, learns in learning:  # those of the base are its own affair
        parameter.requires_grad_(learns)
    net.mowa_adapter = str(adapter.folder)
    called = adapter.folder.resolve().name
    origin = replace(model.origin, name=f"{model.origin.name}+{called}", source=f"{model.origin.source}+{called}")
    return replace(
        model, net=net.eval(), origin=origin, vocabulary=adapter.vocabulary, preprocessing=adapter.preprocessing
    )


def copy_sharing_weights(net: Any) -> Any:
    """A net of its own over the very tensors of `net`: modules and config are copied, weights and buffers are not."""
    memo = {id(tensor): tensor for tensor in chain(net.parameters(), net.buffers())}
    return copy.deepcopy(net, memo)


def package_versions() -> dict[str, str]:
    """The versions of the packages that write adapters."""
    return {
        package: found for package in ("mowa", "torch", "transformers", "peft") if (found := installed_version(package))
    }


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def base_from_origin(origin: Origin) -> BaseCheckpoint:
    """A folder is named whole, so that it is found from elsewhere; an alias and a hub id are names of their own."""
    named = origin.revision is not None or origin.name in MODEL_ALIASES
    source = (origin.source if origin.revision else origin.name) if named else str(origin.folder.resolve())
    return BaseCheckpoint(origin.name, source, origin.revision, hash_weights(origin.folder))


def _peft(net: Any, family: Family, name: str, base: Origin, made: Path) -> tuple[str, dict[str, Tensor]]:
    """adapter_config.json into `made`; → the name of the weights file, and what is to be in it."""
    if not lora.has(net):
        raise ModelError("this net has no low-rank updates to save")
    peft = lora.import_peft()
    config = copy.deepcopy(net.peft_config[lora.ADAPTER_NAME])
    config.modules_to_save, config.inference_mode = [family.head], True
    config.base_model_name_or_path = base_from_origin(base).source
    config.revision = base.revision
    config.save_pretrained(str(made))
    tensors = peft.get_peft_model_state_dict(net, adapter_name=lora.ADAPTER_NAME, save_embedding_layers=False)
    head = getattr(net, family.head).state_dict(prefix=f"{family.head}.")
    return "adapter_model.safetensors", {f"{PEFT_PREFIX}{key}": value for key, value in (tensors | head).items()}


def _mms(net: Any, family: Family, name: str, base: Origin, made: Path) -> tuple[str, dict[str, Tensor]]:
    if not bottleneck.has(net):
        raise ModelError("this net has no bottleneck adapters to save")
    return f"adapter.{name}.safetensors", bottleneck.adapter_state_dict(net, family)


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(plain, file, metadata={"format": "pt"})


@contextmanager
def atomic_update(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files then take their places in `folder`, the note of what they are last."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".adapter-") as name:
        made = Path(name)
        yield made
        (folder / MANIFEST).unlink(missing_ok=True)
        readers = (made / MANIFEST).stat().st_mode  # safetensors lets nobody but the writer read
        for file in sorted(made.iterdir(), key=lambda file: file.name == MANIFEST):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
            file.chmod(readers)
            os.replace(file, folder / file.name)


def validate_base(adapter: Any, model: Any) -> None:
    """ModelError where `adapter` (a folder, a base) was made over another model than `model`, or over an adapter."""
    if already := getattr(model.net, "mowa_adapter", None):
        raise ModelError(f"{adapter.folder} cannot stand on the adapter {already}: load it over the base of both")
    base, origin = adapter.base, model.origin
    if base.revision is not None and (base.source, base.revision) == (origin.source, origin.revision):
        return
    if base.sha256 != (found := hash_weights(origin.folder)):
        raise ModelError(
            f"{adapter.folder} wants {base.where} (weights {base.sha256[:12]}…) as its base;"
            f" {origin.name} is another (weights {found[:12]}…)"
        )


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = adapter.folder / adapter.weights_file
    if not file.is_file():
        raise ModelError(f"{adapter.folder} lacks its weights, {adapter.weights_file}")
    if sha256_file(file) != adapter.sha256:
        raise ModelError(f"{file} is damaged, or another adapter's: its checksum is not the one in {MANIFEST}")
    return load_file(file)


def _put_lora(net: Any, family: Family, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    if lora.has(net):
        raise ModelError(f"{adapter.folder} cannot stand on a net with low-rank updates: load it over its base")
    peft = lora.import_peft()
    config = peft.LoraConfig.from_pretrained(str(adapter.folder))
    config.modules_to_save, config.inference_mode = None, True  # the head is put in by `_put_head`
    peft.inject_adapter_in_model(config, net, lora.ADAPTER_NAME, low_cpu_mem_usage=True)
    head = f"{PEFT_PREFIX}{family.head}."
    updates = {name: value for name, value in state.items() if not name.startswith(head)}
    report = peft.set_peft_model_state_dict(net, updates, lora.ADAPTER_NAME, low_cpu_mem_usage=True)
    missing = [name for name in report.missing_keys if ".lora_" in name]
    if missing or report.unexpected_keys:
        raise ValueError(f"{(missing or report.unexpected_keys)[0]} is in one and not in the other")


def _put_bottlenecks(net: Any, family: Family, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    layers = {name: value for name, value in state.items() if ".adapter_layer." in name}
    widths = {value.shape[0] for name, value in layers.items() if name.endswith(".linear_1.weight")}
    if len(widths) != 1:
        raise ModelError(
            f"{adapter.folder}/{adapter.weights_file} holds adapters of {len(widths)} widths; it must be one"
        )
    bottleneck.insert_on_meta(net, family, widths.pop())
    report = net.load_state_dict(layers, strict=False, assign=True)
    missing = [name for name in report.missing_keys if ".adapter_layer." in name]
    if missing or report.unexpected_keys:
        raise ValueError(f"{(missing or report.unexpected_keys)[0]} is in one and not in the other")


def _put_head(net: Any, family: Family, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    prefix = f"{PEFT_PREFIX if adapter.adapter_type == LORA else ''}{family.head}."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    words = adapter.vocabulary
    head = nn.Linear(getattr(net, family.head).in_features, len(words), bias="bias" in own, device="meta")
    head.load_state_dict(own, assign=True)
    setattr(net, family.head, head)
    net.config.vocab_size, net.config.pad_token_id = len(words), words.blank
    named = {token: index for index, token in enumerate(words.tokens)}
    net.config.bos_token_id, net.config.eos_token_id = named.get("<s>"), named.get("</s>")
