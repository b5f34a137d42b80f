"""What the tuning of a language model ends with: the net measured, written, read again and compared, with a report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mowa.adapters import causal, lora
from mowa.errors import TrainingStopped
from mowa.io.hub import silence_transformers
from mowa.io.weights import ensure_safetensors
from mowa.training.causal.dataset import CausalSplits, evaluate
from mowa.training.config.causal import CausalRecipe
from mowa.training.ctc.save import atomic_output_dir, finalize_run, replace_parameters
from mowa.training.ctc.setup import is_main_process
from mowa.training.distributed import launch
from mowa.types import LanguageModel

FLOAT32_TOLERANCE, HALF_TOLERANCE = (
    1e-3,
    3e-2,
)  # share by which what was written may lose more or less: in float32, and in half precision


def save_run(
    recipe: CausalRecipe,
    model: LanguageModel,
    splits: CausalSplits,
    trainer: Any,
    output_dir: Path,
    train_time_s: float,
    baseline: Mapping[str, Mapping[str, float]],
    eval_loss: float,
) -> None:
    """Write what came of `model`, read it again, and measure that: what is reported is what anybody will find.

    lost: nats a token on the first dev set, as it was trained; TrainingStopped where what was written loses otherwise.
    """
    state = launch.gather_state_dict(trainer) if launch.is_worker_process() else None
    if not is_main_process():
        return
    net = model.net
    if state is not None:
        replace_parameters(net, state)
    counts = [sum(p.numel() for p in net.parameters() if every or p.requires_grad) for every in (True, False)]
    device, dtype = net.device, next((p.dtype for p in net.parameters() if not p.requires_grad), torch.float32)
    net.to("cpu")  # makes room for what is read again
    if recipe.method == "lora":
        causal.save_adapter(net, output_dir, base=model.origin, tokenizer=model.tokenizer, metrics={})
        again = lora.load_peft_model(_load_stock(model.origin.folder, dtype), output_dir)
    else:
        net.to(causal.stored_dtype(model.origin.folder))
        with atomic_output_dir(output_dir) as finished:
            causal.write_checkpoint(model, finished)
        again = _load_stock(output_dir, dtype)
    again = again.to(device).eval()
    after = {name: evaluate(again, rows) for name, rows in (splits.dev | splits.test).items()}
    exact = recipe.optimizer.precision == "float32" and net.dtype == torch.float32
    _verify_loss(eval_loss, after[next(iter(splits.dev))]["loss"], FLOAT32_TOLERANCE if exact else HALF_TOLERANCE)
    report = {
        "model": recipe.model,
        "train": recipe.method,
        "steps": trainer.state.global_step,
        "minutes": train_time_s / 60,
        "parameters": counts[0],
        "learning": counts[1],
        "before": baseline,
        "results": after,
        "versions": {name: version(name) for name in ("mowa", "torch", "transformers", "trl", "peft")},
    }
    if recipe.method == "lora":
        causal.write_metrics(output_dir, metrics=after)
    finalize_run(recipe, trainer, output_dir, report, best_step=trainer.state.best_global_step)
    print(format_table(baseline, after), file=sys.stderr)


def _verify_loss(lost: float, found: float, room: float) -> None:
    """What was written, read by transformers and PEFT, must lose what was lost before it was written."""
    if abs(found - lost) > room * max(1.0, lost):
        raise TrainingStopped(
            f"what was written is not what was trained: read again, it loses {found:.4f} nats a token, and lost "
            f"{lost:.4f} before.\n  The checkpoint in run/ is kept; please tell us which model this is"
        )


def _load_stock(folder: Path, dtype: torch.dtype) -> Any:
    """The net in `folder` as transformers reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 it would be shared out as it is read
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with silence_transformers():
        return AutoModelForCausalLM.from_pretrained(ensure_safetensors(folder), config=config, dtype=dtype)


def format_table(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> str:
    rows = ["texts            tokens     loss before → after     likeliest token right"]
    for name, row in after.items():
        old = before.get(name)
        rows.append(
            f"{name:<14} {row['tokens']:>8,}     {old['loss'] if old else float('nan'):8.3f} → {row['loss']:<8.3f}"
            f"     {old['accuracy'] if old else float('nan'):6.1%} → {row['accuracy']:.1%}"
        )
    return "\n".join(rows)
