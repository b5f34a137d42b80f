"""Measure models: `mowa.evaluate` computes error rates or perplexity on data, `mowa.bench` speed, memory and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from mowa.api.models import Run, load, read_task, resolve_model
from mowa.api.options import TranscribeOptions, TranscriptionOptions, split_options
from mowa.api.text import set_threads
from mowa.engines import transcription
from mowa.engines.registry import AUTO
from mowa.engines.settings import EngineSpec, TranscriptionSettings
from mowa.engines.transcription import resolve_artifact
from mowa.errors import DataError, ModelError
from mowa.evaluation import scoring
from mowa.evaluation.bench import BenchResult, expand_cases, run_bench
from mowa.evaluation.scoring import Evaluation
from mowa.evaluation.text_bench import TextBenchResult, is_text_bench, run_text_bench
from mowa.types import AnyModel, Model

__all__ = ["BenchResult", "Evaluation", "TextBenchResult", "bench", "evaluate"]


def evaluate(
    model: Run | str | Path | AnyModel,
    data: str | Path,
    *,
    split: str = "",
    max_samples: int = 0,
    train_on: str = "auto",
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_progress: Callable[[float], object] = lambda amount: None,
    **options: Unpack[TranscribeOptions],
) -> Evaluation:
    """Measure a model on data with known answers.

    Args:
        model: a model, or its name or folder as in `mowa.load`; exports too.
        data: for speech, recordings with transcripts; for text, conversations or texts.
        split: split of the data, if it has several.
        max_samples: evaluate at most this many; 0: all.
        train_on: language models: which tokens count, as in recipes; auto: the answers in conversations, all tokens of
            texts.
        max_length: language models: longer samples are cut to this many tokens; None: 2,048, or the model's context
            if it is shorter.
        chat_template_kwargs: language models: variables that the chat template reads, as in recipes.
        on_progress: called with seconds of audio, or numbers of texts.
        options: as in `mowa.transcribe`. Language models take adapter, device, dtype, threads, revision and offline,
            and a model that is loaded already has them.

    Returns:
        Speech models: WER and CER; language models: loss, perplexity and accuracy; each with its 95 %
            confidence interval.

    Raises:
        DataError: there is nothing to evaluate, or max_samples or max_length is out of range; ModelError as
            `mowa.load`, or for an option that does not apply to the model.
    """
    spec, settings = split_options("evaluate", TranscriptionSettings, options)
    found, spec = _load_text_model(model, spec)
    common: Any = {"split": split, "max_samples": max_samples, "on_progress": on_progress}
    if isinstance(found, Model) and found.task == "causal":
        if inapplicable := [name for name in TranscriptionOptions.__annotations__ if name in options]:
            raise ModelError(f"{found.origin.name} is a language model: {', '.join(inapplicable)} do not apply")
        if spec.engine not in (AUTO, "pytorch"):
            raise ModelError(f"engine {spec.engine!r} does not run language models: omit it")
        set_threads(spec.threads)
        text_options: Any = {"max_length": max_length, "chat_template_kwargs": chat_template_kwargs}
        return scoring.evaluate_text(found, data, train_on=train_on, **text_options, **common)
    of_text = {"train_on": train_on != "auto", "max_length": max_length is not None}
    of_text["chat_template_kwargs"] = bool(chat_template_kwargs)
    if name := next((name for name, given in of_text.items() if given), None):
        raise ModelError(f"{name} is an option of language models, and the model is a speech model")
    return scoring.evaluate_speech(transcription.open_engine(found, spec), data, settings=settings, **common)


def _load_text_model(model: Run | str | Path | AnyModel, spec: EngineSpec) -> tuple[str | AnyModel, EngineSpec]:
    """Return the loaded model where it is a language model or was loaded, else its name, and the spec that remains."""
    if isinstance(model, Run) and spec.adapter is None:
        model = model.folder
    loading: Any = {"revision": spec.revision, "offline": spec.offline, "target_lang": spec.target_lang}
    if isinstance(model, str | Path):
        is_text = resolve_artifact(str(model)) is None and (
            read_task(model, revision=spec.revision, offline=spec.offline) == "causal"
        )
        loading |= {"adapter": spec.adapter, "device": spec.device, "dtype": spec.dtype}
        return (load(model, **loading) if is_text else str(model)), spec
    found = resolve_model(model, adapter=spec.adapter, **loading)
    if found.task == "causal" and (given := [name for name in ("device", "dtype") if getattr(spec, name) != AUTO]):
        raise ModelError(f"{found.origin.name} is loaded already: give {' and '.join(given)} to mowa.load")
    return found, replace(spec, adapter=None)


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
) -> list[BenchResult] | list[TextBenchResult]:
    """Measure latency, throughput, memory and size of models, each in a process of its own.

    Args:
        models: aliases, folders, Hub ids or exports; all must have the same task.
        engines: pytorch, onnx; empty: pytorch, and for an export its own. Language models run with pytorch.
        dtypes: float32, bfloat16, int8 or auto; empty: auto.
        data: speech models: recordings to run; None: a bundled sample.
        throughput: speech models: (threads, batch size) pairs to time.
        on_progress: called with a stage and the fraction done.

    Raises: DataError if `data` has no recordings; ModelError for speech and language models together. A model that
    cannot be run is a result with an `error`.
    """
    names = [models] if isinstance(models, str) else list(models)
    if is_text_bench(names):
        if data or throughput:
            raise DataError("language models are measured on random tokens: data and throughput are options of speech")
        return run_text_bench(names, engines, dtypes, on_progress)
    cases = expand_cases(names, engines, dtypes)
    return run_bench(cases, data, split, max_samples, tuple(throughput), on_progress)
