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

from mowa import hardware
from mowa.adapters import freeze
from mowa.errors import MissingDependency
from mowa.models.ctc_encoder import packing, positions
from mowa.models.ctc_encoder.fast_training import channels_last_front_end, fast_dropout
from mowa.training import checkpoints, optimizer, trainer_args
from mowa.training.config.ctc import NO_AUGMENT, CTCRecipe
from mowa.training.ctc.batches import BatchDataset
from mowa.training.ctc.module import (
    CTCModule,
    argmax_frames,
    build_compute_loss,
    compute_metrics,
    decode_frames,
    decode_labels,
)
from mowa.training.ctc.save import DONE_MARKER, save_run
from mowa.training.ctc.setup import CTCRun, build_eval_dataset, eval_batch_options, is_main_process, prepare
from mowa.training.monitor import callbacks, progress
from mowa.training.optimizer import OptimizerMixin
from mowa.types import Family, Model

REQUIRED_PACKAGES = ("accelerate", "jiwer", "matplotlib")


class CTCTrainer(OptimizerMixin, Trainer):
    """The stock Trainer with our optimiser."""

    def __init__(self, *, recipe: CTCRecipe, family: Family, new_head: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.recipe, self.family, self.new_head = recipe, family, new_head

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        how, base = self.recipe.optimise, optimizer.resolve_learning_rate(self.recipe)
        return optimizer.build_param_groups(net, self.family, how, base, new_head=self.new_head)


def train_ctc(recipe: CTCRecipe, model: Model, output_dir: Path, *, threads: int | None = None) -> Path:
    """Fine-tune `model` as `plan` says; the finished checkpoint, or the adapter's folder, is `out`. → out.

    `model.net` is float32 and is changed in place. RecipeError where `out` holds a run by another recipe; DataError
    where nothing is left to learn from; TrainingStopped where a sentinel saw that nothing would come of it.
    """
    installed = hardware.optional_package_versions()
    if missing := [name for name in REQUIRED_PACKAGES if installed[name] is None]:
        raise MissingDependency(f"training needs {', '.join(missing)}: pip install 'mowa[train]'")
    torch.set_num_threads(threads or hardware.cpu_count())
    set_seed(recipe.optimizer.seed)
    trainer_args.lock_run_dir(recipe, output_dir / "run" / "recipe.yaml")
    if (output_dir / "run" / DONE_MARKER).is_file():
        print(f"{output_dir}: finished before", file=sys.stderr)
        return output_dir
    run = prepare(recipe, model, output_dir)
    resumed = checkpoints.find_last_checkpoint(output_dir / "run")
    began = time.time()
    with training_patches(run.model.net, run):
        _log_plan(run, resumed)
        trainer, live, average = build_trainer(run, output_dir, resumed)
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        finally:
            live.close()
        if average is not None:
            average.copy_to_model()
        save_run(run, trainer, output_dir, time.time() - began)
    return output_dir


def _log_plan(run: CTCRun, resumed: Path | None) -> None:
    """What will happen, before it does: what was left out, what learns, for how long."""
    if not is_main_process():
        return
    lines = [*run.data.notes, freeze.format_table(freeze.count_parameters(run.model.net, run.model.family))]
    hours = sum(example.duration_s for batch in run.batches for example in batch) / 3600
    lines.append(f"{run.max_steps} steps over {hours:.1f} h of sound, measured every {run.eval_steps}")
    if resumed:
        lines.append(f"going on from {resumed.name}")
    print("\n".join(lines), file=sys.stderr)


@contextmanager
def training_patches(net: Any, run: CTCRun) -> Iterator[None]:
    """Swaps that hold while the net learns, all of which are undone: speed, packed attention, held positions."""
    with ExitStack() as stack:
        stack.enter_context(channels_last_front_end(net))
        stack.enter_context(fast_dropout(net))
        if run.recipe.batch.packing:
            stack.enter_context(packing.packed_attention(net))
        if getattr(net.config, "absolute_positions", None) is not None:
            stack.enter_context(positions.freeze_absolute_positions(net))
        yield


def build_trainer(
    run: CTCRun, output_dir: Path, resume_from: Path | None
) -> tuple[Trainer, progress.ProgressReporter, checkpoints.EMACallback | None]:
    plan, model = run.recipe, run.model
    words, net = model.vocabulary, model.net
    learning = replace(
        eval_batch_options(run),
        augment=None if plan.augment == NO_AUGMENT else plan.augment,
        spec_augment=plan.spec_augment,
        seed=plan.optimizer.seed,
    )
    watched = {name: build_eval_dataset(run, part) for name, part in run.data.dev.items()}
    pupil = CTCModule(
        net,
        packing=plan.batch.packing,
        use_attention_mask=model.preprocessing.attention_mask,
        distillation=run.distillation,
    )
    arguments = _arguments(run, output_dir, resume_from)
    sentinels = callbacks.Monitor(plan.monitors, output_dir, pupil, tokens=words.tokens)
    live = progress.ProgressReporter(
        plan.evaluation.log_examples, [sum(e.duration_s for e in batch) for batch in run.batches]
    )

    def seen(losses: torch.Tensor, ids: torch.Tensor, index: int) -> None:
        batch = run.batches[index]
        names, letters = [example.id for example in batch], sum(len(example.text) for example in batch)
        sentinels.on_ctc_batch(trainer.state.global_step, losses, names, ids, words.blank, num_tokens=letters)

    def scored(prediction: Any) -> dict[str, float]:
        said, heard = decode_labels(prediction.label_ids, words), decode_frames(prediction.predictions, words)
        live.set_texts(said, heard)
        return compute_metrics(said, heard, prediction.predictions, words.blank)

    parts = plan.batch.gradient_accumulation_steps * plan.distributed.devices * plan.distributed.nodes
    trainer = CTCTrainer(
        recipe=plan,
        family=model.family,
        new_head=run.new_head,
        model=pupil,
        args=arguments,
        data_collator=_single_item,
        train_dataset=BatchDataset(run.batches, learning),
        eval_dataset=watched,
        compute_loss_func=build_compute_loss(
            words.blank,
            seen,
            ctc_weight=plan.distillation.ctc_weight if run.distillation else 1.0,
            batches_per_step=parts,
        ),
        compute_metrics=scored,
        preprocess_logits_for_metrics=argmax_frames,
    )
    average = checkpoints.EMACallback(net, plan.optimizer.ema_decay, resume_from) if plan.optimizer.ema_decay else None
    trainer_args.attach_callbacks(trainer, plan, sentinels, live, *([average] if average else []))
    if is_main_process():
        sentinels.report_overlap(run.data.overlap)
    return trainer, live, average


def _arguments(run: CTCRun, out: Path, resumed: Path | None) -> TrainingArguments:
    plan = run.recipe
    settings = trainer_args.training_arguments(
        plan, out, run.model.net, max_steps=run.max_steps, eval_steps=run.eval_steps
    )
    settings |= {
        "eval_on_start": resumed is None and not run.new_head,
        "load_best_model_at_end": not plan.optimizer.ema_decay,
        "metric_for_best_model": f"eval_{next(iter(run.data.dev))}_{plan.evaluation.metric_for_best_model}",
        "dataloader_num_workers": min(4, max(1, hardware.cpu_count() // 2)),
    }
    return TrainingArguments(**settings)


def _single_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = items
    return batch
