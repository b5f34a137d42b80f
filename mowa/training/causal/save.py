"""Write the fine-tuned language model, load it again, compare its loss, and report."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mowa.adapters import causal, embeddings, lora
from mowa.adapters.loading import validate_tensors
from mowa.errors import ModelError, TrainingStopped
from mowa.io.hub import silence_transformers
from mowa.io.manifest import update_manifest
from mowa.io.weights import ensure_safetensors
from mowa.loading.checkpoint import validate_loading_info
from mowa.models.tolerances import SAVED_LOSS_FLOAT32, SAVED_LOSS_HALF
from mowa.training.causal.dataset import evaluate
from mowa.training.causal.setup import CausalRun
from mowa.training.distributed.process import is_worker_process
from mowa.training.save import atomic_output_dir

_KEPT = "The checkpoint in run/ is kept; please report this model"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a session measures.

    baseline    metrics of the original checkpoint by set; empty where the net is sharded
    eval_loss   loss of the trained net on the first dev set, nats per token
    base_dtype  dtype of the frozen weights, in which the saved model is evaluated; float32 if there are none
    """

    baseline: Mapping[str, Mapping[str, float]]
    eval_loss: float
    base_dtype: torch.dtype


def save(run: CausalRun, output_dir: Path, measured: Measured) -> None:
    """Write checkpoint or adapter, and the tokenizer; the net is moved to the CPU."""
    model, net = run.model, run.model.net
    net.to("cpu")  # frees memory for the copy that `verify` loads
    if run.recipe.method == "lora":
        causal.save_adapter(net, output_dir, base=model.origin, tokenizer=model.tokenizer, metrics={})
        return
    net.to(getattr(torch, causal.stored_dtype(model.origin.folder)))
    with atomic_output_dir(output_dir) as folder:
        causal.write_checkpoint(model, folder)


def verify(run: CausalRun, output_dir: Path, measured: Measured) -> dict[str, Any]:
    """Load what `save` wrote with transformers and PEFT alone, evaluate it, and return the report.

    Raises:
        TrainingStopped: the files lack weights, or the loaded model has another loss than the trained one.
    """
    recipe, model, splits = run.recipe, run.model, run.splits
    try:
        if recipe.method == "lora":
            base = _load_stock(model.origin.folder, measured.base_dtype)
            embeddings.resize(base, model.net.get_input_embeddings().weight.shape[0], mean_resizing=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error in the next line
                loaded = lora.load_peft_model(base, output_dir)
            validate_tensors(loaded, output_dir)
        else:
            loaded = _load_stock(output_dir, measured.base_dtype)
    except (ModelError, ValueError) as error:
        raise TrainingStopped(f"the saved model cannot be loaded again: {error}.\n  {_KEPT}") from error
    on_gpu = torch.cuda.is_available() and not is_worker_process()  # what was sharded may not fit on one GPU
    loaded = loaded.to("cuda" if on_gpu else "cpu").eval()
    metrics = {name: evaluate(loaded, samples) for name, samples in (splits.dev | splits.test).items()}
    _verify_loss(measured.eval_loss, metrics[next(iter(splits.dev))]["loss"], loss_tolerance(run))
    if recipe.method == "lora":
        update_manifest(output_dir, metrics=metrics)
    return {"baseline_metrics": measured.baseline, "metrics": metrics}


def _verify_loss(trained: float, loaded: float, tolerance: float) -> None:
    """Raise TrainingStopped where the loaded model's loss differs from that of the trained one."""
    if abs(loaded - trained) > tolerance * max(1.0, trained):
        raise TrainingStopped(
            f"the saved model differs from the trained one: loaded again, its loss is {loaded:.4f} nats per token; "
            f"before saving it was {trained:.4f}.\n  {_KEPT}"
        )


def verify_best(trained: float, best: float | None, tolerance: float) -> None:
    """Raise TrainingStopped where the net with the best checkpoint loaded has another loss than it had when written."""
    if best is not None and abs(trained - best) > tolerance * max(1.0, best):
        raise TrainingStopped(
            f"the best checkpoint was not read back as it was: its loss was {best:.4f} nats per token, and is now "
            f"{trained:.4f}.\n  {_KEPT}"
        )


def loss_tolerance(run: CausalRun) -> float:
    """Return by which fraction the loss of the trained net may change when it is written and read."""
    exact = run.recipe.optimizer.precision == "float32" and run.model.net.dtype == torch.float32
    return SAVED_LOSS_FLOAT32 if exact else SAVED_LOSS_HALF


def _load_stock(folder: Path, dtype: torch.dtype) -> Any:
    """Load the net in `folder` with transformers alone. Raises ModelError where weights are missing or others."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 it would be sharded while it is loaded
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with silence_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            ensure_safetensors(folder), config=config, dtype=dtype, output_loading_info=True
        )
    net, loading_info = loaded
    validate_loading_info(folder, net.base_model_prefix, loading_info)
    return net


def format_table(report: Mapping[str, Any]) -> str:
    """Format the losses and accuracies of a report before and after training, one set per line."""
    before, after = report["baseline_metrics"], report["metrics"]
    rows = ["texts            tokens     loss before → after     accuracy before → after"]
    for name, row in after.items():
        old = before.get(name)
        rows.append(
            f"{name:<14} {row['tokens']:>8,}     {old['loss'] if old else float('nan'):8.3f} → {row['loss']:<8.3f}"
            f"     {old['accuracy'] if old else float('nan'):6.1%} → {row['accuracy']:.1%}"
        )
    return "\n".join(rows)
