"""`mowa quantize`: quantize a model in one or more schemes and formats, and report the loss in accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mowa.cli import output
from mowa.quantization.schemes import SCHEME_SYNTAX, SCHEMES

if TYPE_CHECKING:
    from mowa.evaluation.quant_report import QuantReport, ReportRow
    from mowa.evaluation.text_report import TextReport, TextReportRow

_SUFFIXES = f"{SCHEME_SYNTAX[0].upper()}{SCHEME_SYNTAX[1:]}."
BASE_COLUMNS = ("scheme", "format", "MB", "size ratio", "RAM MB", "RTFx", "speedup", "agreement", "KL")
ERROR_RATE_COLUMNS = ("WER % (95 %)", "CER %", "WER change")
TEXT_COLUMNS = ("scheme", "MB", "size ratio", "agreement", "KL", "perplexity (95 %)", "perplexity change", "verdict")


def parse_ratio(context: click.Context, parameter: click.Parameter, text: str) -> float:
    """Parse 2% or 0.02 into 0.02."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise click.BadParameter(f"{text} is not a ratio; write 2% or 0.02") from None


# fmt: off
@click.command(short_help="Quantize a model and measure the loss in accuracy.")
@click.argument("model")
@click.option("--scheme", "scheme_names", multiple=True, required=True, metavar="SCHEME",
              help=f"Weight storage scheme, repeatable: {', '.join(SCHEMES)}, or all. {_SUFFIXES}")
@click.option("--to", "formats", multiple=True, metavar="FORMAT",
              help="Output format, repeatable: safetensors (PyTorch), onnx, ctranslate2."
              " [default: safetensors, onnx; for a language model, safetensors]")
@click.option("--data", required=True, metavar="SOURCE",
              help="Evaluation recordings: a manifest, corpus or folder; transcripts are needed for error rates."
              " For a language model, conversations or texts.")
@click.option("--split", default="", help="Split of --data.")
@click.option("--max-samples", type=click.IntRange(min=0), default=0,
              help="Maximum number of recordings or texts to evaluate (0 = all).")
@click.option("--calibration-data", default="", metavar="SOURCE",
              help="Calibration recordings. [default: a few held out from --data]")
@click.option("--max-wer-increase", default="2%", show_default=True, callback=parse_ratio, metavar="RATIO",
              help="Maximum relative increase in word errors over float32.")
@click.option("--max-perplexity-increase", default="2%", show_default=True, callback=parse_ratio, metavar="RATIO",
              help="Language models: maximum relative increase in perplexity over the checkpoint.")
@click.option("--baseline", default="", metavar="MODEL",
              help="Model whose float32 outputs are the reference, e.g. the one it was fine-tuned from."
              " [default: MODEL]")
@click.option("--group-by", default="", metavar="TAG",
              help="Also report error rates per value of a metadata field, e.g. language.")
@click.option("--throughput", is_flag=True,
              help="Measure the real-time factor with 1 and all threads, batch sizes 1 and 4.")
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Output folder for the models and the report (quant_report.json; for a speech model also .html);"
              " rerun the same command to resume. [default: print the table, keep no files]")
@click.option("--force", is_flag=True, help="Keep schemes that fail.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--target-lang", metavar="LANG", help="Language of an MMS checkpoint, such as pol.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def quantize(
    model: str, scheme_names: tuple[str, ...], formats: tuple[str, ...], data: str, split: str, max_samples: int,
    calibration_data: str, max_wer_increase: float, max_perplexity_increase: float, baseline: str, group_by: str,
    throughput: bool, out: Path | None, force: bool, revision: str | None, target_lang: str | None, offline: bool,
) -> int:
    # fmt: on
    """Quantize MODEL in one or more schemes and formats, evaluate each on data, and report whether it passes.

    Each result is compared with float32: size, memory, speed, output difference and word error rate. A scheme passes if
    the word error rate increases by at most --max-wer-increase; it fails, and is deleted, if the increase is larger and
    statistically significant; otherwise the result is inconclusive. The exit code is 2 if any scheme failed. For a
    language model, perplexity takes the place of the word error rate.
    """
    import mowa
    from mowa.evaluation import quant_report

    with output.stage_progress() as on_progress:
        made = mowa.compare_schemes(
            model, scheme_names, data, out=out, formats=formats, split=split, max_samples=max_samples,
            calibration_data=calibration_data, max_wer_increase=max_wer_increase,
            max_perplexity_increase=max_perplexity_increase, baseline=baseline, group_by=group_by,
            throughput=throughput, keep_failed=force, revision=revision, target_lang=target_lang, offline=offline,
            on_progress=on_progress,
        )  # fmt: skip
    if isinstance(made, quant_report.QuantReport):
        _print(made)
    else:
        _print_text(made)
    if out is not None:
        is_speech = isinstance(made, quant_report.QuantReport)
        click.echo(f"\n{out / (quant_report.HTML_FILE if is_speech else quant_report.JSON_FILE)}")
    return 2 if any(row.verdict == quant_report.FAIL for row in made.rows) else 0


