"""Prepare a language-model run: tokenize data, adapt the net, plan batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mowa import loading
from mowa.adapters import embeddings, lora
from mowa.adapters.loading import is_adapter, load_adapter, merge_adapter, read_base_name
from mowa.data.chat.encode import TokenizedSample
from mowa.errors import RecipeError
from mowa.families import is_registered
from mowa.io.hub import MODEL_ALIASES, fetch_config
from mowa.models.causal import fused_modules, packing
from mowa.tasks import causal
from mowa.training.causal.batches import plan_batches
from mowa.training.causal.dataset import CausalSplits, load_splits
from mowa.training.config.causal import CausalRecipe
from mowa.training.distributed import strategy
from mowa.training.gradient_checkpointing import set_gradient_checkpointing
from mowa.training.sources import hint_at_other_task
from mowa.training.trainer_args import plan_options, resolve_eval_steps
from mowa.types import CausalModel, Family

PRETRAINED_LR, LORA_LR = 1e-5, 2e-4  # default peak rates of pretrained weights and of LoRA


@dataclass(frozen=True, slots=True)
class CausalRun:
    """Inputs of the trainer. `model` has the net as it is trained; `batches` index `splits.train`.

    `recipe` is as it is carried out: `notes` say where that differs from what was asked for.
    """

    recipe: CausalRecipe
    model: CausalModel
    splits: CausalSplits
    max_steps: int
    eval_steps: int
    batches: list[list[int]]
    notes: tuple[str, ...] = ()


def validate(recipe: CausalRecipe, model: CausalModel) -> None:
    """Raise RecipeError where the model does not support the recipe."""
    if recipe.data.add_tokens and lora.has(model.net):
        raise RecipeError("data: add_tokens: an adapter that is trained further keeps its tokens; start from its base")
    unsupported = model.family.unsupported
    reason = unsupported.get("packing") or (
        "" if recipe.memory.accelerate else unsupported.get("packing_unaccelerated")
    )
    if recipe.batch.packing and reason:
        raise RecipeError(f"batch: packing: {model.family.name} does not support it: {reason}; set packing: false")


def read_data(recipe: CausalRecipe, model: CausalModel, output_dir: Path) -> CausalSplits:
    """Read and tokenize the samples, with the tokens of `data.add_tokens`. Raises as `load_splits`."""
    embeddings.add_tokens(model.tokenizer, model.net, recipe.data.add_tokens, seed=recipe.optimizer.seed)
    with hint_at_other_task(recipe.data.train, recipe.task):
        return load_splits(recipe, model)


def prepare(recipe: CausalRecipe, model: CausalModel, splits: CausalSplits) -> CausalRun:
    """Change `model.net` in place (LoRA or requires_grad, gradient checkpointing) and plan the batches.

    Raises:
        RecipeError: the model does not support the recipe.
    """
    net = model.net
    notes: tuple[str, ...] = ()
    if recipe.batch.packing and not is_registered(model.family) and not packing.is_supported(net):
        recipe = replace(recipe, batch=replace(recipe.batch, packing=False))
        notes = (f"batches are padded: {model.family.name} gives packed samples other outputs",)
    tokens = recipe.data.add_tokens
    added = sorted(model.tokenizer.convert_tokens_to_ids(list(tokens)))
    if lora.has(net):
        lora.unfreeze(net)
        notes += (f"the LoRA of {recipe.model} is trained further, with its own rank, alpha and targets",)
    elif recipe.method == "lora":
        config, experts = recipe.lora, model.family.unsupported.get("experts")
        if experts and not config.target_parameters:
            notes += (f"lora: {experts}",)
        net = lora.get_peft_model(
            net,
            model.family,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            target_modules=config.target_modules,
            variant=config.variant,
            modules_to_save=config.modules_to_save,
            target_parameters=config.target_parameters,
            token_ids=added,
        )
    else:
        set_trainable(net, model.family, recipe)
    if recipe.optimizer.gradient_checkpointing:
        set_gradient_checkpointing(net)
    if recipe.memory.activation_offload:
        fused_modules.set_activation_offload(net)
    batches = plan_batches(
        [len(sample) for sample in splits.train],
        max_tokens=recipe.batch.tokens,
        **plan_options(recipe),
    )
    max_steps = len(batches) // recipe.batches_per_step
    trained = replace(model, net=net)
    return CausalRun(recipe, trained, splits, max_steps, resolve_eval_steps(recipe, max_steps), batches, notes)


def load(recipe: CausalRecipe) -> CausalModel:
    """Load the checkpoint in the dtype of `resolve_base_dtype`; of an adapter, its base and the adapter over it.

    An adapter is trained further by method lora, and merged for other methods.
    """
    adapter = Path(recipe.model)
    if recipe.model in MODEL_ALIASES or not is_adapter(adapter):
        return loading.causal.load(recipe.model, dtype=resolve_base_dtype(recipe, fetch_config(recipe.model)))
    name = read_base_name(adapter)
    base = loading.causal.load(name, dtype=resolve_base_dtype(recipe, fetch_config(name)))
    adapted = load_adapter(base, adapter)
    return replace(adapted, origin=base.origin) if recipe.method == "lora" else merge_adapter(adapted)


def resolve_base_dtype(recipe: CausalRecipe, folder: Path) -> str:
    """Return the dtype to load the checkpoint in: float32 where its weights are trained, else the compute dtype."""
    if recipe.memory.base_scheme != "auto" or recipe.method != "lora":
        return {"bf16": "bfloat16"}.get(recipe.memory.base_scheme, "float32")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return "bfloat16" if strategy.resolve_precision(recipe, config) == "bf16" else "float32"


def resolve_learning_rate(recipe: CausalRecipe) -> float:
    """Return the peak learning rate: the recipe's, or the default of its method."""
    return recipe.optimizer.learning_rate or (LORA_LR if recipe.method == "lora" else PRETRAINED_LR)


def set_trainable(net: Any, family: Family, recipe: CausalRecipe) -> None:
    """Set requires_grad of `net`: everything (full), or the top N blocks and the final norm (top-N).

    Raises:
        RecipeError: the net has fewer than N blocks.
    """
    net.requires_grad_(recipe.top_n is None)
    if recipe.top_n is None:
        return
    blocks = [module for module in net.modules() if type(module).__name__ in family.blocks]
    if recipe.top_n > len(blocks):
        raise RecipeError(
            f"method: {recipe.method}: the net has {len(blocks)} blocks; use at most top-{len(blocks)}, or full"
        )
    for block in blocks[-recipe.top_n :]:
        block.requires_grad_(True)
    norm = family.tensor_names["norm"].rpartition(".")[0]
    net.get_submodule(norm).requires_grad_(True)


def collate(run: CausalRun, samples: Sequence[TokenizedSample], packed: bool) -> dict[str, Tensor]:
    """Collate samples to a packed or padded batch."""
    return causal.pack(samples) if packed else causal.pad(samples, causal.pad_token_id(run.model.tokenizer))
