"""Set up the stock trainer for a `CTCRecipe` and define its TASK for the training loop (`mowa.training.loop`).

The stock `transformers.Trainer` trains. Batch i, its masks and its augmentation depend on the seed and i alone, so a
resumed run has the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from mowa import hardware
from mowa.models.ctc_encoder import packing, positions
from mowa.models.ctc_encoder.fast_training import channels_last_front_end, fast_dropout
from mowa.models.ctc_encoder.geometry import max_absolute_position
from mowa.training import checkpoints, optimizer, trainer_args
from mowa.training.config.ctc import NO_AUGMENT, CTCRecipe
from mowa.training.ctc import save, setup
from mowa.training.ctc.batches import BatchDataset
from mowa.training.ctc.module import (
    CTCModule,
    argmax_frames,
    build_compute_loss,
    compute_metrics,
    decode_frames,
    decode_labels,
)
from mowa.training.ctc.readable import one_line_errors, write_report
from mowa.training.ctc.setup import STREAMING_SUFFIX, CTCRun, build_eval_datasets, eval_batch_options
from mowa.training.distributed.process import is_main_process
from mowa.training.loop import Session, Task
from mowa.training.monitor import callbacks, progress
from mowa.training.optimizer import OptimizerMixin
from mowa.types import Family


class CTCTrainer(OptimizerMixin, checkpoints.CompleteCheckpointMixin, Trainer):
    """The stock Trainer with our optimizer, and checkpoints that are read whole."""

    def __init__(self, *, recipe: CTCRecipe, family: Family, new_head: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.recipe, self.family, self.new_head = recipe, family, new_head

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        learning_rate = optimizer.resolve_learning_rate(self.recipe)
        return optimizer.build_param_groups(
            net, self.family, self.recipe.optimizer, learning_rate, new_head=self.new_head
        )


@contextmanager
def session(run: CTCRun, output_dir: Path, resume_from: Path | None) -> Iterator[Session[save.Measured]]:
    """Set up the net for training; the session measures the error rates of the dev and test sets."""
    hours = sum(example.duration_s for batch in run.batches for example in batch) / 3600
    length = trainer_args.format_length(run.recipe, run.max_steps, run.eval_steps, f"{hours:.1f} h of audio")
    if is_main_process():
        write_report(run.data, output_dir)
    with training_patches(run.model.net, run), one_line_errors(output_dir):
        trainer, reporter, ema = build_trainer(run, output_dir, resume_from)
        module: Any = trainer.model

        def measure() -> save.Measured:
            module.remove_chunk_mask()
            if ema is not None:
                ema.copy_to_model()
            return save.measure(run, trainer)

        try:
            yield Session(trainer, reporter, (*run.data.notes, *run.notes, length), measure)
        finally:
            module.remove_chunk_mask()


@contextmanager
def training_patches(net: Any, run: CTCRun) -> Iterator[None]:
    """Apply reversible changes for training: faster front end and dropout, packed attention, frozen positions."""
    with ExitStack() as stack:
        stack.enter_context(channels_last_front_end(net))
        stack.enter_context(fast_dropout(net))
        if run.recipe.batch.packing:
            stack.enter_context(packing.packed_attention(net))
        if max_absolute_position(net.config) is not None:
            stack.enter_context(positions.freeze_absolute_positions(net))
        yield


def build_trainer(
    run: CTCRun, output_dir: Path, resume_from: Path | None
) -> tuple[Trainer, progress.ProgressReporter, checkpoints.EMACallback | None]:
    """Build the Trainer with its data sets, loss, metrics and callbacks."""
    recipe, model = run.recipe, run.model
    vocabulary, net = model.vocabulary, model.net
    train_options = replace(
        eval_batch_options(run),
        augment=None if recipe.augment == NO_AUGMENT else recipe.augment,
        spec_augment=recipe.spec_augment,
        chunks=run.chunks,
        seed=recipe.optimizer.seed,
    )
    module = CTCModule(
        net,
        packing=recipe.batch.packing,
        use_attention_mask=model.preprocessing.attention_mask,
        distillation=run.distillation,
        chunks=run.chunks,
    )
    monitor = callbacks.Monitor(recipe.monitors, output_dir, module, tokens=vocabulary.tokens)
    durations = [sum(example.duration_s for example in batch) for batch in run.batches]
    reporter = progress.ProgressReporter(recipe.evaluation.log_examples, durations)

    def on_batch(losses: torch.Tensor, ids: torch.Tensor, index: int) -> None:
        batch = run.batches[index]
        names, num_tokens = [example.id for example in batch], sum(len(example.text) for example in batch)
        step = trainer.state.global_step
        monitor.on_ctc_batch(step, losses, names, ids, vocabulary.blank, num_tokens=num_tokens)

    def evaluate(prediction: Any) -> dict[str, float]:
        references = decode_labels(prediction.label_ids, vocabulary)
        hypotheses = decode_frames(prediction.predictions, vocabulary)
        reporter.set_texts(references, hypotheses)
        return compute_metrics(references, hypotheses, prediction.predictions, vocabulary.blank)

    trainer = CTCTrainer(
        recipe=recipe,
        family=model.family,
        new_head=run.new_head,
        model=module,
        args=_arguments(run, output_dir, resume_from),
        data_collator=_single_item,
        train_dataset=BatchDataset(run.batches, train_options),
        eval_dataset=build_eval_datasets(run, run.data.dev),
        compute_loss_func=build_compute_loss(
            vocabulary.blank,
            on_batch,
            ctc_weight=recipe.distillation.ctc_weight if run.distillation else 1.0,
            batches_per_step=recipe.batches_per_step,
        ),
        compute_metrics=evaluate,
        preprocess_logits_for_metrics=argmax_frames,
    )
    decay = recipe.optimizer.ema_decay
    ema = checkpoints.EMACallback(net, decay, resume_from) if decay else None
    trainer_args.attach_callbacks(trainer, recipe, monitor, reporter, *([ema] if ema else []))
    if is_main_process():
        monitor.report_overlap(run.data.overlap)
    return trainer, reporter, ema


def _arguments(run: CTCRun, output_dir: Path, resume_from: Path | None) -> TrainingArguments:
    recipe = run.recipe
    selected = next(iter(run.data.dev)) + (STREAMING_SUFFIX if run.chunks else "")
    settings = trainer_args.training_arguments(
        recipe, output_dir, run.model.net, max_steps=run.max_steps, eval_steps=run.eval_steps
    )
    settings |= {
        "eval_on_start": resume_from is None and not run.new_head,
        "load_best_model_at_end": not recipe.optimizer.ema_decay,
        "metric_for_best_model": f"eval_{selected}_{recipe.evaluation.metric_for_best_model}",
        "dataloader_num_workers": min(4, max(1, hardware.cpu_count() // 2)),
    }
    return TrainingArguments(**settings)


def _single_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the only item of a batch; the dataset's items are already collated."""
    (batch,) = items
    return batch


TASK = Task(
    packages=("accelerate", "jiwer", "matplotlib"),
    extra="train",
    versions=("transformers",),
    load=setup.load,
    validate=setup.validate,
    read_data=setup.read_data,
    prepare=setup.prepare,
    saves_frozen=lambda run: False,
    session=session,
    save=save.save,
    verify=save.verify,
    format_table=save.format_table,
)
