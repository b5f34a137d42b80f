"""What every stock Trainer of ours is told, and who listens to it, whatever it trains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mowa.errors import RecipeError
from mowa.train import checkpoints, parallel, schema, view, watch
from mowa.train.ready import first


def claim(plan: Any, note: Path) -> None:
    """This folder is this recipe's (a Tuning, or an Instruction), or a RecipeError says what of it is another's."""
    if note.is_file():
        before, now = asdict(schema.build(type(plan), schema.tree(note), str(note))), asdict(plan)
        if before != now:
            different = ", ".join(key for key in now if now[key] != before[key])
            raise RecipeError(
                f"{note.parent} holds a run by another recipe ({different}): choose another folder, or delete it"
            )
    elif first():
        note.parent.mkdir(parents=True, exist_ok=True)
        schema.write(plan, note)


def arguments(plan: Any, out: Path, net: Any, *, steps: int, every: int) -> dict[str, Any]:
    """TrainingArguments of a run whose batches are planned, one to a step and device, measured and kept `every` steps.

    Those of devices among them, as `parallel` has it. What a run picks its best checkpoint by is left to say.
    """
    how = plan.optimise
    settings: dict[str, Any] = {
        "output_dir": str(out / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": plan.batch.accumulate,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": how.clip,
        "seed": how.seed,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
        "greater_is_better": False,
        "logging_steps": min(10, every),
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": view.trackers(plan.evaluate.trackers) or "none",
    }
    return settings | parallel.arguments(plan, net, plan.parallel.devices)


def follow(trainer: Any, plan: Any, sentinels: watch.Sentinels, live: view.Live, *others: TrainerCallback) -> None:
    """Our callbacks in place of those that print: sentinels, progress, patience, `others`; whole checkpoints last."""
    for spoken in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(spoken)
    patience = [Patience(trainer.args.metric_for_best_model, plan.evaluate.patience)] if plan.evaluate.patience else []
    for callback in (sentinels.callback(), live, *patience, *others, checkpoints.Whole()):
        trainer.add_callback(callback)


class Patience(TrainerCallback):
    """Ends a run whose measure was not the best one for so many measurements. It looks back, and remembers nothing."""

    def __init__(self, measure: str, patience: int) -> None:
        self.measure, self.patience = measure, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        values = [row[self.measure] for row in state.log_history if self.measure in row]
        if values and len(values) - 1 - values.index(min(values)) >= self.patience:
            control.should_training_stop = True
