"""What a fine-tuning run needs before its first step: the net as it is to learn, its data, its batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mowa.adapt import bottleneck, freeze, head, lora
from mowa.errors import RecipeError
from mowa.families.patch import checkpoint_blocks
from mowa.kernels.narrow import NarrowLinear
from mowa.nouns import Example, Model
from mowa.tasks import packing
from mowa.train import distill, packs, qat
from mowa.train.gather import Gathered, gather
from mowa.train.packs import Batching, Packs
from mowa.train.tuning import Tuning

LEAST_APART = 20  # steps between two measurements, unless the recipe says otherwise


@dataclass(frozen=True, slots=True)
class Run:
    """What `tune` made ready: everything the Trainer is given."""

    plan: Tuning
    model: Model  # its net as it learns, its vocabulary as the head will say it
    data: Gathered
    steps: int
    every: int
    batches: list[list[Example]]
    new_head: bool
    lessons: distill.Lessons | None


def ready(plan: Tuning, model: Model, out: Path) -> Run:
    net, family = model.net, model.family
    if any(isinstance(module, NarrowLinear) for module in net.modules()):
        raise RecipeError(
            f"model: {model.origin.name} is in {model.scheme.name}, in which nothing is learnt: name the checkpoint"
            " that it was shrunk from, and shrink what comes of it"
        )
    if plan.batch.layout == "packed" and (why := packing.refused(family.name, net.config)):
        raise RecipeError(f"batch: layout: packed: {why}; use padded")
    frames = packing.frames(net.config)
    rate = model.preprocessing.rate_hz
    words = model.vocabulary if len(model.vocabulary) else None
    data = gather(plan, words, lambda seconds: frames.count(int(seconds * rate)), out / "audio")
    vars(net.config).pop(qat.NOTE, None)  # what learns is on no grid any more
    model, lessons = _taught(plan, model)
    net = model.net
    new_head = head.grow(net, family, words, data.words)
    net.config.ctc_zero_infinity, net.config.ctc_loss_reduction = True, "mean"
    if plan.train == "lora":
        low = plan.lora
        lora.add(net, family, rank=low.rank, alpha=low.alpha, dropout=low.dropout, where=low.where, kind=low.kind)
    elif plan.train == "adapters":
        bottleneck.add(net, family, plan.adapters.width)
    if plan.qat != "none":
        qat.prepare(net, family, plan.qat, plan.qat_group)
    freeze.learn(net, family, plan.train)
    if plan.optimise.checkpointing:
        checkpoint_blocks(net)
    moving = plan.optimise
    together = plan.batch.accumulate * plan.parallel.devices * plan.parallel.nodes
    batches = packs.plan(
        data.train,
        seconds=plan.batch.seconds,
        layout=plan.batch.layout,
        epochs=moving.epochs,
        count=moving.steps * together,
        multiple=together,
        seed=moving.seed,
    )
    steps = len(batches) // together
    every = plan.evaluate.every or max(LEAST_APART, -(-steps // 10))
    tuned = Model(net, family, model.origin, data.words, model.preprocessing)
    return Run(plan, tuned, data, steps, min(every, steps), batches, new_head, lessons)


def _taught(plan: Tuning, model: Model) -> tuple[Model, distill.Lessons | None]:
    """What learns, and the checkpoint as it was to teach it, where the plan has a teacher."""
    if not plan.taught:
        return model, None
    how = plan.distil
    layers = how.layers or model.net.config.num_hidden_layers
    student = distill.student(model, layers)
    weights = {"emissions": how.emissions, "hidden": how.hidden, "temperature": how.temperature}
    return student, distill.Lessons(model.net, layers, **weights)


def batching(run: Run) -> Batching:
    """How recordings are put together where they are measured: as recorded, nothing hidden."""
    config = run.model.net.config
    return Batching(
        run.model.vocabulary, run.model.preprocessing, packing.frames(config), config.hidden_size, run.plan.batch.layout
    )


def measured(run: Run, examples: list[Example]) -> Packs:
    """Every recording once, to be measured on. Of several processes each hears one at a time: they gather by rows."""
    how = run.plan.parallel
    alone = how.devices * how.nodes > 1
    seconds = 0.0 if alone else run.plan.batch.seconds
    return Packs(packs.one_pass(examples, seconds, run.plan.batch.layout), batching(run))


def first() -> bool:
    return os.environ.get("RANK", "0") == "0"
