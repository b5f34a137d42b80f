"""What every stock Trainer of ours is told, and who listens to it, whatever it trains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mowa.errors import RecipeError
from mowa.training import checkpoints
from mowa.training.config import schema
from mowa.training.ctc.setup import is_main_process
from mowa.training.distributed import launch
from mowa.training.monitor import callbacks
from mowa.training.monitor import progress as view


def lock_run_dir(recipe: Any, recipe_file: Path) -> None:
    """This folder is this recipe's (a Tuning, or an Instruction), or a RecipeError says what of it is another's."""
    if recipe_file.is_file():
        before, now = (
            asdict(schema.from_dict(type(recipe), schema.read_yaml(recipe_file), str(recipe_file))),
            asdict(recipe),
        )
        if before != now:
            different = ", ".join(key for key in now if now[key] != before[key])
            raise RecipeError(
                f"{recipe_file.parent} holds a run by another recipe ({different}): choose another folder, or delete it"
            )
    elif is_main_process():
        recipe_file.parent.mkdir(parents=True, exist_ok=True)
        schema.write_yaml(recipe, recipe_file)


def training_arguments(recipe: Any, output_dir: Path, net: Any, *, max_steps: int, eval_steps: int) -> dict[str, Any]:
    """TrainingArguments of a run whose batches are planned, one to a step and device, measured and kept `every` steps.

    Those of devices among them, as `parallel` has it. What a run picks its best checkpoint by is left to say.
    """
    how = recipe.optimise
    settings: dict[str, Any] = {
        "output_dir": str(output_dir / "run"),
        "max_steps": max_steps,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": recipe.batch.accumulate,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": how.clip,
        "seed": how.seed,
        "eval_strategy": "steps",
        "eval_steps": eval_steps,
        "save_steps": eval_steps,
        "save_total_limit": 2,
        "greater_is_better": False,
        "logging_steps": min(10, eval_steps),
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": view.validate_report_to(recipe.evaluate.trackers) or "none",
    }
    return settings | launch.distributed_arguments(recipe, net, recipe.parallel.devices)


def attach_callbacks(
    trainer: Any, recipe: Any, monitor: callbacks.Monitor, progress: view.ProgressReporter, *others: TrainerCallback
) -> None:
    """Our callbacks in place of those that print: sentinels, progress, patience, `others`; whole checkpoints last."""
    for spoken in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(spoken)
    patience = (
        [EarlyStopping(trainer.args.metric_for_best_model, recipe.evaluate.patience)]
        if recipe.evaluate.patience
        else []
    )
    for callback in (monitor.callback(), progress, *patience, *others, checkpoints.MarkCompleteCallback()):
        trainer.add_callback(callback)


class EarlyStopping(TrainerCallback):
    """Ends a run whose measure was not the best one for so many measurements. It looks back, and remembers nothing."""

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        values = [row[self.metric] for row in state.log_history if self.metric in row]
        if values and len(values) - 1 - values.index(min(values)) >= self.patience:
            control.should_training_stop = True
