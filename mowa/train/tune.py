"""A checkpoint, made somebody's own: fine-tuning as a `Tuning` says, with the stock `transformers.Trainer`.

A run that was broken off, at whatever moment, goes on from the last whole checkpoint in the output folder with the very
batches, masks and dropout it would have had; on a CPU it ends in the same bits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from mowa import machine
from mowa.adapt import freeze
from mowa.errors import MissingPart
from mowa.families.patch import channel_last_front_end, quick_dropout
from mowa.nouns import Family, Model
from mowa.tasks import packing
from mowa.train import checkpoints, optimiser, positions, trainers, view, watch
from mowa.train.finish import DONE, finish
from mowa.train.optimiser import OwnOptimiser
from mowa.train.packs import Packs
from mowa.train.pupil import Pupil, best, loss_function, score, spelt, texts
from mowa.train.ready import Run, batching, first, measured, ready
from mowa.train.tuning import PLAIN, Tuning

NEEDED = ("accelerate", "jiwer", "matplotlib")


class Tuned(OwnOptimiser, Trainer):
    """The stock Trainer with our optimiser."""

    def __init__(self, *, tuning: Tuning, family: Family, new_head: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.tuning, self.family, self.new_head = tuning, family, new_head

    def groups(self, net: nn.Module) -> list[dict[str, Any]]:
        how, base = self.tuning.optimise, optimiser.rate(self.tuning)
        return optimiser.groups(net, self.family, how, base, new_head=self.new_head)


def tune(plan: Tuning, model: Model, out: Path, *, threads: int | None = None) -> Path:
    """Fine-tune `model` as `plan` says; the finished checkpoint, or the adapter's folder, is `out`. → out.

    `model.net` is float32 and is changed in place. RecipeError where `out` holds a run by another recipe; DataError
    where nothing is left to learn from; TrainingStopped where a sentinel saw that nothing would come of it.
    """
    installed = machine.parts()
    if missing := [name for name in NEEDED if installed[name] is None]:
        raise MissingPart(f"training needs {', '.join(missing)}: pip install 'mowa[train]'")
    torch.set_num_threads(threads or machine.cores())
    set_seed(plan.optimise.seed)
    trainers.claim(plan, out / "run" / "recipe.yaml")
    if (out / "run" / DONE).is_file():
        print(f"{out}: finished before", file=sys.stderr)
        return out
    run = ready(plan, model, out)
    resumed = checkpoints.last(out / "run")
    began = time.time()
    with swapped(run.model.net, run):
        _say(run, resumed)
        trainer, live, average = trainer_of(run, out, resumed)
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        finally:
            live.close()
        if average is not None:
            average.take()
        finish(run, trainer, out, time.time() - began)
    return out


def _say(run: Run, resumed: Path | None) -> None:
    """What will happen, before it does: what was left out, what learns, for how long."""
    if not first():
        return
    lines = [*run.data.notes, freeze.show(freeze.table(run.model.net, run.model.family))]
    hours = sum(example.duration_s for batch in run.batches for example in batch) / 3600
    lines.append(f"{run.steps} steps over {hours:.1f} h of sound, measured every {run.every}")
    if resumed:
        lines.append(f"going on from {resumed.name}")
    print("\n".join(lines), file=sys.stderr)


@contextmanager
def swapped(net: Any, run: Run) -> Iterator[None]:
    """Swaps that hold while the net learns, all of which are undone: speed, packed attention, held positions."""
    with ExitStack() as stack:
        stack.enter_context(channel_last_front_end(net))
        stack.enter_context(quick_dropout(net))
        if run.plan.batch.layout == "packed":
            stack.enter_context(packing.packed(net))
        if getattr(net.config, "absolute_positions", None) is not None:
            stack.enter_context(positions.held(net))
        yield


def trainer_of(run: Run, out: Path, resumed: Path | None) -> tuple[Trainer, view.Live, checkpoints.Average | None]:
    plan, model = run.plan, run.model
    words, net = model.vocabulary, model.net
    learning = replace(
        batching(run),
        rough=None if plan.augment == PLAIN else plan.augment,
        masks=plan.masks,
        seed=plan.optimise.seed,
    )
    watched = {name: measured(run, part) for name, part in run.data.dev.items()}
    pupil = Pupil(net, layout=plan.batch.layout, attend=model.preprocessing.attention_mask, lessons=run.lessons)
    arguments = _arguments(run, out, resumed)
    sentinels = watch.Sentinels(plan.watch, out, pupil, tokens=words.tokens)
    live = view.Live(plan.evaluate.examples, [sum(e.duration_s for e in batch) for batch in run.batches])

    def seen(losses: torch.Tensor, ids: torch.Tensor, index: int) -> None:
        batch = run.batches[index]
        names, letters = [example.id for example in batch], sum(len(example.text) for example in batch)
        sentinels.batch(trainer.state.global_step, losses, names, ids, words.blank, letters=letters)

    def scored(prediction: Any) -> dict[str, float]:
        said, heard = spelt(prediction.label_ids, words), texts(prediction.predictions, words)
        live.heard(said, heard)
        return score(said, heard, prediction.predictions, words.blank)

    parts = plan.batch.accumulate * plan.parallel.devices * plan.parallel.nodes
    trainer = Tuned(
        tuning=plan,
        family=model.family,
        new_head=run.new_head,
        model=pupil,
        args=arguments,
        data_collator=_only,
        train_dataset=Packs(run.batches, learning),
        eval_dataset=watched,
        compute_loss_func=loss_function(
            words.blank, seen, weight=plan.distil.letters if run.lessons else 1.0, parts=parts
        ),
        compute_metrics=scored,
        preprocess_logits_for_metrics=best,
    )
    average = checkpoints.Average(net, plan.optimise.ema, resumed) if plan.optimise.ema else None
    trainers.follow(trainer, plan, sentinels, live, *([average] if average else []))
    if first():
        sentinels.leak(run.data.leak)
    return trainer, live, average


def _arguments(run: Run, out: Path, resumed: Path | None) -> TrainingArguments:
    plan = run.plan
    settings = trainers.arguments(plan, out, run.model.net, steps=run.steps, every=run.every)
    settings |= {
        "eval_on_start": resumed is None and not run.new_head,
        "load_best_model_at_end": not plan.optimise.ema,
        "metric_for_best_model": f"eval_{next(iter(run.data.dev))}_{plan.evaluate.best}",
        "dataloader_num_workers": min(4, max(1, machine.cores() // 2)),
    }
    return TrainingArguments(**settings)


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = items
    return batch
