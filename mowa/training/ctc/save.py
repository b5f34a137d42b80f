"""Evaluate a trained CTC net, write it, load it again and compare; format the table of error rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from mowa import loading
from mowa.adapters import checkpoint
from mowa.errors import TrainingStopped
from mowa.io import processor
from mowa.models.ctc_encoder import chunk_mask
from mowa.models.diff import ModelDiff, compare
from mowa.models.tolerances import SAVED_LOG_PROB, SAVED_LOG_PROB_GPU, SAVED_MIN_AGREEMENT_HALF
from mowa.quantization import qat
from mowa.tasks import metrics
from mowa.training.config.ctc import ADAPTER_METHODS
from mowa.training.ctc.batches import BatchDataset
from mowa.training.ctc.module import decode_frames, decode_labels
from mowa.training.ctc.setup import CTCRun, build_eval_datasets, eval_batch_options
from mowa.training.distributed import strategy
from mowa.training.distributed.process import is_worker_process
from mowa.training.save import atomic_output_dir
from mowa.types import CTCModel

COMPARED_CLIPS = 4  # of the first dev set, on which the net in memory and the saved one must agree
_KEPT = "The checkpoint in run/ is kept; please report this model"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a session measures.

    results    error rates of every dev and test set, by name
    log_probs  of each of `select_short_clips` by the trained net, float32 [T, V]; None in a single process, where
               `verify` can run that net itself
    """

    results: dict[str, Any]
    log_probs: list[np.ndarray] | None


def save(run: CTCRun, output_dir: Path, measured: Measured) -> None:
    """Write checkpoint or adapter, with vocabulary and audio settings."""
    recipe, model = run.recipe, run.model
    net = model.net
    if recipe.qat != "none":
        qat.convert(net)
        setattr(net.config, qat.CONFIG_KEY, qat.config_entry(recipe.qat, recipe.qat_group_size))
    if run.chunks is not None:
        chunk_mask.set_trained_chunking(net.config, run.chunks.trained_chunking())
    if recipe.method in ADAPTER_METHODS:
        checkpoint.save_adapter(
            net,
            output_dir,
            adapter_type=recipe.method,
            base=model.origin,
            vocabulary=model.vocabulary,
            preprocessing=model.preprocessing,
            metrics=measured.results,
            language=recipe.language,
        )
        return
    with atomic_output_dir(output_dir) as folder:
        net.save_pretrained(folder)
        processor.write_processor(model.vocabulary, model.preprocessing, folder)


def verify(run: CTCRun, output_dir: Path, measured: Measured) -> dict[str, Any]:
    """Load what `save` wrote, compare it with the trained net on a few short dev clips, and return the report.

    In a single process, the net in memory is compared in float32 and then moved to the CPU.

    Raises:
        TrainingStopped: vocabulary or log-probabilities differ.
    """
    net, clips, trained, device = run.model.net, select_short_clips(run), measured.log_probs, "cpu"
    if trained is None:
        device = net.device.type
        trained = _log_probs(net.float().eval(), clips)
    net.to("cpu")  # frees memory for the copy that is loaded
    loaded = load_again(run, output_dir)
    if loaded.vocabulary.tokens != run.model.vocabulary.tokens:
        raise TrainingStopped(f"{output_dir}: the saved vocabulary differs from the trained one.\n  {_KEPT}")
    found = compare(trained, _log_probs(loaded.net.to(device), clips), run.model.vocabulary.blank)
    exact = measured.log_probs is None or strategy.resolve_precision(run.recipe, net.config) == "float32"
    verify_emissions(found, (SAVED_LOG_PROB_GPU if torch.cuda.is_available() else SAVED_LOG_PROB) if exact else None)
    difference = {"max_log_prob": found.max_abs_diff, "agreement": found.agreement, "clips": len(clips)}
    return {"metrics": measured.results, "saved_model_difference": difference}


