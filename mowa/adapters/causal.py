"""Save, load and merge LoRA adapters of language models.

A folder holds `mowa.json` (base and metrics), `adapter_config.json` and `adapter_model.safetensors` as
`PeftModel.from_pretrained(base, folder)` reads them, and the tokenizer. A merged model is compared with the unmerged
one before it is written.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mowa.adapters import checkpoint, embeddings, lora
from mowa.errors import DataError, ModelError
from mowa.families import family_of
from mowa.io.atomic import atomic_update, read_json
from mowa.io.hub import silence_transformers
from mowa.io.manifest import MANIFEST_FILE, damaged, find_manifest, write_manifest
from mowa.io.tokenizer import align_generation_config, with_padding, write_tokenizer
from mowa.io.weights import fix_weight_permissions
from mowa.models.causal.token_logits import iter_token_logits
from mowa.models.diff import ModelDiff, compare_pairs
from mowa.models.tolerances import MERGE_DRIFT_RATIO, MERGE_KL_FLOOR, MERGE_MIN_AGREEMENT
from mowa.types import CausalModel, Origin, TextProcessor

TASK, WEIGHTS_FILE, CHAT_TEMPLATE_FILE = "causal", "adapter_model.safetensors", "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class CausalAdapter:
    """Contents of the manifest of a LoRA adapter."""

    folder: Path
    base: checkpoint.BaseCheckpoint
    sha256: str
    parameters: int
    package_versions: Mapping[str, str | None]
    metrics: Mapping[str, Any]


def is_causal_adapter(folder: Path) -> bool:
    """Return whether `folder` holds an adapter of a language model."""
    manifest = find_manifest(folder)
    return manifest is not None and (manifest.artifact, manifest.task) == ("adapter", TASK)


def save_adapter(net: Any, folder: Path, *, base: Origin, tokenizer: Any, metrics: Mapping[str, Any]) -> Path:
    """Write the adapter of `net` (a PeftModel) and the tokenizer into `folder`, and return `folder`.

    Other files in it are kept.
    """
    from safetensors.torch import load_file

    base_checkpoint = checkpoint.base_from_origin(base)
    with atomic_update(folder, MANIFEST_FILE) as staging:
        net.peft_config[lora.ADAPTER_NAME].base_model_name_or_path = base_checkpoint.source
        net.peft_config[lora.ADAPTER_NAME].revision = base_checkpoint.revision
        net.save_pretrained(staging, save_embedding_layers=False)
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's template
        write_tokenizer(tokenizer, staging)
        write_manifest(
            staging,
            "adapter",
            task=TASK,
            family=family_of(net).name,
            origin=asdict(base_checkpoint),
            files=[WEIGHTS_FILE],
            adapter={
                "type": checkpoint.LORA,
                "parameters": sum(value.numel() for value in load_file(staging / WEIGHTS_FILE).values()),
            },
            metrics=metrics,
        )
    return folder


def read_adapter(folder: Path) -> CausalAdapter:
    """Read the manifest of the adapter in `folder`, without its weights.

    Raises ModelError if there is no adapter of a language model, it has another format version, or it is damaged.
    """
    manifest = checkpoint.find_adapter_manifest(folder, TASK)
    try:
        return CausalAdapter(
            folder=folder,
            base=checkpoint.BaseCheckpoint(**manifest.origin),
            sha256=manifest.files[WEIGHTS_FILE],
            parameters=manifest.sections["adapter"]["parameters"],
            package_versions=manifest.package_versions,
            metrics=manifest.sections["metrics"],
        )
    except (KeyError, TypeError) as error:
        raise damaged(folder / MANIFEST_FILE, error) from None


def load_adapter(model: CausalModel, folder: str | Path) -> CausalModel:
    """Load the adapter in `folder` over its base `model` and return a new model, in eval mode and frozen.

    `model` does not change. The new tokenizer has the chat template that the adapter was trained with.

    Raises ModelError if there is no adapter, it belongs to another base, or files are damaged; MissingDependency
    without PEFT.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    checkpoint.validate_base(adapter, model)
    checkpoint.find_adapter_manifest(folder, TASK).verify_files()
    net = checkpoint.copy_sharing_weights(model.net)
    embeddings.resize(net, embeddings.saved_rows(net, folder, folder / WEIGHTS_FILE), mean_resizing=False)
    net = lora.load_peft_model(net, folder, autocast_adapter_dtype=False)
    net.mowa_adapter = str(folder)
    tokenizer = adapter_tokenizer(model, folder)
    suffix = folder.resolve().name
    origin = replace(model.origin, name=f"{model.origin.name}+{suffix}", source=f"{model.origin.source}+{suffix}")
    return replace(model, net=net.eval().requires_grad_(False), origin=origin, processor=TextProcessor(tokenizer))


def adapter_tokenizer(model: CausalModel, folder: Path) -> Any:
    """Return the tokenizer for the adapter in `folder`: a copy of the model's, or its own where the tokens differ.

    A chat template in the folder is used in both cases, else that of the model.
    """
    tokenizer = copy.copy(model.tokenizer)
    if any((folder / name).is_file() for name in embeddings.TOKENIZER_FILES):
        from transformers import AutoTokenizer

        with silence_transformers():
            own = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        template = own.chat_template or tokenizer.chat_template
        tokenizer = own if own.get_vocab() != tokenizer.get_vocab() else tokenizer
        tokenizer.chat_template = template
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        tokenizer.chat_template = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    return tokenizer


