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

from mowa.adapters import checkpoint
from mowa.io import processor
from mowa.io.atomic import atomic_write
from mowa.io.weights import fix_weight_permissions
from mowa.quantization import qat
from mowa.tasks import metrics
from mowa.training.config import schema
from mowa.training.ctc.module import decode_frames, decode_labels
from mowa.training.ctc.setup import CTCRun, build_eval_dataset, is_main_process
from mowa.training.distributed import launch
from mowa.training.monitor import progress

DONE_MARKER = "done"


def save_run(run: CTCRun, trainer: Trainer, output_dir: Path, train_time_s: float) -> None:
    """Measure what came of it, and write it: weights, vocabulary, settings, report, curve."""
    plan, model = run.recipe, run.model
    words = model.vocabulary
    if plan.qat != "none":
        qat.round_weights(model.net)
    results = {}
    for name, examples in (run.data.dev | run.data.test).items():
        found: Any = trainer.predict(build_eval_dataset(run, examples), metric_key_prefix=name)
        said, heard = decode_labels(found.label_ids, words), decode_frames(found.predictions, words)
        results[name] = metrics.error_rates(said, heard) | {
            "interval": metrics.bootstrap_intervals(said, heard),
            "recordings": len(said),
            "hours": sum(example.duration_s for example in examples) / 3600,
        }
    state = launch.gather_state_dict(trainer) if launch.is_worker_process() else None
    if not is_main_process():
        return
    net = model.net
    if state is not None:
        replace_parameters(net, {name.removeprefix("net."): value for name, value in state.items()})
    if plan.qat != "none":
        qat.convert(net)
        setattr(net.config, qat.CONFIG_KEY, qat.config_entry(plan.qat, plan.qat_group_size))
    report = {
        "model": plan.model,
        "train": plan.method,
        "steps": trainer.state.global_step,
        "minutes": train_time_s / 60,
        "parameters": sum(p.numel() for p in net.parameters()),
        "learning": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "results": results,
        "versions": {name: version(name) for name in ("mowa", "torch", "transformers")},
    }
    if plan.method in ("lora", "bottleneck"):
        checkpoint.save_adapter(
            net,
            output_dir,
            adapter_type=plan.method,
            base=model.origin,
            vocabulary=words,
            preprocessing=model.preprocessing,
            metrics=results,
            language=plan.language,
        )
    else:
        with atomic_output_dir(output_dir) as finished:
            net.save_pretrained(finished)
            processor.write_processor(words, model.preprocessing, finished)
    finalize_run(
        plan,
        trainer,
        output_dir,
        report,
        best_step=None if plan.optimizer.ema_decay else trainer.state.best_global_step,
    )
    print(_format_table(results), file=sys.stderr)


@contextmanager
def atomic_output_dir(output_dir: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, whose files then take their places in `out`."""
    finished = output_dir / "run" / "finished"
    finished.mkdir(parents=True, exist_ok=True)
    yield finished
    fix_weight_permissions(finished)
    for file in sorted(finished.iterdir()):
        file.replace(output_dir / file.name)
    finished.rmdir()


def finalize_run(recipe: Any, trainer: Any, output_dir: Path, report: dict[str, Any], *, best_step: int | None) -> None:
    """Report, recipe and curve (with the `best` step marked) into `out`; what only broken-off runs need goes."""
    atomic_write(output_dir / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
    schema.write_yaml(recipe, output_dir / "recipe.yaml")
    progress.write_history(trainer.state.log_history, output_dir, best_step=best_step)
    for folder in (output_dir / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    (output_dir / "run" / DONE_MARKER).touch()


def replace_parameters(net: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Whole weights in the place of the parts that a strategy left on this process."""
    for name, value in state_dict.items():
        holder, _, leaf = name.rpartition(".")
        module = net.get_submodule(holder)
        if leaf in module._parameters:
            old = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)


def _format_table(results: dict[str, Any]) -> str:
    rows = ["recordings     clips     h   WER % (95 %)          CER % (95 %)"]
    for name, row in results.items():
        spans = {key: "{:.1f}–{:.1f}".format(*(100 * edge for edge in row["interval"][key])) for key in ("wer", "cer")}
        rows.append(
            f"{name:<14} {row['recordings']:>5} {row['hours']:>5.1f}   {row['wer'] * 100:5.1f} ({spans['wer']:<11})"
            f"   {row['cer'] * 100:5.1f} ({spans['cer']})"
        )
    return "\n".join(rows)
