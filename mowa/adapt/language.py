"""Low-rank updates of a language model: on disk as PEFT has them, over their base in memory, and merged into it.

A folder holds `mowa.json` (what it is, and of which base), `adapter_config.json` and `adapter_model.safetensors` as
`PeftModel.from_pretrained(base, folder)` reads them, and the tokenizer. A merged model is compared with the two it was
made of on what people would ask it, and is not written where they disagree.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mowa.adapt import lora, store
from mowa.errors import DataError, ModelError
from mowa.files import atomic_write, becoming, let_read, quiet, read_json
from mowa.nouns import LanguageModel, Origin

TASK, WEIGHTS, TEMPLATE = "causal", "adapter_model.safetensors", "chat_template.jinja"
LEAST = 0.995  # of the tokens, the share on whose likeliest successor a merged model has to agree
TIMES = 2.0  # in half precision: as far as the base is from itself, so many times


@dataclass(frozen=True, slots=True)
class Updates:
    """What a folder with low-rank updates says of itself."""

    folder: Path
    base: store.Base
    sha256: str
    parameters: int
    made_by: Mapping[str, str]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two models are apart over `tokens` places: KL divergence of what may come next (mean and largest, nats),
    and the share of places at which both find the same token likeliest."""

    divergence: float
    largest: float
    agreeing: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"over {self.tokens:,} tokens: the same token is likeliest at {self.agreeing:.2%}, KL divergence "
            f"{self.divergence:.2g} nats (at most {self.largest:.2g})"
        )


def is_here(folder: Path) -> bool:
    """Whether `folder` holds updates of a language model."""
    return (folder / store.NOTE).is_file() and read_json(folder / store.NOTE).get("task") == TASK


def save(net: Any, folder: Path, *, base: Origin, tokenizer: Any, metrics: Mapping[str, Any]) -> Path:
    """Write the updates of `net` (a PeftModel) into `folder`. → folder. What else is in it stays."""
    found = store.base_of(base)
    with store.arriving(folder) as made:
        net.peft_config[lora.NAME].base_model_name_or_path = found.source
        net.peft_config[lora.NAME].revision = found.revision
        net.save_pretrained(made, save_embedding_layers=False)
        (made / "README.md").unlink(missing_ok=True)  # a form to fill in
        tokenizer.save_pretrained(made)
        known = {
            "format": store.FORMAT,
            "task": TASK,
            "kind": store.LORA,
            "base": asdict(found),
            "weights": {
                "file": WEIGHTS,
                "sha256": store.sha256_of(made / WEIGHTS),
                "parameters": sum(value.numel() for name, value in net.named_parameters() if ".lora_" in name),
            },
            "made_by": store.makers(),
            "metrics": metrics,
        }
        (made / store.NOTE).write_text(json.dumps(known, ensure_ascii=False, indent=1, default=float), encoding="utf-8")
    return folder


def note(folder: Path, *, metrics: Mapping[str, Any]) -> None:
    """Write into `folder`'s note how well its updates do."""
    known = read_json(folder / store.NOTE) | {"metrics": metrics}
    atomic_write(folder / store.NOTE, json.dumps(known, ensure_ascii=False, indent=1, default=float))


def read(folder: Path) -> Updates:
    """What the updates in `folder` are, without their weights. ModelError where there are none."""
    if not is_here(folder):
        raise ModelError(f"{folder} holds no updates of a language model: `mowa train` writes such folders")
    known = read_json(folder / store.NOTE)
    if known.get("format") != store.FORMAT:
        raise ModelError(f"{folder}/{store.NOTE} is of a format that this mowa does not know: update mowa")
    try:
        return Updates(
            folder=folder,
            base=store.Base(**known["base"]),
            sha256=known["weights"]["sha256"],
            parameters=known["weights"]["parameters"],
            made_by=known["made_by"],
            metrics=known["metrics"],
        )
    except (KeyError, TypeError) as missing:
        raise ModelError(f"{folder} is damaged: its {store.NOTE} does not say {missing}") from None