def verify_emissions(found: ModelDiff, tolerance: float | None) -> None:
    """Raise TrainingStopped where the saved net and the trained one differ by more than `tolerance` nats.

    With None, the trained one was run in half precision: the top token must agree in most of the frames.
    """
    minimum = SAVED_MIN_AGREEMENT_HALF
    different = found.agreement < minimum if tolerance is None else found.max_abs_diff > tolerance
    if different or found.num_frames == 0:
        limit = f"at least {minimum:.0%} of frames" if tolerance is None else f"at most {tolerance:g} nats"
        raise TrainingStopped(
            f"the saved model differs from the trained one: loaded again, a log-probability differs by "
            f"{found.max_abs_diff:.2g} nats, and the top token is the same in {found.agreement:.1%} of "
            f"{found.num_frames} frames (limit: {limit}).\n  {_KEPT}"
        )


def load_again(run: CTCRun, output_dir: Path) -> CTCModel:
    """Load the checkpoint in `output_dir`, or the adapter over the checkpoint that the run started from."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 the net would be sharded while it is loaded
    if run.recipe.method not in ADAPTER_METHODS:
        return loading.ctc.load(str(output_dir))
    base = loading.ctc.load(str(run.model.origin.folder), require_head=run.recipe.vocabulary != "new")
    return checkpoint.load_adapter(replace(base, origin=run.model.origin), output_dir)


def select_short_clips(run: CTCRun) -> list[torch.Tensor]:
    """Return the samples of the shortest recordings of the first dev set, float32 [1, N] each."""
    examples = sorted(next(iter(run.data.dev.values())), key=lambda example: example.duration_s)[:COMPARED_CLIPS]
    options = replace(eval_batch_options(run), packing=False)
    dataset = BatchDataset([[example] for example in examples], options)
    return [dataset[index]["input_values"] for index in range(len(dataset))]


@torch.no_grad()
def _log_probs(net: Any, clips: list[torch.Tensor]) -> list[np.ndarray]:
    """Return the log-probabilities of each clip, float32 [T, V]."""
    return [net(clip.to(net.device)).logits[0].float().log_softmax(-1).cpu().numpy() for clip in clips]


def measure(run: CTCRun, trainer: Trainer) -> Measured:
    """Evaluate the trained net on all devices; with `qat`, its weights are rounded first."""
    if run.recipe.qat != "none":
        qat.round_weights(run.model.net)
    return Measured(_evaluate(run, trainer), _wrapped_log_probs(run, trainer) if is_worker_process() else None)


@torch.no_grad()
def _wrapped_log_probs(run: CTCRun, trainer: Any) -> list[np.ndarray]:
    """Return the log-probabilities of the short clips by the net as it is sharded; every process must call it."""
    module, found = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model, []
    module.eval()
    for clip in select_short_clips(run):
        inputs = {"input_values": clip, "lengths": torch.tensor([clip.shape[1]]), "batch_index": torch.tensor([0])}
        with trainer.compute_loss_context_manager():
            out = module(**{name: value.to(trainer.args.device) for name, value in inputs.items()})
        found.append(out["logits"][0].float().log_softmax(-1).cpu().numpy())
    return found


def _evaluate(run: CTCRun, trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return error rates with 95 % confidence intervals of every dev and test set, by name."""
    vocabulary, results = run.model.vocabulary, {}
    for name, dataset in build_eval_datasets(run, run.data.dev | run.data.test).items():
        prediction: Any = trainer.predict(dataset, metric_key_prefix=name)
        references = decode_labels(prediction.label_ids, vocabulary)
        hypotheses = decode_frames(prediction.predictions, vocabulary)
        rates = metrics.bootstrap_error_rates(references, hypotheses)
        examples = [example for batch in dataset.batches for example in batch]
        results[name] = {
            "wer": rates.wer,
            "cer": rates.cer,
            "confidence_interval": {"wer": rates.wer_interval, "cer": rates.cer_interval},
            "recordings": len(references),
            "hours": sum(example.duration_s for example in examples) / 3600,
        }
    return results


def format_table(report: Mapping[str, Any]) -> str:
    """Format the error rates of a report, one set per line."""
    results = report["metrics"]
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
