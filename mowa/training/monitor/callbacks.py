"""Feed the sentinels of a run from its loss function and its Trainer, and report what they find.

Every finding is written to monitor.jsonl, a warning is printed once, and a fatal one stops the run before the weights
are updated. `sentinels` decides what counts as a finding; this module collects losses, gradients, frozen weights and
metrics.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm
from transformers import TrainerCallback

from mowa.data.quality.filter import Overlap
from mowa.errors import TrainingStopped
from mowa.io.atomic import dump_json
from mowa.training.config.shared import MonitorConfig
from mowa.training.distributed.process import is_main_process
from mowa.training.monitor import sentinels
from mowa.training.monitor.sentinels import Finding

FINDINGS_FILE = "monitor.jsonl"
TOKENS_PER_FRAME = 0.25  # of ordinary speech at 50 frames per second, where the number of tokens is not given
# The gradient of each parameter is checked in each of the first steps, then at intervals.
DENSE_CHECK_STEPS, SPARSE_CHECK_INTERVAL = 2 * sentinels.ZERO_GRAD_CHECKS, 50


class Monitor:
    """All sentinels of a run. Findings go to `output_dir`/monitor.jsonl; fatal ones raise TrainingStopped.

    Of several processes only the main one prints and writes, and each raises its own findings.

    Args:
        config: thresholds, from the recipe.
        output_dir: folder of the run.
        net: the module that is trained; its frozen weights are recorded when training begins.
        tokens: the head's vocabulary, to name tokens in messages.
    """

    def __init__(self, config: MonitorConfig, output_dir: Path, net: nn.Module, *, tokens: Sequence[str] = ()) -> None:
        self.config, self.out, self.net = config, output_dir, net
        self.is_main, self.reported = is_main_process(), set[str]()
        patience = config.collapse_patience
        self.collapse = (
            sentinels.BlankCollapse(config.blank_ratio, patience) if config.blank_ratio and patience else None
        )
        self.constant = sentinels.ConstantOutput(patience, tokens) if patience else None
        self.no_learning = sentinels.NoLearning(patience) if patience else None
        self.divergence = (
            sentinels.Divergence(config.divergence_factor, max(10, patience // 4)) if config.divergence_factor else None
        )
        self.forgetting = sentinels.Forgetting(config.forgetting_factor) if config.forgetting_factor else None
        self.overfitting = sentinels.Overfitting()
        self.batches, self.warming_up, self.train_loss = 0, False, math.nan

    def on_ctc_batch(
        self, step: int, losses: Tensor, ids: Sequence[str], frames: Tensor, blank: int, *, num_tokens: int = 0
    ) -> None:
        """Check a batch after its forward pass and before the backward pass.

        Copies from the device once; every TOKEN_CHECK_INTERVAL batches the frames as well.

        Args:
            step: optimizer step.
            losses: float [U], −log p of each recording in nats.
            ids: names of the recordings [U].
            frames: int [F], the predicted id of every frame without padding.
            blank: id of the blank.
            num_tokens: tokens of all texts; 0: estimated from the frames.

        Raises:
            TrainingStopped: a finding is fatal.
        """
        silent = (frames == blank).sum().float().reshape(1)
        *each, blanks = torch.cat([losses.detach().float().flatten(), silent]).tolist()
        self.report(sentinels.check_losses(step, each, ids))
        count, warming = max(1, frames.numel()), self.warming_up
        loss = sum(each) / (num_tokens or TOKENS_PER_FRAME * count)
        if self.divergence:
            self.report(self.divergence.update(step, loss))
        if self.no_learning:
            self.report(self.no_learning.update(step, loss, warming=warming))
        if self.collapse:
            self.report(self.collapse.update(step, blanks / count, loss, warming=warming))
        if self.constant and self.batches % sentinels.TOKEN_CHECK_INTERVAL == 0:
            self.report(self.constant.update(step, frames.tolist(), blank, loss, warming=warming))
        self.batches += 1

    def on_causal_batch(self, step: int, loss: float, ids: Sequence[str]) -> None:
        """Check a batch of texts after its forward pass: `loss` in nats per trained token, `ids` names the samples."""
        self.report(sentinels.check_loss(step, loss, ids))
        if self.divergence:
            self.report(self.divergence.update(step, loss))
        if self.no_learning:
            self.report(self.no_learning.update(step, loss, warming=self.warming_up))

    def on_evaluation(self, name: str, metrics: Mapping[str, float], step: int) -> None:
        """Check the metrics of one evaluation set; names that begin with replay are checked for forgetting."""
        self.report(self.check_evaluation(name, metrics, step))

    def check_evaluation(self, name: str, metrics: Mapping[str, float], step: int) -> Finding | None:
        """Update the sentinels of evaluations, and return a finding without reporting it."""
        if name.startswith("replay"):
            return self.forgetting.update(step, name, metrics) if self.forgetting else None
        return self.overfitting.update(step, name, metrics, self.train_loss)

    def report_overlap(self, overlap: Overlap) -> None:
        """Report what train shares with the evaluation sets."""
        self.report(find_leakage(overlap))

    def report(self, finding: Finding | None) -> None:
        """Write a finding to monitor.jsonl; print a warning the first time, raise TrainingStopped for a fatal one."""
        if finding is None:
            return
        if self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / FINDINGS_FILE).open("a", encoding="utf-8") as file:
                file.write(dump_json(asdict(finding)) + "\n")
        if finding.fatal:
            raise TrainingStopped(str(finding))
        if self.is_main and finding.monitor not in self.reported:
            self.reported.add(finding.monitor)
            tqdm.write(str(finding), file=sys.stderr)  # keeps a progress bar intact

    def callback(self) -> TrainerCallback:
        return MonitorCallback(self)


class MonitorCallback(TrainerCallback):
    """Feed a Monitor from the Trainer: gradients, frozen weights, metrics, warmup.

    Under DeepSpeed and FSDP gradients are sharded or freed, so only the Trainer's own gradient norm is checked.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.frozen: FrozenWeights | None = None
        self.gradients = sentinels.GradientMonitor()
        self.first, self.rate, self.sees_full_gradients = 0, 0.0, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        monitor = self.monitor
        self.first, self.sees_full_gradients = state.global_step, not _is_sharded(args)
        self.gradients = sentinels.GradientMonitor(scaled=args.fp16)
        self.frozen = FrozenWeights(monitor.net) if monitor.config.check_frozen else None
        for row in state.log_history:  # compare a resumed run with its start
            monitor.train_loss = row.get("loss", monitor.train_loss)
            if found := parse_eval_metrics(row):
                monitor.check_evaluation(*found, row["step"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not (self.monitor.config.check_frozen and self.sees_full_gradients):
            return
        step = state.global_step
        trainable = {name: p.grad for name, p in self.monitor.net.named_parameters() if p.requires_grad and p.numel()}
        gradients = {name: gradient for name, gradient in trainable.items() if gradient is not None}
        self.monitor.report(self.gradients.check_norm(step, float(get_total_norm(list(gradients.values())))))
        if step - self.first < DENSE_CHECK_STEPS or step % SPARSE_CHECK_INTERVAL == 0:
            norms = dict(zip(gradients, _gradient_norms(list(gradients.values())), strict=True))
            self.monitor.report(
                self.gradients.check_parameters(step, {name: norms.get(name, 0.0) for name in trainable})
            )

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        rate = max((group["lr"] for group in optimizer.param_groups), default=0.0) if optimizer else 0.0
        self.monitor.warming_up, self.rate = rate > self.rate > 0, rate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.monitor.train_loss = logs.get("loss", self.monitor.train_loss)
        if not self.sees_full_gradients and "grad_norm" in logs:
            self.monitor.report(self.gradients.check_norm(state.global_step, logs["grad_norm"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if self.frozen is not None:
            self.monitor.report(self.frozen.check(state.global_step))
        if found := parse_eval_metrics(metrics):
            self.monitor.on_evaluation(*found, state.global_step)


def _gradient_norms(gradients: list[Tensor]) -> list[float]:
    """Return the norm of each gradient, in float32 (half precision underflows), with one copy from the device."""
    dtypes = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
    return torch.stack([norm.to(norms[0]) for norm in norms]).tolist() if norms else []


def _is_sharded(args: Any) -> bool:
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("DEEPSPEED", "FSDP"))
    return bool(args.deepspeed or args.fsdp) or any(value.lower() in ("1", "true", "yes") for value in launched)


def find_leakage(overlap: Overlap) -> Finding | None:
    """Return a finding where dev and test share recordings, sentences or speakers with train."""
    kinds = {
        "are in train as well": overlap.recordings,
        "have a sentence of train": overlap.sentences,
        "have a speaker of train": overlap.speakers,
    }
    found = {kind: shared for kind, shared in kinds.items() if shared.count}
    if not found:
        return None
    parts = (
        f"{shared.count} {kind} ({', '.join(shared.ids)}{', …' if shared.count > len(shared.ids) else ''})"
        for kind, shared in found.items()
    )
    if overlap.recordings.count or overlap.sentences.count:
        suggestion = "Error rates will be too low: remove these from train, or evaluate on other recordings"
    else:
        suggestion = "Error rates will hold for these speakers only: evaluate on other speakers as well"
    return Finding(
        "train/test overlap", 0, f"of {overlap.total} recordings in dev and test, " + ", ".join(parts), suggestion
    )


def parse_eval_metrics(metrics: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Split the Trainer's metrics (eval_NAME_wer or eval_wer) into NAME (or dev) and {wer, cer, loss, blank_ratio, …}.

    None where they are not those of an evaluation.
    """
    for key in metrics:
        if key.startswith("eval_") and key.endswith("_runtime"):
            prefix = key.removesuffix("runtime")
            values = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
            return prefix.removeprefix("eval_").removesuffix("_") or "dev", values
    return None


class FrozenWeights:
    """Detect changes of frozen weights, and of buffers of frozen modules such as batch norm statistics.

    Compares the sum of the bits as integers, which is fast, exact, and the same in any memory format.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.before = net, weight_checksums(net)

    def check(self, step: int) -> Finding | None:
        """Return a fatal finding where a frozen weight has changed since the start."""
        now = weight_checksums(self.net)
        # Under some strategies the shard of this process changes; another size is another shard.
        changed = [
            name
            for name, (size, total) in self.before.items()
            if name in now and now[name][0] == size and now[name][1] != total
        ]
        if not changed:
            return None
        return Finding(
            "frozen weights changed",
            step,
            f"{len(changed)} of {len(self.before)} frozen weights changed: {sentinels.format_names(changed)}",
            "Look for an optimizer over all parameters, tied weights, or batch norm in training mode",
            fatal=True,
        )


def weight_checksums(net: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (elements, sum of bits) of every frozen weight and buffer on this process, by name."""
    found: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if not p.requires_grad}
    for prefix, module in net.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            buffers = module.named_buffers(recurse=False)
            found |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in buffers}
    return {name: (value.numel(), _bits(value)) for name, value in found.items() if value.numel() and not value.is_meta}


def _bits(tensor: Tensor) -> int:
    local = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local  # the shard of a DTensor
    dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    return int(local.contiguous().view(dtype).sum(dtype=torch.int64))
