"""Callbacks of the Trainer that make checkpoints survive a kill at any moment, and average weights.

A checkpoint counts only once it has a completion marker (`run_dir`). Older ones are deleted only after a newer one is
complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from mowa.training.run_dir import COMPLETE_MARKER, delete_checkpoint, list_checkpoints

EMA_FILE = "ema.safetensors"
KEPT_CHECKPOINTS = 2  # the last one and the best one


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
