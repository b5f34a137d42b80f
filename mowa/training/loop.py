"""The training loop of every task.

    validate recipe and model → read the data → prepare the net, plan the batches → check memory and disk → lock the run
    folder → fit → save → read back → compare with the net in memory → report

A task (`Task`) supplies data, batches, trainer and metrics. What can fail for a reason that the user can mend fails
before the folder is locked, and the same command, or one with a corrected recipe, starts again. An interrupted run
resumes from the last complete checkpoint in its folder; on a CPU it ends with bit-identical weights.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from transformers import set_seed

from mowa import hardware
from mowa.adapters import freeze
from mowa.errors import MissingDependency, RecipeError, TrainingStopped
from mowa.io.hub import hide_progress_bars
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.training import resources
from mowa.training.distributed import strategy
from mowa.training.distributed.process import is_main_process, is_worker_process
from mowa.training.monitor.progress import ProgressReporter
from mowa.training.run_dir import RUN_FOLDER, find_last_checkpoint, is_finished, lock_run_dir, mark_finished
from mowa.training.save import finalize_run, replace_parameters
from mowa.types import AnyModel

MODEL_FILES = ("config.json", "adapter_config.json", "*.safetensors", "mowa.json")
REJECTED_FOLDER = "rejected"  # in the run folder
_TRAINED: WeakSet[Any] = WeakSet()  # nets whose weights are no longer those of their checkpoint

DataT = TypeVar("DataT")
RunT = TypeVar("RunT")
MeasuredT = TypeVar("MeasuredT")


@dataclass(frozen=True, slots=True)
class Session(Generic[MeasuredT]):
    """A net that is set up for training.

    trainer   the stock Trainer, with its data, loss and callbacks
    reporter  its progress reporter
    plan      lines to print before the first step
    measure   evaluates the trained net, on every process, for `Task.save` and `Task.verify`
    """

    trainer: Any
    reporter: ProgressReporter
    plan: tuple[str, ...]
    measure: Callable[[], MeasuredT]


@dataclass(frozen=True, slots=True)
class Task(Generic[DataT, RunT, MeasuredT]):
    """What distinguishes the training of one task from that of another.

    A run, the value that `prepare` returns, has `recipe`, `model`, `max_steps` and `eval_steps`.

    packages      packages that must be installed
    extra         extra of mowa that installs them
    versions      packages whose versions are reported
    load          (recipe) → the model, in the dtype in which it is trained; ModelError as `mowa.load`
    validate      (recipe, model): raise RecipeError where the model does not support the recipe
    read_data     (recipe, model, output_dir) → the samples; DataError where none is left
    prepare       (recipe, model, data) → the run; changes the net in place: adapters, head, requires_grad
    saves_frozen  (run) → whether checkpoints hold the frozen weights too
    session       (run, output_dir, resume_from) → context of a `Session`
    save          (run, output_dir, measured): write checkpoint or adapter; called on the main process only
    verify        (run, output_dir, measured) → entries of the report, `metrics` among them, after the files were loaded
                  again and compared with the net in memory; TrainingStopped where they differ
    format_table  (entries) → the table of metrics to print
    """

    packages: tuple[str, ...]
    extra: str
    versions: tuple[str, ...]
    load: Callable[[Any], AnyModel]
    validate: Callable[[Any, AnyModel], None]
    read_data: Callable[[Any, AnyModel, Path], DataT]
    prepare: Callable[[Any, AnyModel, DataT], RunT]
    saves_frozen: Callable[[RunT], bool]
    session: Callable[[RunT, Path, Path | None], AbstractContextManager[Session[MeasuredT]]]
    save: Callable[[RunT, Path, MeasuredT], None]
    verify: Callable[[RunT, Path, MeasuredT], dict[str, Any]]
    format_table: Callable[[Mapping[str, Any]], str]


def train(
    task: Task[Any, Any, Any], recipe: Any, model: AnyModel, output_dir: Path, *, threads: int | None = None
) -> Path:
    """Fine-tune `model` and return `output_dir`, which then holds the checkpoint or adapter.

    Args:
        task: the recipe's task.
        recipe: the recipe.
        model: the model; its net is changed in place.
        output_dir: folder of the run. An interrupted run resumes; a finished one returns at once.
        threads: CPU threads; None: all cores.

    Raises:
        RecipeError: `output_dir` holds another run, the model does not support the recipe, or the run needs more
            memory than there is.
        DataError: no sample is left to train or evaluate on, or the disk cannot hold the checkpoints.
        TrainingStopped: a monitor found that the run will not succeed, or what was saved differs from what was trained.
        MissingDependency: a package for training is not installed.
    """
    _require_packages(task)
    torch.set_num_threads(threads or hardware.cpu_count())
    run_dir = output_dir / RUN_FOLDER
    if is_finished(recipe, run_dir):
        mark_finished(run_dir)  # deletes checkpoints, where the run was killed while it did
        print(f"{output_dir}: this run is already finished", file=sys.stderr)
        return output_dir
    if model.net in _TRAINED:
        raise RecipeError(f"{recipe.model} was trained in this process already: load it again, or name it")
    if not run_dir.exists():
        _validate_output_dir(output_dir)
    run = prepare(task, recipe, model, output_dir)
    fit = resources.check_resources(run, output_dir, saves_frozen=task.saves_frozen(run))
    with lock_run_dir(recipe, run_dir):
        resume_from = find_last_checkpoint(run_dir)
        started = time.time()
        with hide_progress_bars(), task.session(run, output_dir, resume_from) as session:
            trainer, net = session.trainer, run.model.net
            _print_plan(run, [*session.plan, fit], resume_from)
            _TRAINED.add(run.model.net)
            _TRAINED.add(model.net)
            try:
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
                measured = session.measure()
            finally:
                session.reporter.close()
            state = strategy.gather_state_dict(trainer) if is_worker_process() else None
            if not is_main_process():
                return output_dir
            replace_parameters(trainer.accelerator.unwrap_model(trainer.model_wrapped), state or {})
            report = {
                "model": recipe.model,
                "method": recipe.method,
                "global_step": trainer.state.global_step,
                "train_runtime_s": time.time() - started,
                "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
                "num_trainable_parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
            }
        entries = _save_verified(task, run, output_dir, measured)
        versions = {name: hardware.installed_version(name) for name in ("mowa", "torch", *task.versions)}
        best_step = None if recipe.optimizer.ema_decay else trainer.state.best_global_step
        report |= entries | {"versions": versions}
        finalize_run(recipe, run.model, trainer, output_dir, report, best_step=best_step)
        print(task.format_table(entries), file=sys.stderr)
    return output_dir


def _save_verified(task: Task[Any, Any, Any], run: Any, output_dir: Path, measured: Any) -> dict[str, Any]:
    """Save the trained model, and return the report of its verification. What fails it is moved to the run's folder."""
    before = set(output_dir.iterdir())
    with hide_progress_bars():
        task.save(run, output_dir, measured)
    try:
        return task.verify(run, output_dir, measured)
    except TrainingStopped:
        _set_aside(set(output_dir.iterdir()) - before, output_dir / RUN_FOLDER / REJECTED_FOLDER)
        raise


