"""Write the fine-tuned language model, load it again, compare its loss, and report."""

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
from mowa.training.distributed import strategy
from mowa.training.distributed.process import is_main_process, is_worker_process
from mowa.training.save import atomic_output_dir, finalize_run, replace_parameters
from mowa.types import CausalModel

# Relative difference allowed between the loss before saving and after loading again.
FLOAT32_TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2


def save_run(
    recipe: CausalRecipe,
    model: CausalModel,
    splits: CausalSplits,
    trainer: Any,
    output_dir: Path,
    train_time_s: float,
    baseline: Mapping[str, Mapping[str, float]],
    eval_loss: float,
) -> None:
    """Write checkpoint or adapter, load it with transformers and PEFT, evaluate that, and write the report.

    Args:
        recipe: the recipe.
        model: the trained model; its net is moved to the CPU.
        splits: the data; dev and test are evaluated.
        trainer: the trainer, after training.
        output_dir: folder of the run.
        train_time_s: seconds of the run.
        baseline: metrics of the original checkpoint by set.
        eval_loss: loss of the trained net on the first dev set, nats per token.

    Raises:
        TrainingStopped: the loaded model has another loss than the trained one.
    """
    state = strategy.gather_state_dict(trainer) if is_worker_process() else None
    if not is_main_process():
        return
    net = model.net
    if state is not None:
        replace_parameters(net, state)
    parameters = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    device, dtype = net.device, next((p.dtype for p in net.parameters() if not p.requires_grad), torch.float32)
    net.to("cpu")  # frees memory for the copy that is loaded
    if recipe.method == "lora":
        causal.save_adapter(net, output_dir, base=model.origin, tokenizer=model.tokenizer, metrics={})
        loaded = lora.load_peft_model(_load_stock(model.origin.folder, dtype), output_dir)
    else:
        net.to(causal.stored_dtype(model.origin.folder))
        with atomic_output_dir(output_dir) as folder:
            causal.write_checkpoint(model, folder)
        loaded = _load_stock(output_dir, dtype)
    loaded = loaded.to(device).eval()
    metrics = {name: evaluate(loaded, samples) for name, samples in (splits.dev | splits.test).items()}
    exact = recipe.optimizer.precision == "float32" and net.dtype == torch.float32
    tolerance = FLOAT32_TOLERANCE if exact else HALF_TOLERANCE
    _verify_loss(eval_loss, metrics[next(iter(splits.dev))]["loss"], tolerance)
    report = {
        "model": recipe.model,
        "method": recipe.method,
        "global_step": trainer.state.global_step,
        "train_runtime_s": train_time_s,
        "num_parameters": parameters,
        "num_trainable_parameters": trainable,
        "baseline_metrics": baseline,
        "metrics": metrics,
        "versions": {name: version(name) for name in ("mowa", "torch", "transformers", "trl", "peft")},
    }
    if recipe.method == "lora":
        causal.write_metrics(output_dir, metrics=metrics)
    finalize_run(recipe, trainer, output_dir, report, best_step=trainer.state.best_global_step)
    print(format_table(baseline, metrics), file=sys.stderr)


def _verify_loss(trained: float, loaded: float, tolerance: float) -> None:
    """Raise TrainingStopped where the loaded model's loss differs from that of the trained one."""
    if abs(loaded - trained) > tolerance * max(1.0, trained):
        raise TrainingStopped(
            f"the saved model differs from the trained one: loaded again, its loss is {loaded:.4f} nats per token; "
            f"before saving it was {trained:.4f}.\n  The checkpoint in run/ is kept; please report this model"
        )


def _load_stock(folder: Path, dtype: torch.dtype) -> Any:
    """Load the net in `folder` with transformers alone."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 it would be sharded while it is loaded
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with silence_transformers():
        return AutoModelForCausalLM.from_pretrained(ensure_safetensors(folder), config=config, dtype=dtype)


def format_table(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> str:
    """Format losses and accuracies before and after training, one set per line."""
    rows = ["texts            tokens     loss before → after     accuracy before → after"]
    for name, row in after.items():
        old = before.get(name)
        rows.append(
            f"{name:<14} {row['tokens']:>8,}     {old['loss'] if old else float('nan'):8.3f} → {row['loss']:<8.3f}"
            f"     {old['accuracy'] if old else float('nan'):6.1%} → {row['accuracy']:.1%}"
        )
    return "\n".join(rows)
