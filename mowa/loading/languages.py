"""Select one language of an MMS checkpoint (arXiv:2305.13516): its vocabulary, bottleneck adapters and head.

`vocab.json` has a vocabulary per language, and `adapter.LANG.safetensors` (or `.bin`) adapters and head. Those in the
checkpoint's own weights belong to the `target_lang` of tokenizer_config.json.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mowa.adapters import bottleneck
from mowa.errors import ModelError
from mowa.io.atomic import read_json
from mowa.io.weights import read_tensors
from mowa.types import Family

log = logging.getLogger("mowa")


def adapter_files(target_lang: str | None) -> tuple[str, ...]:
    """Return the names that the adapter file of a language may have, none for None."""
    return (f"adapter.{target_lang}.safetensors", f"adapter.{target_lang}.bin") if target_lang else ()


def list_languages(folder: Path) -> tuple[str, ...]:
    """Return the languages of a checkpoint, sorted; none if it has a single vocabulary."""
    vocab = read_json(folder / "vocab.json") if (folder / "vocab.json").is_file() else {}
    return tuple(sorted(name for name, value in vocab.items() if isinstance(value, dict)))


def validate_language(folder: Path, target_lang: str | None, name: str) -> None:
    """Raise ModelError if the checkpoint in `folder`, which is called `name`, does not have the language."""
    if target_lang is None:
        return
    languages = list_languages(folder)
    if not languages or read_json(folder / "config.json").get("adapter_attn_dim") is None:
        raise ModelError(f"{name} has no language adapters (MMS), so it takes no target_lang: omit {target_lang!r}")
    if target_lang not in languages:
        close = difflib.get_close_matches(target_lang, languages, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"for example {', '.join(languages[:5])}"
        raise ModelError(f"{name} has no language {target_lang!r} among its {len(languages)}: {hint}")


def load_language(net: Any, family: Family, folder: Path, target_lang: str | None) -> None:
    """Load adapters and head of a language into `net`, in place; None keeps those of the checkpoint's own weights.

    As `Wav2Vec2ForCTC.load_adapter`. Raises ModelError if the adapter file is missing, damaged or does not fit.
    """
    if target_lang is None:
        if list_languages(folder):
            default = read_json(folder / "tokenizer_config.json").get("target_lang")
            log.info("%s: no target_lang was given, using the default of its tokenizer, %s", folder, default)
        return
    file = next((folder / name for name in adapter_files(target_lang) if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder} has no {' or '.join(adapter_files(target_lang))}: download it again")
    _assign(net, family, read_tensors(file), file)


def _assign(net: Any, family: Family, tensors: dict[str, Tensor], file: Path) -> None:
    """Replace the head by one of the language's size, and copy the tensors."""
    weight = tensors.get(f"{family.head}.weight")
    expected = bottleneck.adapter_state_dict(net, family)
    if weight is None or (wrong := sorted(expected.keys() ^ tensors.keys())):
        raise ModelError(f"{file} does not fit the checkpoint: {wrong[0] if weight is not None else family.head}")
    head = net.get_submodule(family.head)
    if len(weight) != head.out_features:
        net.set_submodule(family.head, nn.Linear(head.in_features, len(weight)).to(head.weight))
        net.config.vocab_size = len(weight)
    try:
        net.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{file} does not fit the checkpoint: {str(error).splitlines()[-1].strip()}") from error
    net.eval().requires_grad_(False)
