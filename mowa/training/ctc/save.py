"""Evaluate the trained net and write it: weights or adapter, vocabulary, report and curve."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import Trainer

from mowa.adapters import checkpoint
from mowa.io import processor
from mowa.models.ctc_encoder import chunk_mask
from mowa.quantization import qat
from mowa.tasks import metrics
from mowa.training.config.ctc import ADAPTER_METHODS
from mowa.training.ctc.module import decode_frames, decode_labels
from mowa.training.ctc.setup import CTCRun, build_eval_datasets
from mowa.training.distributed import strategy
from mowa.training.distributed.process import is_main_process, is_worker_process
from mowa.training.save import atomic_output_dir, finalize_run, replace_parameters

BOOTSTRAP_RESAMPLES = 1000


def save_run(run: CTCRun, trainer: Trainer, output_dir: Path, train_time_s: float) -> None:
    """Evaluate the dev and test sets and write checkpoint or adapter, report.json, recipe.yaml and curve.png."""
    recipe, model = run.recipe, run.model
    if recipe.qat != "none":
        qat.round_weights(model.net)
    results = _evaluate(run, trainer)
    state = strategy.gather_state_dict(trainer) if is_worker_process() else None
    if not is_main_process():
        return
    net = model.net
    if state is not None:
        replace_parameters(net, {name.removeprefix("net."): value for name, value in state.items()})
    if recipe.qat != "none":
        qat.convert(net)
        setattr(net.config, qat.CONFIG_KEY, qat.config_entry(recipe.qat, recipe.qat_group_size))
    if run.chunks is not None:
        chunk_mask.set_trained_chunking(net.config, run.chunks.trained_chunking())
    report = {
        "model": recipe.model,
        "method": recipe.method,
        "global_step": trainer.state.global_step,
        "train_runtime_s": train_time_s,
        "num_parameters": sum(p.numel() for p in net.parameters()),
        "num_trainable_parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "metrics": results,
        "versions": {name: version(name) for name in ("mowa", "torch", "transformers")},
    }
    if recipe.method in ADAPTER_METHODS:
        checkpoint.save_adapter(
            net,
            output_dir,
            adapter_type=recipe.method,
            base=model.origin,
            vocabulary=model.vocabulary,
            preprocessing=model.preprocessing,
            metrics=results,
            language=recipe.language,
        )
    else:
        with atomic_output_dir(output_dir) as folder:
            net.save_pretrained(folder)
            processor.write_processor(model.vocabulary, model.preprocessing, folder)
    best_step = None if recipe.optimizer.ema_decay else trainer.state.best_global_step
    finalize_run(recipe, trainer, output_dir, report, best_step=best_step)
    print(_format_table(results), file=sys.stderr)


def _evaluate(run: CTCRun, trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return error rates with 95 % confidence intervals of every dev and test set, by name."""
    vocabulary, results = run.model.vocabulary, {}
    for name, dataset in build_eval_datasets(run, run.data.dev | run.data.test).items():
        prediction: Any = trainer.predict(dataset, metric_key_prefix=name)
        references = decode_labels(prediction.label_ids, vocabulary)
        hypotheses = decode_frames(prediction.predictions, vocabulary)
        rates = metrics.bootstrap_error_rates(references, hypotheses, n_resamples=BOOTSTRAP_RESAMPLES)
        examples = [example for batch in dataset.batches for example in batch]
        results[name] = {
            "wer": rates.wer,
            "cer": rates.cer,
            "confidence_interval": {"wer": rates.wer_interval, "cer": rates.cer_interval},
            "recordings": len(references),
            "hours": sum(example.duration_s for example in examples) / 3600,
        }
    return results


def _format_table(results: dict[str, Any]) -> str:
    width = max(14, *map(len, results))
    rows = [f"{'recordings':<{width}} clips     h   WER % (95 %)          CER % (95 %)"]
    for name, row in results.items():
        spans = {
            key: "{:.1f}–{:.1f}".format(*(100 * edge for edge in row["confidence_interval"][key]))
            for key in ("wer", "cer")
        }
        rows.append(
            f"{name:<{width}} {row['recordings']:>5} {row['hours']:>5.1f}"
            f"   {row['wer'] * 100:5.1f} ({spans['wer']:<11})   {row['cer'] * 100:5.1f} ({spans['cer']})"
        )
    return "\n".join(rows)
