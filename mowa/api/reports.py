"""Compare quantization schemes: `mowa.compare_schemes` reports how much accuracy a model loses in each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mowa.api.models import Run, resolve_model
from mowa.errors import DataError, ModelError
from mowa.evaluation import quant_report, report, text_report
from mowa.evaluation.quant_report import QuantReport
from mowa.evaluation.quant_report_html import write_html
from mowa.evaluation.text_report import TextReport
from mowa.models.tolerances import MAX_PERPLEXITY_INCREASE, MAX_WER_INCREASE
from mowa.quantization.schemes import REPORT_SCHEMES, parse_scheme
from mowa.tasks.verbs import require_causal, require_ctc
from mowa.types import AnyModel, Scheme

__all__ = ["QuantReport", "TextReport", "compare_schemes"]


def compare_schemes(
    model: Run | str | Path | AnyModel,
    schemes: str | Sequence[str],
    data: str | Path,
    *,
    out: str | Path | None = None,
    formats: Sequence[str] = (),
    split: str = "",
    max_samples: int = 0,
    calibration_data: str = "",
    max_wer_increase: float = MAX_WER_INCREASE,
    max_perplexity_increase: float = MAX_PERPLEXITY_INCREASE,
    baseline: str = "",
    group_by: str = "",
    throughput: bool = False,
    keep_failed: bool = False,
    revision: str | None = None,
    target_lang: str | None = None,
    offline: bool = False,
    on_progress: Callable[[str, float], object] = lambda stage, fraction: None,
) -> QuantReport | TextReport:
    """Quantize a model in several schemes, evaluate each, and report whether it passes.

    Args:
        model: a model, or its name or folder as in `mowa.load`.
        schemes: as in `mowa.quantize`, or all.
        data: speech models: recordings, with transcripts for error rates; language models: conversations or texts.
        out: folder for the models that pass and the report; called again, it resumes. None: keep no files.
        formats: speech models: safetensors, onnx, ctranslate2; empty: the first two. Language models: safetensors.
        calibration_data, group_by, throughput: for speech models only, as in `mowa quantize`.
        max_wer_increase, max_perplexity_increase: relative; a scheme fails if it is exceeded significantly.
        baseline: model that is the reference; empty: the model itself.
        keep_failed: keep the files of schemes that fail.
        on_progress: called with a stage and the fraction done.

    Raises:
        DataError: `out` is a file, or there is nothing to evaluate. ModelError: an unknown scheme, or an option for
            speech models with a language model; and as `mowa.load`.
    """
    if out is not None and Path(out).is_file():
        raise DataError(f"{out} is a file: name a folder")
    names = [schemes] if isinstance(schemes, str) else list(schemes)
    for name in set(names) - {"all"}:
        parse_scheme(name)
    loaded = resolve_model(model, revision=revision, target_lang=target_lang, offline=offline)
    folder = None if out is None else Path(out)
    parsed = _parse_schemes(names, loaded.task)
    if loaded.task == "causal":
        _reject_speech_options(loaded, bool(calibration_data or group_by or throughput), formats)
        text = text_report.TextReportConfig(
            parsed, str(data), split, max_samples, max_perplexity_increase, keep_failed, baseline
        )
        return text_report.build_text_report(require_causal(loaded, "quantize"), text, folder, on_progress=on_progress)
    config = report.ReportConfig(
        schemes=parsed,
        formats=tuple(dict.fromkeys(formats)) or report.DEFAULT_FORMATS,
        data=str(data),
        split=split,
        max_samples=max_samples,
        calibration=calibration_data,
        max_wer_increase=max_wer_increase,
        group_by=group_by,
        throughput=report.throughput_grid() if throughput else (),
        keep_failed=keep_failed,
        baseline=baseline,
    )
    made = report.build_report(require_ctc(loaded, "quantize"), config, folder, on_progress=on_progress)
    if folder is not None:
        write_html(made, folder / quant_report.HTML_FILE)
    return made


def _parse_schemes(names: Sequence[str], task: str) -> tuple[Scheme, ...]:
    every = [one for name in names for one in (REPORT_SCHEMES[task] if name == "all" else (name,))]
    return tuple(dict.fromkeys(parse_scheme(name, task) for name in every))


def _reject_speech_options(model: AnyModel, given: bool, formats: Sequence[str]) -> None:
    if given or set(formats) - {"safetensors"}:
        raise ModelError(
            f"{model.origin.name} is a language model: formats other than safetensors, calibration data, grouping and"
            " throughput are options of speech models"
        )