def prepare(task: Task[Any, RunT, Any], recipe: Any, model: AnyModel, output_dir: Path) -> RunT:
    """Validate the recipe, read the data, and return the run. `output_dir` only gets audio extracted from archives.

    Raises RecipeError and DataError as `train`.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.net.modules()):
        raise RecipeError(
            f"model: {model.origin.name} is quantized ({model.scheme.name}) and cannot be fine-tuned; start from the"
            " full-precision checkpoint"
        )
    task.validate(recipe, model)
    data = task.read_data(recipe, model, output_dir)
    set_seed(recipe.optimizer.seed)
    return task.prepare(recipe, model, data)


def _validate_output_dir(output_dir: Path) -> None:
    """Raise RecipeError if the folder of a new run holds a model, whose files would mix with those of the run."""
    found = sorted(file.name for pattern in MODEL_FILES for file in output_dir.glob(pattern))
    if found:
        raise RecipeError(
            f"{output_dir} holds another model ({', '.join(found[:3])}): choose another folder, or delete its files"
        )


def _set_aside(files: set[Path], folder: Path) -> None:
    """Move a model that differs from the trained one where nothing loads it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        file.rename(folder / file.name)


def _require_packages(task: Task[Any, Any, Any]) -> None:
    installed = hardware.optional_package_versions()
    if missing := [name for name in task.packages if installed[name] is None]:
        raise MissingDependency(f"training needs {', '.join(missing)}: pip install 'mowa[{task.extra}]'")


def _print_plan(run: Any, lines: list[str], resume_from: Path | None) -> None:
    """Print what is trained, whether it fits, and where it begins."""
    if not is_main_process():
        return
    parameters = freeze.format_table(freeze.count_parameters(run.model.net, run.model.family))
    resuming = [f"resuming from {resume_from.name}"] if resume_from else []
    print("\n".join([parameters, *lines, *resuming]), file=sys.stderr)
