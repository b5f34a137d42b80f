"""`mowa.evaluate` and `mowa.bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mowa.api.artifacts import resolve_model
from mowa.api.training import Run
from mowa.engines import transcription
from mowa.engines.settings import EngineSpec, TranscriptionSettings
from mowa.evaluation import scoring
from mowa.evaluation.bench import BenchResult, expand_cases, run_bench
from mowa.evaluation.scoring import Evaluation
from mowa.types import AnyModel

__all__ = ["BenchResult", "Evaluation", "bench", "evaluate"]


def evaluate(
    model: Run | str | Path | AnyModel,
    data: str | Path,
    *,
    split: str = "",
    max_samples: int = 0,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    on_progress: Callable[[float], object] = lambda amount: None,
    **settings: Any,
) -> Evaluation:
    """Measure a model on data with known answers.

    Args:
        model: a model, or its name or folder as in `mowa.load`; exports too.
        data: for speech, recordings with transcripts; for text, conversations or texts.
        split: split of the data, if it has several.
        max_samples: evaluate at most this many; 0: all.
        engine, device, dtype, threads: of speech, as in `mowa.transcribe`.
        on_progress: called with seconds of audio, or numbers of texts.
        settings: of speech, fields of `TranscriptionSettings`.

    Returns:
        WER and CER of a speech model, loss and perplexity of a language model, with 95 % confidence intervals.

    Raises:
        DataError: there is nothing to evaluate; ModelError as `mowa.load`.
    """
    if isinstance(model, str | Path) and transcription.resolve_artifact(str(model)) is not None:
        found: Any = str(model)
    else:
        found = resolve_model(model)
        if found.task == "causal":
            return scoring.evaluate_text(
                found, data, split=split, max_samples=max_samples, on_progress=on_progress, **settings
            )
    spec = EngineSpec("", engine=engine, device=device, dtype=dtype, threads=threads)
    opened = transcription.open_engine(found, spec)
    return scoring.evaluate_speech(
        opened,
        data,
        split=split,
        max_samples=max_samples,
        settings=TranscriptionSettings(**settings),
        on_progress=on_progress,
    )


def bench(
    models: str | Sequence[str],
    *,
    engines: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    data: str | None = None,
    split: str = "",
    max_samples: int = 20,
    throughput: Sequence[tuple[int, int]] = (),
    on_progress: Callable[[str, float], object] = lambda stage, fraction: None,
) -> list[BenchResult]:
    """Measure latency, throughput, memory and size of models, each in a process of its own.

    Args:
        models: aliases, folders, Hub ids or exports.
        engines: pytorch, onnx; empty: pytorch, and for an export its own.
        dtypes: float32, bfloat16, int8 or auto; empty: auto.
        data: recordings; None: a bundled sample.
        throughput: (threads, batch size) pairs to time.
        on_progress: called with a stage and the fraction done.

    Raises: DataError if `data` has no recordings. A model that cannot be run is a result with an `error`.
    """
    cases = expand_cases([models] if isinstance(models, str) else list(models), engines, dtypes)
    return run_bench(cases, data, split, max_samples, tuple(throughput), on_progress)
