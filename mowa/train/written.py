"""What the tuning of a language model ends with: the net measured, written, read again and compared, with a report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mowa.adapt import language, lora
from mowa.errors import TrainingStopped
from mowa.files import quiet, weights
from mowa.nouns import LanguageModel
from mowa.train import parallel
from mowa.train.finish import conclude, put, whole
from mowa.train.instruct import Instruction
from mowa.train.ready import first
from mowa.train.texts import Texts, measure

ALIKE, ROUGHLY = 1e-3, 3e-2  # share by which what was written may lose more or less: in float32, and in half precision


def finish(
    plan: Instruction,
    model: LanguageModel,
    texts: Texts,
    trainer: Any,
    out: Path,
    took_s: float,
    before: Mapping[str, Mapping[str, float]],
    lost: float,
) -> None:
    """Write what came of `model`, read it again, and measure that: what is reported is what anybody will find.

    lost: nats a token on the first dev set, as it was trained; TrainingStopped where what was written loses otherwise.
    """
    state = parallel.consolidated(trainer) if parallel.inside() else None
    if not first():
        return
    net = model.net
    if state is not None:
        put(net, state)
    counts = [sum(p.numel() for p in net.parameters() if every or p.requires_grad) for every in (True, False)]
    device, dtype = net.device, next((p.dtype for p in net.parameters() if not p.requires_grad), torch.float32)
    net.to("cpu")  # makes room for what is read again
    if plan.train == "lora":
        language.save(net, out, base=model.origin, tokenizer=model.tokenizer, metrics={})
        again = lora.over(_stock(model.origin.folder, dtype), out)
    else:
        net.to(language.stored_dtype(model.origin.folder))
        with whole(out) as finished:
            language.put(model, finished)
        again = _stock(out, dtype)
    again = again.to(device).eval()
    after = {name: measure(again, rows) for name, rows in (texts.dev | texts.test).items()}
    exact = plan.optimise.precision == "float32" and net.dtype == torch.float32
    _compare(lost, after[next(iter(texts.dev))]["loss"], ALIKE if exact else ROUGHLY)
    report = {
        "model": plan.model,
        "train": plan.train,
        "steps": trainer.state.global_step,
        "minutes": took_s / 60,
        "parameters": counts[0],
        "learning": counts[1],
        "before": before,
        "results": after,
        "versions": {name: version(name) for name in ("mowa", "torch", "transformers", "trl", "peft")},
    }
    if plan.train == "lora":
        language.note(out, metrics=after)
    conclude(plan, trainer, out, report, best=trainer.state.best_global_step)
    print(table(before, after), file=sys.stderr)


def _compare(lost: float, found: float, room: float) -> None:
    """What was written, read by transformers and PEFT, must lose what was lost before it was written."""
    if abs(found - lost) > room * max(1.0, lost):
        raise TrainingStopped(
            f"what was written is not what was trained: read again, it loses {found:.4f} nats a token, and lost "
            f"{lost:.4f} before.\n  The checkpoint in run/ is kept; please tell us which model this is"
        )


def _stock(folder: Path, dtype: torch.dtype) -> Any:
    """The net in `folder` as transformers reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 it would be shared out as it is read
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with quiet():
        return AutoModelForCausalLM.from_pretrained(weights(folder), config=config, dtype=dtype)


def table(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> str:
    rows = ["texts            tokens     loss before → after     likeliest token right"]
    for name, row in after.items():
        old = before.get(name)
        rows.append(
            f"{name:<14} {row['tokens']:>8,}     {old['loss'] if old else float('nan'):8.3f} → {row['loss']:<8.3f}"
            f"     {old['accuracy'] if old else float('nan'):6.1%} → {row['accuracy']:.1%}"
        )
    return "\n".join(rows)