def merge_adapter(model: CausalModel, dtype: str = "auto") -> CausalModel:
    """Return a copy of `model` in `dtype` whose LoRA, if it has any, is merged into the weights. It needs no PEFT.

    Sums are computed in float64 and rounded once. With `dtype` auto, weights keep their dtype. Buffers keep theirs:
    transformers computes rotary frequencies in float32.
    """
    net = checkpoint.copy_sharing_weights(model.net)
    torch_dtype = net.dtype if dtype == "auto" else getattr(torch, dtype)
    if lora.has(net):
        net = net.get_base_model()
        lora.merge_and_unload(net, torch_dtype)
        vars(net).pop("peft_config", None)
        adapter = getattr(model.net, "mowa_adapter", "of this model")
        net.mowa_adapter = f"{adapter}{checkpoint.MERGED_SUFFIX}"  # so that no other is loaded over it
    if {parameter.dtype for parameter in net.parameters()} != {torch_dtype}:
        net = copy.deepcopy(net)
        for parameter in net.parameters():
            parameter.data = parameter.data.to(torch_dtype)
    return replace(model, net=net.eval())


def round_as_merged(base: CausalModel, adapted: CausalModel, dtype: str) -> CausalModel | None:
    """Return a copy of `base` with the rounding errors that its merged weights have in `dtype`; None if it needs none.

    A base that is stored in `dtype` does not change when it is rounded to it, but its merged weights do. The copy has
    their rounding errors added to the weights of the base. `base` is float32 and is not changed.
    """
    net, changed = merge_adapter(adapted, "float32").net, False
    weights = dict(base.net.named_parameters())
    for name, merged in net.named_parameters():
        weight = weights[name]
        if merged is weight or merged.shape != weight.shape:
            continue
        exact, low = merged.data, getattr(torch, dtype)
        merged.data = weight.data
        if torch.equal(weight.to(low).to(weight.dtype), weight) and not torch.equal(exact, weight):
            merged.data, changed = weight.data + (exact.to(low).to(exact.dtype) - exact), True
    return replace(base, net=net.eval()) if changed else None


def verify_merge(merged: ModelDiff, *rounding: ModelDiff) -> None:
    """Raise ModelError if a merged model differs too much from the unmerged one.

    In float32 the top token must agree at `MERGE_MIN_AGREEMENT` of the positions. In half precision, where near ties
    flip, `rounding` has the differences of the base model from its copy in that dtype, and from its copy with the
    rounding errors of the merge. The merged model may differ `MERGE_DRIFT_RATIO` times as much as their sum, plus one
    standard deviation of the number of flipped tokens. If its KL divergence is within the sum, flips are ignored. NaN
    is never allowed.
    """
    limit, kl_limit, expected_kl = 1 - MERGE_MIN_AGREEMENT, math.inf, -math.inf
    if rounding:
        expected_kl = sum(one.kl for one in rounding)
        flips = MERGE_DRIFT_RATIO * sum(1 - one.agreement for one in rounding) * merged.num_frames
        limit = max(limit, (flips + math.sqrt(flips)) / merged.num_frames)
        kl_limit = MERGE_DRIFT_RATIO * expected_kl + MERGE_KL_FLOOR
    close = 1 - merged.agreement <= limit and merged.kl <= kl_limit
    if math.isfinite(merged.kl) and (close or merged.kl <= expected_kl):
        return
    measured = "".join(f"; rounding the base model alone: {one}" for one in rounding)
    raise ModelError(
        f"the merged model differs from the trained one: {merged}{measured}\n  Nothing was written; try --dtype float32"
    )


def stored_dtype(folder: Path) -> str:
    """Return the dtype that config.json of a checkpoint names, such as bfloat16; float32 without one."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}  # beside a GGUF file
    name = str(config.get("dtype") or config.get("torch_dtype"))
    return name if isinstance(getattr(torch, name, None), torch.dtype) else "float32"


@torch.inference_mode()
def compare_logits(
    reference: CausalModel, candidate: CausalModel, batches: Iterable[Mapping[str, Tensor]]
) -> ModelDiff:
    """Compare the next-token distributions of two models over batches (input_ids and attention_mask, int64 [B, N]).

    Raises ModelError if the vocabularies have other sizes, or the batches hold no tokens.
    """

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            mask = inputs["attention_mask"].bool()
            chunks = [iter_token_logits(model.net, inputs, mask) for model in (reference, candidate)]
            for ours, theirs in zip(*chunks, strict=True):
                if ours.shape != theirs.shape:
                    raise ModelError(
                        f"the models predict {ours.shape[-1]} and {theirs.shape[-1]} tokens: they do not match"
                    )
                yield ours, theirs

    found = compare_pairs(outputs())
    if not found.num_frames:
        raise ModelError("the batches hold no tokens: nothing was compared")
    return found


def write_checkpoint(model: CausalModel, folder: Path) -> None:
    """Write weights, configs and tokenizer into `folder`, ready to be padded (`mowa.io.tokenizer`).

    Raises DataError if it cannot be written.
    """
    from safetensors import SafetensorError

    net, generation_config = model.net, model.net.generation_config
    tokenizer = with_padding(model.tokenizer)
    try:
        with silence_transformers():
            net.generation_config = align_generation_config(generation_config, tokenizer)
            net.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        net.generation_config = generation_config
    fix_weight_permissions(folder)
