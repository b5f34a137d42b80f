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

from mowa.data.sift import Overlap
from mowa.errors import TrainingStopped
from mowa.train import sentinels
from mowa.train.sentinels import Finding
from mowa.train.tuning import Watch

JOURNAL = "watch.jsonl"
LETTERS_A_FRAME = 0.25  # of ordinary speech, at 50 frames a second: where nobody counted the letters
OFTEN, RARELY = 2 * sentinels.DEAD, 50  # each parameter's gradient is looked at in the first steps, then every 50 steps


class Sentinels:
    """All of them. What they find is kept in `out`/watch.jsonl, said once, and if it is fatal raised: TrainingStopped.

    `net` is what is trained; what is frozen of it is looked up when training begins. `tokens` are the head's, to name
    them. Of several processes the first one speaks and writes, and each raises what it sees itself.
    """

    def __init__(self, knobs: Watch, out: Path, net: nn.Module, *, tokens: Sequence[str] = ()) -> None:
        self.knobs, self.out, self.net = knobs, out, net
        self.speaks, self.said = os.environ.get("RANK", "0") == "0", set[str]()
        patience = knobs.patience
        self.collapse = sentinels.Collapse(knobs.blank, patience) if knobs.blank and patience else None
        self.constant = sentinels.Constant(patience, tokens) if patience else None
        self.idle = sentinels.NoLearning(patience) if patience else None
        self.divergence = sentinels.Divergence(knobs.divergence, max(10, patience // 4)) if knobs.divergence else None
        self.forgetting = sentinels.Forgetting(knobs.forgetting) if knobs.forgetting else None
        self.overfitting = sentinels.Overfitting()
        self.batches, self.warming, self.learnt = 0, False, math.nan

    def batch(
        self, step: int, losses: Tensor, ids: Sequence[str], frames: Tensor, blank: int, *, letters: int = 0
    ) -> None:
        """After a forward pass, before the backward one. TrainingStopped where it should go no further.

        losses [U] float, −log p of each utterance in nats; ids [U] their names; frames [F] int, the likeliest token of
        every true frame; letters: how many the texts have (0: a quarter of the frames). One copy from the device, which
        the check that losses are finite needs anyway; every SELDOM batches the frames too.
        """
        silent = (frames == blank).sum().float().reshape(1)
        *each, blanks = torch.cat([losses.detach().float().flatten(), silent]).tolist()
        self.tell(sentinels.broken(step, each, ids))
        count, warming = max(1, frames.numel()), self.warming
        loss = sum(each) / (letters or LETTERS_A_FRAME * count)
        if self.divergence:
            self.tell(self.divergence.see(step, loss))
        if self.idle:
            self.tell(self.idle.see(step, loss, warming=warming))
        if self.collapse:
            self.tell(self.collapse.see(step, blanks / count, loss, warming=warming))
        if self.constant and self.batches % sentinels.SELDOM == 0:
            self.tell(self.constant.see(step, frames.tolist(), blank, loss, warming=warming))
        self.batches += 1

    def texts(self, step: int, loss: float, ids: Sequence[str]) -> None:
        """After a forward pass over examples of text: `loss`, nats a learnt token of the batch; `ids`, their names."""
        self.tell(sentinels.broken_batch(step, loss, ids))
        if self.divergence:
            self.tell(self.divergence.see(step, loss))
        if self.idle:
            self.tell(self.idle.see(step, loss, warming=self.warming))

    def evaluated(self, name: str, metrics: Mapping[str, float], step: int) -> None:
        """After a measurement of one set: loss, cer, wer. Sets whose names begin with replay are there to be kept."""
        self.tell(self.judged(name, metrics, step))

    def judged(self, name: str, metrics: Mapping[str, float], step: int) -> Finding | None:
        if name.startswith("replay"):
            return self.forgetting.see(step, name, metrics) if self.forgetting else None
        return self.overfitting.see(step, name, metrics, self.learnt)

    def leak(self, overlap: Overlap) -> None:
        """What is measured and is known from training already; said before the first step."""
        self.tell(leakage(overlap))

    def tell(self, finding: Finding | None) -> None:
        if finding is None:
            return
        if self.speaks:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(asdict(finding), ensure_ascii=False) + "\n")
        if finding.fatal:
            raise TrainingStopped(str(finding))
        if self.speaks and finding.name not in self.said:
            self.said.add(finding.name)
            tqdm.write(str(finding), file=sys.stderr)  # beside a progress bar, not through it

    def callback(self) -> TrainerCallback:
        return Watching(self)


class Watching(TrainerCallback):
    """Feeds the sentinels what only the Trainer knows: gradients, frozen weights, measurements, the learning rate.

    Under DeepSpeed and FSDP gradients are in parts, or gone; there only the Trainer's own gradient norm is looked at.
    """

    def __init__(self, of: Sentinels) -> None:
        self.of = of
        self.frozen: Frozen | None = None
        self.gradients = sentinels.Gradients()
        self.first, self.rate, self.whole = 0, 0.0, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        of = self.of
        self.first, self.whole = state.global_step, not _sharded(args)
        self.gradients = sentinels.Gradients(scaled=args.fp16)
        self.frozen = Frozen(of.net) if of.knobs.frozen else None
        for row in state.log_history:  # a run that goes on is measured against its beginning, not its middle
            of.learnt = row.get("loss", of.learnt)
            if found := measured(row):
                of.judged(*found, row["step"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not (self.of.knobs.frozen and self.whole):
            return
        step = state.global_step
        learning = {name: p.grad for name, p in self.of.net.named_parameters() if p.requires_grad and p.numel()}
        there = {name: gradient for name, gradient in learning.items() if gradient is not None}
        self.of.tell(self.gradients.total(step, float(get_total_norm(list(there.values())))))
        if step - self.first < OFTEN or step % RARELY == 0:
            known = dict(zip(there, _lengths(list(there.values())), strict=True))
            self.of.tell(self.gradients.see(step, {name: known.get(name, 0.0) for name in learning}))

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        rate = max((group["lr"] for group in optimizer.param_groups), default=0.0) if optimizer else 0.0
        self.of.warming, self.rate = rate > self.rate > 0, rate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.of.learnt = logs.get("loss", self.of.learnt)
        if not self.whole and "grad_norm" in logs:
            self.of.tell(self.gradients.total(state.global_step, logs["grad_norm"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if self.frozen is not None:
            self.of.tell(self.frozen.see(state.global_step))
        if found := measured(metrics):
            self.of.evaluated(*found, state.global_step)


def _lengths(gradients: list[Tensor]) -> list[float]:
    """Of each, in float32 or wider: in half precision a small gradient has the length 0. One copy from the device."""
    wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    each = [torch.linalg.vector_norm(gradient, dtype=kind) for gradient, kind in zip(gradients, wide, strict=True)]
    return torch.stack([length.to(each[0]) for length in each]).tolist() if each else []


def _sharded(args: Any) -> bool:
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("DEEPSPEED", "FSDP"))
    return bool(args.deepspeed or args.fsdp) or any(value.lower() in ("1", "true", "yes") for value in launched)


def leakage(overlap: Overlap) -> Finding | None:
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
        "leakage", 0, f"of {overlap.of} recordings to measure on " + ", ".join(parts), advice if known else voices
    )


def measured(metrics: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """What the Trainer measured, as eval_NAME_wer or eval_wer → NAME (or dev), {wer, cer, loss, blank, …}."""
    for key in metrics:
        if key.startswith("eval_") and key.endswith("_runtime"):
            prefix = key.removesuffix("runtime")
            values = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
            return prefix.removeprefix("eval_").removesuffix("_") or "dev", values
    return None


class Frozen:
    """Frozen weights, and buffers of modules that are frozen whole (batch norm's statistics), must not move.

    Each is told by the sum of its bits, taken as integers: cheap, exact, the same in any memory format.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.before = net, sums(net)

    def see(self, step: int) -> Finding | None:
        now = sums(self.net)
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
            f"{len(moved)} of {len(self.before)} frozen weights have moved: {sentinels.some(moved)}",
            "Find what writes to them: an optimiser over all parameters, tied weights, batch norm in train mode",
            fatal=True,
        )


def sums(net: nn.Module) -> dict[str, tuple[int, int]]:
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
