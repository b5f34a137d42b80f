"""What a fine-tuning run needs before its first step: the net as it is to learn, its data, its batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mowa.adapters import bottleneck, freeze, head, lora
from mowa.errors import RecipeError
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder import packing
from mowa.quantization import qat
from mowa.training.config.ctc import CTCRecipe
from mowa.training.ctc import batches as packs
from mowa.training.ctc import distillation as distill
from mowa.training.ctc.batches import BatchDataset, BatchOptions
from mowa.training.ctc.dataset import CTCSplits, load_splits
from mowa.training.gradient_checkpointing import set_gradient_checkpointing
from mowa.types import Example, Model

MIN_EVAL_STEPS = 20  # steps between two measurements, unless the recipe says otherwise


@dataclass(frozen=True, slots=True)
class CTCRun:
    """What `tune` made ready: everything the Trainer is given."""

    recipe: CTCRecipe
    model: Model  # its net as it learns, its vocabulary as the head will say it
    data: CTCSplits
    max_steps: int
    eval_steps: int
    batches: list[list[Example]]
    new_head: bool
    distillation: distill.DistillationLoss | None


def prepare(recipe: CTCRecipe, model: Model, output_dir: Path) -> CTCRun:
    net, family = model.net, model.family
    if any(isinstance(module, QuantizedLinear) for module in net.modules()):
        raise RecipeError(
            f"model: {model.origin.name} is in {model.scheme.name}, in which nothing is learnt: name the checkpoint"
            " that it was shrunk from, and shrink what comes of it"
        )
    if recipe.batch.packing and (why := packing.unsupported_reason(family.name, net.config)):
        raise RecipeError(f"batch: layout: packed: {why}; use padded")
    frames = packing.frame_geometry(net.config)
    rate = model.preprocessing.rate_hz
    words = model.vocabulary if len(model.vocabulary) else None
    data = load_splits(recipe, words, lambda seconds: frames.num_frames(int(seconds * rate)), output_dir / "audio")
    vars(net.config).pop(qat.CONFIG_KEY, None)  # what learns is on no grid any more
    model, lessons = _init_student(recipe, model)
    net = model.net
    new_head = head.resize_head(net, family, words, data.vocabulary)
    net.config.ctc_zero_infinity, net.config.ctc_loss_reduction = True, "mean"
    if recipe.method == "lora":
        low = recipe.lora
        lora.add(
            net,
            family,
            rank=low.rank,
            alpha=low.alpha,
            dropout=low.dropout,
            target_modules=low.target_modules,
            variant=low.variant,
        )
    elif recipe.method == "bottleneck":
        bottleneck.add(net, family, recipe.adapters.width)
    if recipe.qat != "none":
        qat.prepare(net, family, recipe.qat, recipe.qat_group_size)
    freeze.set_trainable(net, family, recipe.method)
    if recipe.optimizer.gradient_checkpointing:
        set_gradient_checkpointing(net)
    moving = recipe.optimizer
    together = recipe.batch.gradient_accumulation_steps * recipe.distributed.devices * recipe.distributed.nodes
    batches = packs.plan_batches(
        data.train,
        max_seconds=recipe.batch.seconds,
        packing=recipe.batch.packing,
        epochs=moving.epochs,
        num_batches=moving.max_steps * together,
        multiple_of=together,
        seed=moving.seed,
    )
    steps = len(batches) // together
    every = recipe.evaluation.eval_steps or max(MIN_EVAL_STEPS, -(-steps // 10))
    tuned = Model(net, family, model.origin, data.vocabulary, model.preprocessing)
    return CTCRun(recipe, tuned, data, steps, min(every, steps), batches, new_head, lessons)


def _init_student(plan: CTCRecipe, model: Model) -> tuple[Model, distill.DistillationLoss | None]:
    """What learns, and the checkpoint as it was to teach it, where the plan has a teacher."""
    if not plan.uses_teacher:
        return model, None
    how = plan.distillation
    layers = how.student_layers or model.net.config.num_hidden_layers
    student = distill.init_student(model, layers)
    weights = {"emissions": how.logit_weight, "hidden": how.hidden_weight, "temperature": how.temperature}
    return student, distill.DistillationLoss(model.net, layers, **weights)


def eval_batch_options(run: CTCRun) -> BatchOptions:
    """How recordings are put together where they are measured: as recorded, nothing hidden."""
    config = run.model.net.config
    return BatchOptions(
        run.model.vocabulary,
        run.model.preprocessing,
        packing.frame_geometry(config),
        config.hidden_size,
        run.recipe.batch.packing,
    )


def build_eval_dataset(run: CTCRun, examples: list[Example]) -> BatchDataset:
    """Every recording once, to be measured on. Of several processes each hears one at a time: they gather by rows."""
    how = run.recipe.distributed
    alone = how.devices * how.nodes > 1
    seconds = 0.0 if alone else run.recipe.batch.seconds
    return BatchDataset(packs.plan_eval_batches(examples, seconds, run.recipe.batch.packing), eval_batch_options(run))


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