def _print_text(report: TextReport) -> None:
    click.echo(f"{report.model}, {report.num_samples} samples, {report.num_tokens:,} tokens; {report.machine}\n")
    output.print_table(TEXT_COLUMNS, [_text_cells(row) for row in report.rows])


def _text_cells(row: TextReportRow) -> list[str]:
    if row.loss is None or row.loss_change is None or row.diff is None:
        return [row.scheme, *["–"] * (len(TEXT_COLUMNS) - 2), f"{row.verdict}: {row.reason}"]
    low, high = row.loss.perplexity_interval
    return [
        row.scheme, f"{row.size_bytes / 1e6:.1f}", f"{row.size_ratio:.1%}", f"{row.diff.agreement:.2%}",
        f"{row.diff.kl:.4f}", f"{row.loss.perplexity:.3f} ({low:.3f}–{high:.3f})",
        f"{row.loss_change.perplexity_ratio - 1:+.2%}", f"{row.verdict}: {row.reason}",
    ]  # fmt: skip


def _print(report: QuantReport) -> None:
    click.echo(
        f"{report.model}, {report.num_recordings} recordings, {report.audio_s / 60:.1f} minutes; {report.machine}\n"
    )
    with_wer = any(row.error_rates for row in report.rows)
    columns = [*BASE_COLUMNS, *(ERROR_RATE_COLUMNS if with_wer else ()), "verdict"]
    output.print_table(columns, [_cells(row, with_wer) for row in report.rows])
    for row in report.rows:
        label = f"{row.scheme} as {row.format}"
        for value, group in row.by_group.items():
            rates, change = group.error_rates, group.error_rate_change
            low, high = change.wer_interval
            click.echo(
                f"{label}, {value or 'untagged'}: WER {rates.wer:.1%}, CER {rates.cer:.1%},"
                f" WER change {change.wer:+.1%} ({low:+.1%} to {high:+.1%})"
            )
        for line in output.throughput_lines(label, row.throughput):
            click.echo(line)


def _cells(row: ReportRow, with_wer: bool) -> list[str]:
    if row.diff is None:
        empty = len(BASE_COLUMNS) - 2 + (len(ERROR_RATE_COLUMNS) if with_wer else 0)
        return [row.scheme, row.format, *["–"] * empty, f"{row.verdict}: {row.reason}"]
    cells = [
        row.scheme, row.format, f"{row.size_bytes / 1e6:.1f}", f"{row.size_ratio:.1%}",
        f"{row.peak_memory_bytes / 1e6:.0f}", f"{1 / row.rtf:.1f}", f"{row.speedup:.2f}",
        f"{row.diff.agreement:.2%}", f"{row.diff.kl:.4f}",
    ]  # fmt: skip
    if with_wer and row.error_rates and row.error_rate_change:
        low, high = row.error_rates.wer_interval
        cells += [
            f"{row.error_rates.wer * 100:.1f} ({low * 100:.1f}–{high * 100:.1f})",
            f"{row.error_rates.cer * 100:.2f}",
            f"{row.error_rate_change.wer:+.1%}",
        ]
    elif with_wer:
        cells += ["–"] * len(ERROR_RATE_COLUMNS)
    return [*cells, f"{row.verdict}: {row.reason}"]
