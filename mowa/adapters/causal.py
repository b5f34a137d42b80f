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

from mowa.adapters import checkpoint, lora
from mowa.errors import DataError, ModelError
from mowa.io.atomic import atomic_folder, atomic_write, read_json
from mowa.io.hub import silence_transformers
from mowa.io.weights import fix_weight_permissions
from mowa.types import LanguageModel, Origin

TASK, WEIGHTS_FILE, CHAT_TEMPLATE_FILE = "causal", "adapter_model.safetensors", "chat_template.jinja"
MIN_AGREEMENT = 0.995  # of the tokens, the share on whose likeliest successor a merged model has to agree
MAX_DRIFT_RATIO = 2.0  # in half precision: as far as the base is from itself, so many times


@dataclass(frozen=True, slots=True)
class CausalAdapter:
    """What a folder with low-rank updates says of itself."""

    folder: Path
    base: checkpoint.BaseCheckpoint
    sha256: str
    parameters: int
    package_versions: Mapping[str, str]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LogitDiff:
    """How far two models are apart over `tokens` places: KL divergence of what may come next (mean and largest, nats),
    and the share of places at which both find the same token likeliest."""

    mean_kl: float
    max_kl: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"over {self.tokens:,} tokens: the same token is likeliest at {self.agreement:.2%}, KL divergence "
            f"{self.mean_kl:.2g} nats (at most {self.max_kl:.2g})"
        )


def is_causal_adapter(folder: Path) -> bool:
    """Whether `folder` holds updates of a language model."""
    return (folder / checkpoint.MANIFEST).is_file() and read_json(folder / checkpoint.MANIFEST).get("task") == TASK


def save_adapter(net: Any, folder: Path, *, base: Origin, tokenizer: Any, metrics: Mapping[str, Any]) -> Path:
    """Write the updates of `net` (a PeftModel) into `folder`. → folder. What else is in it stays."""
    found = checkpoint.base_from_origin(base)
    with checkpoint.atomic_update(folder) as made:
        net.peft_config[lora.ADAPTER_NAME].base_model_name_or_path = found.source
        net.peft_config[lora.ADAPTER_NAME].revision = found.revision
        net.save_pretrained(made, save_embedding_layers=False)
        (made / "README.md").unlink(missing_ok=True)  # a form to fill in
        tokenizer.save_pretrained(made)
        known = {
            "format": checkpoint.FORMAT_VERSION,
            "task": TASK,
            "kind": checkpoint.LORA,
            "base": asdict(found),
            "weights": {
                "file": WEIGHTS_FILE,
                "sha256": checkpoint.sha256_file(made / WEIGHTS_FILE),
                "parameters": sum(value.numel() for name, value in net.named_parameters() if ".lora_" in name),
            },
            "made_by": checkpoint.package_versions(),
            "metrics": metrics,
        }
        (made / checkpoint.MANIFEST).write_text(
            json.dumps(known, ensure_ascii=False, indent=1, default=float), encoding="utf-8"
        )
    return folder


def write_metrics(folder: Path, *, metrics: Mapping[str, Any]) -> None:
    """Write into `folder`'s note how well its updates do."""
    known = read_json(folder / checkpoint.MANIFEST) | {"metrics": metrics}
    atomic_write(folder / checkpoint.MANIFEST, json.dumps(known, ensure_ascii=False, indent=1, default=float))


def read_adapter(folder: Path) -> CausalAdapter:
    """What the updates in `folder` are, without their weights. ModelError where there are none."""
    if not is_causal_adapter(folder):
        raise ModelError(f"{folder} holds no updates of a language model: `mowa train` writes such folders")
    known = read_json(folder / checkpoint.MANIFEST)
    if known.get("format") != checkpoint.FORMAT_VERSION:
        raise ModelError(f"{folder}/{checkpoint.MANIFEST} is of a format that this mowa does not know: update mowa")
    try:
        return CausalAdapter(
            folder=folder,
            base=checkpoint.BaseCheckpoint(**known["base"]),
            sha256=known["weights"]["sha256"],
            parameters=known["weights"]["parameters"],
            package_versions=known["made_by"],
            metrics=known["metrics"],
        )
    except (KeyError, TypeError) as missing:
        raise ModelError(f"{folder} is damaged: its {checkpoint.MANIFEST} does not say {missing}") from None


