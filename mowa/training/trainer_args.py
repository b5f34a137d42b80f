"""Build the TrainingArguments and callbacks that the trainers of both tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mowa.training import checkpoints
from mowa.training.distributed import strategy
from mowa.training.monitor import callbacks
from mowa.training.monitor import progress as reporting

MIN_EVAL_STEPS = 20  # steps between evaluations, unless the recipe sets eval_steps


def resolve_eval_steps(recipe: Any, max_steps: int) -> int:
    """Return the steps between evaluations: the recipe's, or a tenth of the run but at least MIN_EVAL_STEPS."""
    return min(recipe.evaluation.eval_steps or max(MIN_EVAL_STEPS, -(-max_steps // 10)), max_steps)


def plan_options(recipe: Any) -> dict[str, Any]:
    """Return the arguments of `plan_batches` on the length of a run, on packing and on the order of its samples."""
    return {
        "packing": recipe.batch.packing,
        "epochs": recipe.optimizer.epochs,
        "num_batches": recipe.optimizer.max_steps * recipe.batches_per_step,
        "multiple_of": recipe.batches_per_step,
        "seed": recipe.optimizer.seed,
    }


def format_length(recipe: Any, max_steps: int, eval_steps: int, over: str) -> str:
    """Return one line with the steps of a run, the data that they cover (`over`), and the option that limits them."""
    by = " (max_steps is set: epochs is not used)" if recipe.optimizer.max_steps else ""
    return f"{max_steps} steps{by} over {over}, evaluated every {eval_steps} steps"


def training_arguments(recipe: Any, output_dir: Path, net: Any, *, max_steps: int, eval_steps: int) -> dict[str, Any]:
    """Return keyword arguments of TrainingArguments for a run whose batches are planned, one per step and device.

    Evaluates and saves every `eval_steps`. Includes what `strategy.distributed_arguments` returns, but not how the best
    checkpoint is selected. `checkpoints.MarkCompleteCallback` deletes old checkpoints.
    """
    config = recipe.optimizer
    settings: dict[str, Any] = {
        "output_dir": str(output_dir / "run"),
        "max_steps": max_steps,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": recipe.batch.gradient_accumulation_steps,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "eval_strategy": "steps",
        "eval_steps": eval_steps,
        "save_steps": eval_steps,
        "greater_is_better": False,
        "logging_steps": min(10, eval_steps),
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": reporting.validate_report_to(recipe.evaluation.report_to) or "none",
    }
    return settings | strategy.distributed_arguments(recipe, net, recipe.distributed.devices)


def attach_callbacks(
    trainer: Any,
    recipe: Any,
    monitor: callbacks.Monitor,
    progress: reporting.ProgressReporter,
    *others: TrainerCallback,
) -> None:
    """Replace the stock printing callbacks by ours: monitor, progress, early stopping, `others`, completion marker."""
    for stock in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(stock)
    patience = recipe.evaluation.early_stopping_patience
    stopping = [EarlyStopping(trainer.args.metric_for_best_model, patience)] if patience else []
    for callback in (monitor.callback(), progress, *stopping, *others, checkpoints.MarkCompleteCallback()):
        trainer.add_callback(callback)


class EarlyStopping(TrainerCallback):
    """Stop when the metric has not improved for `patience` evaluations. Stateless: it reads the log history."""

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        values = [row[self.metric] for row in state.log_history if self.metric in row]
        if values and len(values) - 1 - values.index(min(values)) >= self.patience:
            control.should_training_stop = True
