"""Checkpoints of a run that may be killed at any moment: a folder counts once it says that it is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

COMPLETE_MARKER, EMA_FILE = "whole", "average.safetensors"


def find_last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`; those that a kill left half-written are removed, by the first process."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / COMPLETE_MARKER).is_file()]
    if os.environ.get("RANK", "0") == "0":
        for path in set(found) - set(whole):
            shutil.rmtree(path)
    return whole[-1] if whole else None


class MarkCompleteCallback(TrainerCallback):
    """Marks a checkpoint when all of it is written. The last callback of a run."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes a part of it
        if state.is_world_process_zero and folder.is_dir():
            (folder / COMPLETE_MARKER).touch()


class EMACallback(TrainerCallback):
    """An exponential moving average of what learns: a ← decay · a + (1 − decay) · w after every step.

    It is kept in each checkpoint, so a run that goes on has the one it would have had.
    """

    def __init__(self, net: nn.Module, decay: float, resume_from: Path | None = None) -> None:
        self.decay = decay
        self.trainable = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
        kept = load_file(resume_from / EMA_FILE) if resume_from else self.trainable
        self.ema = {name: kept[name].detach().clone().to(weight) for name, weight in self.trainable.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))  # young averages follow faster
        for name, weight in self.trainable.items():
            self.ema[name].lerp_(weight.detach(), 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            save_file({name: value.contiguous() for name, value in self.ema.items()}, folder / EMA_FILE)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """The net's weights become the average."""
        for name, weight in self.trainable.items():
            weight.copy_(self.ema[name])
