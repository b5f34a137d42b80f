"""Make the stock Trainer's checkpoints survive a kill at any moment, be read back whole, and average weights.

A checkpoint counts only once it has a completion marker (`run_dir`). Older ones are deleted only after a newer one is
complete. One that lacks weights of the net, or holds others, ends the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from mowa.adapters import lora
from mowa.adapters.loading import validate_tensors
from mowa.errors import TrainingStopped
from mowa.loading.checkpoint import summarize_keys
from mowa.training.run_dir import COMPLETE_MARKER, delete_checkpoint, list_checkpoints

EMA_FILE = "ema.safetensors"
KEPT_CHECKPOINTS = 2  # the last one and the best one


class CompleteCheckpointMixin:
    """Let a stock Trainer write a net under its own parameter names, and read checkpoints that hold all of it only.

    The stock one writes experts one by one, as the files on the Hub have them; it reads neither these nor a file of
    another net, but logs a warning and continues with the weights in memory. Put it before the Trainer among the bases.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        with own_parameter_names(trainer.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        _validate_adapter(trainer.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        trainer: Any = self
        _validate_adapter(trainer.model, trainer.state.best_model_checkpoint)
        super()._load_best_model()  # type: ignore[misc]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        trainer: Any = self
        missing, unexpected = set(load_result.missing_keys), set(load_result.unexpected_keys)
        names: dict[int, list[str]] = {}
        for name, value in trainer.model.state_dict(keep_vars=True).items():
            names.setdefault(id(value), []).append(name)
        tied = {name for group in names.values() if not missing.issuperset(group) for name in group}
        validate_keys(Path(trainer.args.output_dir), missing=missing - tied, unexpected=unexpected)


@contextmanager
def own_parameter_names(net: Any) -> Iterator[None]:
    """Let `net.save_pretrained` write the names and shapes of `state_dict`, which `load_state_dict` reads."""
    if not hasattr(net, "save_pretrained") or lora.has(net):
        yield
        return
    net.save_pretrained = partial(net.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del net.save_pretrained


def _validate_adapter(net: Any, folder: str) -> None:
    """Raise TrainingStopped where `net` is a PeftModel and the checkpoint lacks tensors of its adapter."""
    if lora.has(net) and hasattr(net, "get_base_model") and (Path(folder) / "adapter_model.safetensors").is_file():
        try:
            validate_tensors(net, Path(folder))
        except ValueError as error:
            raise _incomplete(Path(folder), str(error)) from None


def validate_keys(place: Path, *, missing: Iterable[str], unexpected: Iterable[str] = ()) -> None:
    """Raise TrainingStopped where weights that were read from `place` are not all that were expected, or are others."""
    found = (("missing", sorted(missing)), ("without a parameter of the net", sorted(unexpected)))
    if problems := [f"{summarize_keys(names)} {problem}" for problem, names in found if names]:
        raise _incomplete(place, ", ".join(problems))


def _incomplete(place: Path, problem: str) -> TrainingStopped:
    return TrainingStopped(
        f"{place}: a checkpoint does not hold the net that is trained: {problem}.\n  Nothing was continued from it; "
        "start again in another folder, and report this model if this version of mowa wrote the checkpoint"
    )


class MarkCompleteCallback(TrainerCallback):
    """Mark a checkpoint as complete, then delete older ones but the best. Must be the last callback of a run.

    It replaces `save_total_limit` of TrainingArguments, which deletes before the new checkpoint is complete.

    Args:
        keep: number of checkpoints to keep.
    """

    def __init__(self, keep: int = KEPT_CHECKPOINTS) -> None:
        self.keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its shard
        if not (state.is_world_process_zero and folder.is_dir()):
            return
        (folder / COMPLETE_MARKER).touch()
        complete = list_checkpoints(folder.parent)
        protected = {folder.name, Path(state.best_model_checkpoint or "").name}
        removable = [path for path in complete if path.name not in protected]
        for path in removable[: max(0, len(complete) - self.keep)]:
            delete_checkpoint(path)


class EMACallback(TrainerCallback):
    """Keep an exponential moving average of the trainable weights: a ← decay · a + (1 − decay) · w after every step.

    The average is saved with each checkpoint, so a resumed run continues with the same values.
    """

    def __init__(self, net: nn.Module, decay: float, resume_from: Path | None = None) -> None:
        self.decay = decay
        self.trainable = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
        initial = load_file(resume_from / EMA_FILE) if resume_from else self.trainable
        if resume_from:
            expected, found = self.trainable.keys(), initial.keys()
            validate_keys(resume_from / EMA_FILE, missing=expected - found, unexpected=found - expected)
        self.ema = {name: initial[name].detach().clone().to(weight) for name, weight in self.trainable.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))  # warmup of the average
        for name, weight in self.trainable.items():
            self.ema[name].lerp_(weight.detach(), 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            save_file({name: value.contiguous() for name, value in self.ema.items()}, folder / EMA_FILE)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the net's trainable weights by their average."""
        for name, weight in self.trainable.items():
            weight.copy_(self.ema[name])
