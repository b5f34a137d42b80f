"""The sentinels of a fine-tuning run, on duty: fed by its loss function and its Trainer, heard on the terminal.

Every finding stands in watch.jsonl, a warning is printed once, and a fatal one ends the run before its weights are
spoilt. What counts as a finding is `sentinels`' own; here are only the numbers' ways to them, and the weights.
"""

from __future__ import annotations

import json
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
from mowa.training.config.ctc import MonitorConfig
from mowa.training.monitor import sentinels
from mowa.training.monitor.sentinels import Finding

FINDINGS_FILE = "watch.jsonl"
TOKENS_PER_FRAME = 0.25  # of ordinary speech, at 50 frames a second: where nobody counted the letters
DENSE_CHECK_STEPS, SPARSE_CHECK_INTERVAL = (
    2 * sentinels.ZERO_GRAD_CHECKS,
    50,
)  # each parameter's gradient is looked at in the first steps, then every 50 steps


class Monitor:
    """All of them. What they find is kept in `out`/watch.jsonl, said once, and if it is fatal raised: TrainingStopped.

    `net` is what is trained; what is frozen of it is looked up when training begins. `tokens` are the head's, to name
    them. Of several processes the first one speaks and writes, and each raises what it sees itself.
    """

    def __init__(self, config: MonitorConfig, output_dir: Path, net: nn.Module, *, tokens: Sequence[str] = ()) -> None:
        self.config, self.out, self.net = config, output_dir, net
        self.is_main, self.reported = os.environ.get("RANK", "0") == "0", set[str]()
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
        """After a forward pass, before the backward one. TrainingStopped where it should go no further.

        losses [U] float, −log p of each utterance in nats; ids [U] their names; frames [F] int, the likeliest token of
        every true frame; letters: how many the texts have (0: a quarter of the frames). One copy from the device, which
        the check that losses are finite needs anyway; every SELDOM batches the frames too.
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
        """After a forward pass over examples of text: `loss`, nats a learnt token of the batch; `ids`, their names."""
        self.report(sentinels.check_loss(step, loss, ids))
        if self.divergence:
            self.report(self.divergence.update(step, loss))
        if self.no_learning:
            self.report(self.no_learning.update(step, loss, warming=self.warming_up))

    def on_evaluation(self, name: str, metrics: Mapping[str, float], step: int) -> None:
        """After a measurement of one set: loss, cer, wer. Sets whose names begin with replay are there to be kept."""
        self.report(self.check_evaluation(name, metrics, step))

    def check_evaluation(self, name: str, metrics: Mapping[str, float], step: int) -> Finding | None:
        if name.startswith("replay"):
            return self.forgetting.update(step, name, metrics) if self.forgetting else None
        return self.overfitting.update(step, name, metrics, self.train_loss)

    def report_overlap(self, overlap: Overlap) -> None:
        """What is measured and is known from training already; said before the first step."""
        self.report(find_leakage(overlap))

    def report(self, finding: Finding | None) -> None:
        if finding is None:
            return
        if self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / FINDINGS_FILE).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(asdict(finding), ensure_ascii=False) + "\n")
        if finding.fatal:
            raise TrainingStopped(str(finding))
        if self.is_main and finding.name not in self.reported:
            self.reported.add(finding.name)
            tqdm.write(str(finding), file=sys.stderr)  # beside a progress bar, not through it

    def callback(self) -> TrainerCallback:
        return MonitorCallback(self)


class MonitorCallback(TrainerCallback):
    """Feeds the sentinels what only the Trainer knows: gradients, frozen weights, measurements, the learning rate.

    Under DeepSpeed and FSDP gradients are in parts, or gone; there only the Trainer's own gradient norm is looked at.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.frozen: FrozenWeights | None = None
        self.gradients = sentinels.GradientMonitor()
        self.first, self.rate, self.sees_full_gradients = 0, 0.0, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        of = self.monitor
        self.first, self.sees_full_gradients = state.global_step, not _is_sharded(args)
        self.gradients = sentinels.GradientMonitor(scaled=args.fp16)
        self.frozen = FrozenWeights(of.net) if of.config.check_frozen else None
        for row in state.log_history:  # a run that goes on is measured against its beginning, not its middle
            of.train_loss = row.get("loss", of.train_loss)
            if found := parse_eval_metrics(row):
                of.check_evaluation(*found, row["step"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not (self.monitor.config.check_frozen and self.sees_full_gradients):
            return
        step = state.global_step
        learning = {name: p.grad for name, p in self.monitor.net.named_parameters() if p.requires_grad and p.numel()}
        there = {name: gradient for name, gradient in learning.items() if gradient is not None}
        self.monitor.report(self.gradients.check_norm(step, float(get_total_norm(list(there.values())))))
        if step - self.first < DENSE_CHECK_STEPS or step % SPARSE_CHECK_INTERVAL == 0:
            known = dict(zip(there, _gradient_norms(list(there.values())), strict=True))
            self.monitor.report(
                self.gradients.check_parameters(step, {name: known.get(name, 0.0) for name in learning})
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
    """Of each, in float32 or wider: in half precision a small gradient has the length 0. One copy from the device."""
    wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    each = [torch.linalg.vector_norm(gradient, dtype=kind) for gradient, kind in zip(gradients, wide, strict=True)]
    return torch.stack([length.to(each[0]) for length in each]).tolist() if each else []


def _is_sharded(args: Any) -> bool:
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("DEEPSPEED", "FSDP"))
    return bool(args.deepspeed or args.fsdp) or any(value.lower() in ("1", "true", "yes") for value in launched)


def find_leakage(overlap: Overlap) -> Finding | None:
    """Recordings that are both learnt from and measured make error rates too good, and so do known sentences."""
    kinds = {
        "are learnt from too": overlap.recordings,
        "say sentences that are learnt": overlap.sentences,
        "are of speakers that are learnt": overlap.speakers,
    }
    found = {said: shared for said, shared in kinds.items() if shared.count}
    if not found:
        return None
    parts = (
        f"{shared.count} {said} ({', '.join(shared.ids)}{', …' if shared.count > len(shared.ids) else ''})"
        for said, shared in found.items()
    )
    known = overlap.recordings.count or overlap.sentences.count
    advice = "Error rates will look better than they are: take them out of train, or measure on others"
    voices = "Error rates will hold for these voices only: to know how it hears others, measure on others"
    return Finding(
        "leakage", 0, f"of {overlap.total} recordings to measure on " + ", ".join(parts), advice if known else voices
    )


def parse_eval_metrics(metrics: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """What the Trainer measured, as eval_NAME_wer or eval_wer → NAME (or dev), {wer, cer, loss, blank, …}."""
    for key in metrics:
        if key.startswith("eval_") and key.endswith("_runtime"):
            prefix = key.removesuffix("runtime")
            values = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
            return prefix.removeprefix("eval_").removesuffix("_") or "dev", values
    return None


class FrozenWeights:
    """Frozen weights, and buffers of modules that are frozen whole (batch norm's statistics), must not move.

    Each is told by the sum of its bits, taken as integers: cheap, exact, the same in any memory format.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.before = net, weight_checksums(net)

    def check(self, step: int) -> Finding | None:
        now = weight_checksums(self.net)
        # What has another size now is another part: some strategies share weights out anew.
        moved = [
            name
            for name, (size, total) in self.before.items()
            if name in now and now[name][0] == size and now[name][1] != total
        ]
        if not moved:
            return None
        return Finding(
            "frozen moved",
            step,
            f"{len(moved)} of {len(self.before)} frozen weights have moved: {sentinels.format_names(moved)}",
            "Find what writes to them: an optimiser over all parameters, tied weights, batch norm in train mode",
            fatal=True,
        )


def weight_checksums(net: nn.Module) -> dict[str, tuple[int, int]]:
    """(elements, sum of bits) of whatever is frozen and lies on this process."""
    found: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if not p.requires_grad}
    for prefix, module in net.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            buffers = module.named_buffers(recurse=False)
            found |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in buffers}
    return {name: (value.numel(), _bits(value)) for name, value in found.items() if value.numel() and not value.is_meta}


def _bits(tensor: Tensor) -> int:
    own = tensor.detach()
    own = own.to_local() if hasattr(own, "to_local") else own  # a DTensor's share of this process
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[own.element_size()]
    return int(own.contiguous().view(width).sum(dtype=torch.int64))