def load_adapter(model: LanguageModel, folder: Path) -> LanguageModel:
    """The updates in `folder` over the weights of `model`, their base, which stays as it is. In eval mode, frozen.

    Its tokenizer writes conversations as they were learnt, if that was not with the base's own template.
    Raises ModelError: no updates there, updates of another base, damaged files. MissingPart without PEFT.
    """
    updates = read_adapter(folder)
    checkpoint.validate_base(updates, model)
    if checkpoint.sha256_file(folder / WEIGHTS_FILE) != updates.sha256:
        raise ModelError(
            f"{folder}/{WEIGHTS_FILE} is damaged, or another adapter's: its checksum is not in {checkpoint.MANIFEST}"
        )
    net = lora.load_peft_model(checkpoint.copy_sharing_weights(model.net), folder, autocast_adapter_dtype=False)
    net.mowa_adapter = str(folder)
    tokenizer = copy.copy(model.tokenizer)
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        tokenizer.chat_template = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    return LanguageModel(net.eval().requires_grad_(False), model.family, model.origin, tokenizer)


def merge_adapter(model: LanguageModel, dtype: str) -> LanguageModel:
    """The net of `model` (a PeftModel) without PEFT, every weight with its updates in it, in `dtype`. `model` stays.

    Sums are made in float64 and rounded once.
    """
    kind = getattr(torch, dtype)
    net = checkpoint.copy_sharing_weights(model.net).get_base_model()
    lora.merge_and_unload(net, kind)
    if net.dtype != kind:
        net = copy.deepcopy(net).to(kind)
    net.mowa_adapter = f"{getattr(model.net, 'mowa_adapter', 'that it had')} (merged)"  # no other may stand on it
    return LanguageModel(net.eval(), model.family, model.origin, model.tokenizer)


def verify_merge(merged: LogitDiff, base_rounded: LogitDiff | None = None) -> None:
    """ModelError where a merged model is not what it was made of.

    In float32 both must find the same token likeliest at LEAST of the places. In half precision a merged model may be
    TIMES as far from what was trained as the base is from itself, `rounded` to that precision: near ties flip there.
    """
    away, room = 1 - merged.agreement, 1 - MIN_AGREEMENT
    allowed = max(room, MAX_DRIFT_RATIO * (1 - base_rounded.agreement)) if base_rounded else room
    if away <= allowed and (base_rounded is None or merged.mean_kl <= MAX_DRIFT_RATIO * base_rounded.mean_kl + 1e-6):
        return
    beside = f"; the base rounded so: {base_rounded}" if base_rounded else ""
    raise ModelError(
        f"the merged model is not what was trained: {merged}{beside}.\n  Nothing was written; try --dtype float32, "
        "which keeps every bit of the updates"
    )


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision in which `folder`'s weights were written, as its config says; float32 where it is silent."""
    config = read_json(folder / "config.json")
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


@torch.inference_mode()
def compare_logits(
    reference: LanguageModel, candidate: LanguageModel, batches: Iterable[Mapping[str, Tensor]]
) -> LogitDiff:
    """What both say may come next, at every place of the batches (input_ids and attention_mask, int64 [B, N]).

    ModelError where nothing is compared.
    """
    divergence, largest, agreeing, tokens = 0.0, 0.0, 0, 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        seen = inputs["attention_mask"].bool()
        ours, theirs = (
            one.net(**{name: value.to(one.net.device) for name, value in inputs.items()}, use_cache=False).logits.cpu()
            for one in (reference, candidate)
        )
        p, q = (logits[seen].double().log_softmax(-1) for logits in (ours, theirs))
        each = (p.exp() * (p - q)).sum(-1).clamp(min=0)
        divergence, largest = divergence + float(each.sum()), max(largest, float(each.max()))
        agreeing, tokens = agreeing + int((p.argmax(-1) == q.argmax(-1)).sum()), tokens + len(p)
    if not tokens:
        raise ModelError("there are no tokens to compare two models over")
    return LogitDiff(divergence / tokens, largest, agreeing / tokens, tokens)


@contextmanager
def atomic_checkpoint(model: LanguageModel, out: Path) -> Iterator[Path]:
    """A folder with the whole checkpoint of `model`, to be examined; it becomes `out` as `files.becoming` says."""
    with atomic_folder(out) as folder:
        write_checkpoint(model, folder)
        yield folder


def write_checkpoint(model: LanguageModel, folder: Path) -> None:
    """Weights, config, generation settings and tokenizer into `folder`. DataError where it is full, or not ours."""
    from safetensors import SafetensorError

    try:
        with silence_transformers():
            model.net.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    fix_weight_permissions(folder)
