"""Write checkpoints that survive a kill at any moment: a checkpoint counts only once it has a completion marker."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from mowa.training.distributed.process import is_main_process

COMPLETE_MARKER, EMA_FILE = "complete", "ema.safetensors"


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint in `folder`; the main process deletes incomplete ones."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in found if (path / COMPLETE_MARKER).is_file()]
    if is_main_process():
        for path in set(found) - set(complete):
            shutil.rmtree(path)
    return complete[-1] if complete else None


class MarkCompleteCallback(TrainerCallback):
    """Mark a checkpoint as complete. Must be the last callback of a run."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its shard
        if state.is_world_process_zero and folder.is_dir():
            (folder / COMPLETE_MARKER).touch()


class EMACallback(TrainerCallback):
    """Keep an exponential moving average of the trainable weights: a ← decay · a + (1 − decay) · w after every step.

    The average is saved with each checkpoint, so a resumed run continues with the same values.
    """

    def __init__(self, net: nn.Module, decay: float, resume_from: Path | None = None) -> None:
        self.decay = decay
        self.trainable = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
        initial = load_file(resume_from / EMA_FILE) if resume_from else self.trainable
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
