"""Write a checkpoint with an adapter merged into its weights, after comparing it with base model plus adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mowa import loading
from mowa.adapters import causal, merge
from mowa.adapters.loading import atomic_checkpoint, load_adapter, read_base_name
from mowa.data import audio
from mowa.data.chat import conversations, tokenize
from mowa.data.chat.samples import Conversation, Message
from mowa.errors import DataError, ModelError, RecipeError
from mowa.io.hub import SAMPLE_CLIP
from mowa.models.diff import ModelDiff
from mowa.models.tolerances import MAX_ABS_DIFF
from mowa.training.causal import dataset
from mowa.training.causal.batches import padded_batches
from mowa.training.config import dispatch
from mowa.types import CausalModel, CTCModel

OnComparison = Callable[[str, ModelDiff], object]  # what was compared, and the difference between the outputs

CHUNK_S, MAX_COMPARED_S = 15.0, 60.0  # emissions are compared on chunks of at most this much of each recording
MAX_SAMPLES = 64  # samples that a merged language model is compared on
FALLBACK_PROMPTS = (
    "What is the capital of Poland?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three fruits that are red.",
    "How do I boil an egg?",
    "Translate to French: Good morning, how are you?",
    "What is 17 plus 25?",
    "Name a famous composer and one of his works.",
)


def write_merged(
    adapter: Path,
    out: Path,
    *,
    base_model: str | None = None,
    dtype: str = "auto",
    audio_files: Sequence[str | Path] = (),
    data: Sequence[str] = (),
    tolerance: float = MAX_ABS_DIFF,
    offline: bool = False,
    on_comparison: OnComparison = lambda label, diff: None,
) -> None:
    """Merge the adapter in a folder into its base model and write the checkpoint to the new folder `out`.

    Args:
        adapter: folder of an adapter by mowa or PEFT, for a speech or language model.
        out: folder to create.
        base_model: name of the base model, if it is not where the adapter recorded it.
        dtype: dtype of a language model's weights; auto: the base model's.
        audio_files: recordings to compare a speech model on; none: the bundled sample.
        data: files to compare a language model on; none: what the run held out, or else FALLBACK_PROMPTS.
        tolerance: largest difference of a log-probability of a speech model, in nats.
        offline: use cached files only.
        on_comparison: called after each comparison.

    Raises:
        ModelError: the merged model differs; `out` is then not created. And as `load` and `load_adapter`.
        DataError: `out` exists, or nothing is left to compare on.
    """
    base = loading.load(base_model or read_base_name(adapter), offline=offline)
    adapted = load_adapter(base, adapter)
    if base.task == "ctc":
        clips = _load_clips(audio_files or (SAMPLE_CLIP,), adapted.preprocessing.rate_hz)
        _write_ctc(base, adapted, out, clips, tolerance, on_comparison)
    else:
        samples, source = _comparison_samples(adapter, cast(CausalModel, adapted), data)
        if dtype == "auto":
            dtype = causal.stored_dtype(base.origin.folder)

        def report(label: str, diff: ModelDiff) -> None:
            on_comparison(f"{label}, {source}", diff)

        _write_causal(base, adapted, out, samples, dtype, report)


def _write_ctc(
    base: CTCModel, adapted: CTCModel, out: Path, clips: list[np.ndarray], tolerance: float, on_comparison: OnComparison
) -> None:
    with atomic_checkpoint(merge.merge_adapter(adapted), out) as written:
        diff = merge.compare_emissions(adapted, loading.ctc.load(str(written)), clips)
        on_comparison("base + adapter → merged", diff)
        if base.vocabulary == adapted.vocabulary:
            on_comparison("base → merged", merge.compare_emissions(base, adapted, clips))
        if diff.max_abs_diff > tolerance:
            raise ModelError(
                f"the merged checkpoint differs from base model plus adapter: log-probabilities by up to"
                f" {diff.max_abs_diff:.2g} (tolerance {tolerance:g}); {out} was not written"
            )


def _write_causal(
    base: CausalModel, adapted: CausalModel, out: Path, samples: list[Any], dtype: str, on_comparison: OnComparison
) -> None:
    rounding = []

    def measure(reference: CausalModel, candidate: CausalModel, label: str) -> ModelDiff:
        found = causal.compare_logits(reference, candidate, padded_batches(samples, dataset.EVAL_BATCH_TOKENS))
        on_comparison(label, found)
        return found

    if dtype != "float32":
        rounded = loading.causal.load(str(base.origin.folder), dtype=dtype)
        rounding.append(measure(base, rounded, f"base → base in {dtype}"))
        del rounded
        if (rounded_like := causal.round_as_merged(base, adapted, dtype)) is not None:
            rounding.append(measure(base, rounded_like, "base → base with the rounding of the merge"))
            del rounded_like
    with atomic_checkpoint(causal.merge_adapter(adapted, dtype), out) as written:
        loaded = loading.causal.load(str(written), dtype=dtype)
        causal.verify_merge(measure(adapted, loaded, f"base + adapter → merged in {dtype}"), *rounding)


def _load_clips(files: Sequence[str | Path], rate_hz: int) -> list[np.ndarray]:
    """Return chunks of every recording, float32 [n] of at least 0.1 s each."""
    chunk = int(CHUNK_S * rate_hz)
    loaded = [
        audio.load_audio(file, rate_hz)[: int(MAX_COMPARED_S * rate_hz)] for file in audio.find_audio_files(files)
    ]
    chunks = [samples[start : start + chunk] for samples in loaded for start in range(0, len(samples), chunk)]
    return [samples for samples in chunks if len(samples) >= rate_hz // 10]


def _comparison_samples(folder: Path, model: CausalModel, data: Sequence[str]) -> tuple[list[Any], str]:
    """Return tokenized samples to compare on, and where they are from."""
    options: Any = {"train_on": "all", "on_overflow": "truncate", "max_length": dataset.EVAL_BATCH_TOKENS}
    if data:
        items = [item for path in data for item in conversations.read_conversations(path)]
        samples = tokenize.tokenize_conversations(items, model.tokenizer, **options)[0]
        return samples[:MAX_SAMPLES], ", ".join(data)
    try:
        splits = dataset.load_splits(cast(Any, dispatch.read_recipe(folder / "recipe.yaml")), model)
    except (DataError, RecipeError):  # the data has moved, or PEFT wrote the adapter
        items = [
            Conversation(str(number), (Message("user", prompt),)) for number, prompt in enumerate(FALLBACK_PROMPTS)
        ]
        return tokenize.tokenize_conversations(items, model.tokenizer, **options)[0], "eight built-in prompts"
    held_out = [sample for samples in (splits.test | splits.dev).values() for sample in samples]
    return held_out[:MAX_SAMPLES], "held-out data"