def load(model: LanguageModel, folder: Path) -> LanguageModel:
    """The updates in `folder` over the weights of `model`, their base, which stays as it is. In eval mode, frozen.

    Its tokenizer writes conversations as they were learnt, if that was not with the base's own template.
    Raises ModelError: no updates there, updates of another base, damaged files. MissingPart without PEFT.
    """
    updates = read(folder)
    store.refuse_another_base(updates, model)
    if store.sha256_of(folder / WEIGHTS) != updates.sha256:
        raise ModelError(f"{folder}/{WEIGHTS} is damaged, or another adapter's: its checksum is not in {store.NOTE}")
    net = lora.over(store.twin(model.net), folder, autocast_adapter_dtype=False)
    net.mowa_adapter = str(folder)
    tokenizer = copy.copy(model.tokenizer)
    if (folder / TEMPLATE).is_file():
        tokenizer.chat_template = (folder / TEMPLATE).read_text(encoding="utf-8")
    return LanguageModel(net.eval().requires_grad_(False), model.family, model.origin, tokenizer)


def merge(model: LanguageModel, dtype: str) -> LanguageModel:
    """The net of `model` (a PeftModel) without PEFT, every weight with its updates in it, in `dtype`. `model` stays.

    Sums are made in float64 and rounded once.
    """
    kind = getattr(torch, dtype)
    net = store.twin(model.net).get_base_model()
    lora.fold(net, kind)
    if net.dtype != kind:
        net = copy.deepcopy(net).to(kind)
    net.mowa_adapter = f"{getattr(model.net, 'mowa_adapter', 'that it had')} (merged)"  # no other may stand on it
    return LanguageModel(net.eval(), model.family, model.origin, model.tokenizer)


def refuse_drift(found: Agreement, rounded: Agreement | None = None) -> None:
    """ModelError where a merged model is not what it was made of.

    In float32 both must find the same token likeliest at LEAST of the places. In half precision a merged model may be
    TIMES as far from what was trained as the base is from itself, `rounded` to that precision: near ties flip there.
    """
    away, room = 1 - found.agreeing, 1 - LEAST
    allowed = max(room, TIMES * (1 - rounded.agreeing)) if rounded else room
    if away <= allowed and (rounded is None or found.divergence <= TIMES * rounded.divergence + 1e-6):
        return
    beside = f"; the base rounded so: {rounded}" if rounded else ""
    raise ModelError(
        f"the merged model is not what was trained: {found}{beside}.\n  Nothing was written; try --dtype float32, "
        "which keeps every bit of the updates"
    )


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision in which `folder`'s weights were written, as its config says; float32 where it is silent."""
    config = read_json(folder / "config.json")
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


@torch.inference_mode()
def compare(before: LanguageModel, after: LanguageModel, batches: Iterable[Mapping[str, Tensor]]) -> Agreement:
    """What both say may come next, at every place of the batches (input_ids and attention_mask, int64 [B, N]).

    ModelError where nothing is compared.
    """
    divergence, largest, agreeing, tokens = 0.0, 0.0, 0, 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        seen = inputs["attention_mask"].bool()
        ours, theirs = (
            one.net(**{name: value.to(one.net.device) for name, value in inputs.items()}, use_cache=False).logits.cpu()
            for one in (before, after)
        )
        p, q = (logits[seen].double().log_softmax(-1) for logits in (ours, theirs))
        each = (p.exp() * (p - q)).sum(-1).clamp(min=0)
        divergence, largest = divergence + float(each.sum()), max(largest, float(each.max()))
        agreeing, tokens = agreeing + int((p.argmax(-1) == q.argmax(-1)).sum()), tokens + len(p)
    if not tokens:
        raise ModelError("there are no tokens to compare two models over")
    return Agreement(divergence / tokens, largest, agreeing / tokens, tokens)


@contextmanager
def written(model: LanguageModel, out: Path) -> Iterator[Path]:
    """A folder with the whole checkpoint of `model`, to be examined; it becomes `out` as `files.becoming` says."""
    with becoming(out) as folder:
        put(model, folder)
        yield folder


def put(model: LanguageModel, folder: Path) -> None:
    """Weights, config, generation settings and tokenizer into `folder`. DataError where it is full, or not ours."""
    from safetensors import SafetensorError

    try:
        with quiet():
            model.net.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    let_read(folder)
