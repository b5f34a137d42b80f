"""What a fine-tuning run ends with: the net measured and written, with its vocabulary, a report and a curve."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from mowa.adapt import processor, store
from mowa.files import atomic_write, let_read
from mowa.tasks import ctc
from mowa.train import parallel, qat, schema, view
from mowa.train.pupil import spelt, texts
from mowa.train.ready import Run, first, measured

DONE = "done"


def finish(run: Run, trainer: Trainer, out: Path, took_s: float) -> None:
    """Measure what came of it, and write it: weights, vocabulary, settings, report, curve."""
    plan, model = run.plan, run.model
    words = model.vocabulary
    if plan.qat != "none":
        qat.settle(model.net)
    results = {}
    for name, examples in (run.data.dev | run.data.test).items():
        found: Any = trainer.predict(measured(run, examples), metric_key_prefix=name)
        said, heard = spelt(found.label_ids, words), texts(found.predictions, words)
        results[name] = ctc.error_rates(said, heard) | {
            "interval": ctc.intervals(said, heard),
            "recordings": len(said),
            "hours": sum(example.duration_s for example in examples) / 3600,
        }
    state = parallel.consolidated(trainer) if parallel.inside() else None
    if not first():
        return
    net = model.net
    if state is not None:
        put(net, {name.removeprefix("net."): value for name, value in state.items()})
    if plan.qat != "none":
        qat.plain(net)
        setattr(net.config, qat.NOTE, qat.note(plan.qat, plan.qat_group))
    report = {
        "model": plan.model,
        "train": plan.train,
        "steps": trainer.state.global_step,
        "minutes": took_s / 60,
        "parameters": sum(p.numel() for p in net.parameters()),
        "learning": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "results": results,
        "versions": {name: version(name) for name in ("mowa", "torch", "transformers")},
    }
    if plan.train in ("lora", "adapters"):
        store.save(
            net,
            out,
            kind=plan.train,
            base=model.origin,
            vocabulary=words,
            preprocessing=model.preprocessing,
            metrics=results,
            language=plan.language,
        )
    else:
        with whole(out) as finished:
            net.save_pretrained(finished)
            processor.write(words, model.preprocessing, finished)
    conclude(plan, trainer, out, report, best=None if plan.optimise.ema else trainer.state.best_global_step)
    print(_table(results), file=sys.stderr)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, whose files then take their places in `out`."""
    finished = out / "run" / "finished"
    finished.mkdir(parents=True, exist_ok=True)
    yield finished
    let_read(finished)
    for file in sorted(finished.iterdir()):
        file.replace(out / file.name)
    finished.rmdir()


def conclude(plan: Any, trainer: Any, out: Path, report: dict[str, Any], *, best: int | None) -> None:
    """Report, recipe and curve (with the `best` step marked) into `out`; what only broken-off runs need goes."""
    atomic_write(out / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
    schema.write(plan, out / "recipe.yaml")
    view.history(trainer.state.log_history, out, best=best)
    for folder in (out / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    (out / "run" / DONE).touch()


def put(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Whole weights in the place of the parts that a strategy left on this process."""
    for name, value in state.items():
        holder, _, leaf = name.rpartition(".")
        module = net.get_submodule(holder)
        if leaf in module._parameters:
            old = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)


def _table(results: dict[str, Any]) -> str:
    rows = ["recordings     clips     h   WER % (95 %)          CER % (95 %)"]
    for name, row in results.items():
        spans = {key: "{:.1f}–{:.1f}".format(*(100 * edge for edge in row["interval"][key])) for key in ("wer", "cer")}
        rows.append(
            f"{name:<14} {row['recordings']:>5} {row['hours']:>5.1f}   {row['wer'] * 100:5.1f} ({spans['wer']:<11})"
            f"   {row['cer'] * 100:5.1f} ({spans['cer']})"
        )
    return "\n".join(rows)
