"""`mowa shrink`: a model in fewer bits, and the report card that says what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mowa.cli import output
from mowa.errors import DataError
from mowa.quantization.schemes import SCHEME_SYNTAX, SCHEMES

if TYPE_CHECKING:
    from mowa.evaluation.quant_report import QuantReport, ReportRow

ALL_SCHEMES = (
    "fp16",
    "bf16",
    "int8-dynamic",
    "int8-static",
    "int8-weight",
    "int4-weight",
    "int4-weight+gptq",
    "nf4",
    "mixed",
)
BASE_COLUMNS = ("scheme", "as", "MB", "of float32", "RAM MB", "× real time", "speed", "frames", "KL")
ERROR_RATE_COLUMNS = ("WER % (95 %)", "CER %", "words")


def parse_ratio(context: click.Context, parameter: click.Parameter, text: str) -> float:
    """2% or 0.02 → 0.02."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise click.BadParameter(f"{text} is no share: say it as 2%") from None


# fmt: off
@click.command(short_help="Make a model smaller, and measure what it costs.")
@click.argument("model")
@click.option("--scheme", "named", multiple=True, required=True, metavar="SCHEME",
              help=f"{', '.join(SCHEMES)}, or all; several may be named. {SCHEME_SYNTAX[0].upper()}{SCHEME_SYNTAX[1:]}.")
@click.option("--to", "formats", multiple=True, default=("safetensors", "onnx"), show_default=True, metavar="FORMAT",
              help="What it is written as: safetensors (run by PyTorch), onnx, ctranslate2.")
@click.option("--data", required=True, metavar="SOURCE",
              help="Recordings to measure on: a manifest, a corpus, a folder; with texts for error rates.")
@click.option("--split", default="", help="Split of --data.")
@click.option("--clips", type=click.IntRange(min=0), default=0, help="At most so many recordings; 0: all.")
@click.option("--calibrate", "calibration", default="", metavar="SOURCE",
              help="Recordings to calibrate on. [default: a few of --data, which are not measured then]")
@click.option("--max-wer-increase", "most", default="2%", show_default=True, callback=parse_ratio, metavar="SHARE",
              help="How many more words may be wrong, relative to float32.")
@click.option("--against", default="", metavar="MODEL",
              help="Compare with the float32 of this model, which it was trained on from. [default: its own]")
@click.option("--by", "tag", default="", metavar="TAG", help="Error rates for each value of a tag (language) too.")
@click.option("--speeds", is_flag=True, help="Time it with one thread and all, one recording and four.")
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Folder for what was made, card.json and card.html; the same command goes on where it ended.")
@click.option("--force", is_flag=True, help="Keep what the card refuses.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--offline", is_flag=True, help="Never ask the hub; use what is cached.")
def quantize(
    model: str, named: tuple[str, ...], formats: tuple[str, ...], data: str, split: str, clips: int, calibration: str,
    most: float, against: str, tag: str, speeds: bool, out: Path | None, force: bool, revision: str | None,
    offline: bool,
) -> int:
    # fmt: on
    """Write MODEL in one or more schemes and formats, run each over recordings, and say whether it may ship.

    Each is compared with float32: size, memory, speed, how far the net's numbers drifted, and what became of the words.
    It may ship where word errors increase by --max-wer-increase at most; it is refused, and not kept, where they
    increase by more and not by chance. The exit code is 2 where something was refused.
    """
    from mowa.evaluation import quant_report_html, report
    from mowa.evaluation.quant_report import FAIL
    from mowa.loading.ctc import load
    from mowa.quantization import schemes

    chosen = tuple(schemes.parse_scheme(one) for name in named for one in (ALL_SCHEMES if name == "all" else (name,)))
    wanted = report.ReportConfig(
        tuple(dict.fromkeys(chosen)), tuple(dict.fromkeys(formats)), data, split, clips, calibration, most, tag,
        report.throughput_grid() if speeds else (), force, against,
    )  # fmt: skip
    if out is not None and out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file: name a folder with --out")
    loaded = load(model, revision=revision, offline=offline)
    with output.stage_progress() as told:
        card = report.build_report(loaded, wanted, out, on_progress=told)
    _say(card)
    if out is not None:
        quant_report_html.write_html(card, out / "card.html")
        click.echo(f"\n{out / 'card.html'}")
    return 2 if any(row.verdict == FAIL for row in card.rows) else 0


def _say(card: QuantReport) -> None:
    click.echo(f"{card.model}, {card.num_recordings} recordings, {card.audio_s / 60:.1f} minutes; {card.machine}\n")
    heard = any(row.error_rates for row in card.rows)
    output.print_table([*BASE_COLUMNS, *(ERROR_RATE_COLUMNS if heard else ()), "verdict"], [_cells(row, heard) for row in card.rows])
    for row in card.rows:
        for value, (rates, more) in row.by_group.items():
            low, high = more.wer_interval
            told = f"WER {rates.wer:.1%}, CER {rates.cer:.1%}, words {more.wer:+.1%} ({low:+.1%} to {high:+.1%})"
            click.echo(f"{row.scheme} as {row.format}, {value or 'untagged'}: {told}")
        for speed in row.throughput:
            threads = f"{speed.threads} thread{'s' * (speed.threads > 1)}"
            click.echo(f"{row.scheme} as {row.format}, {threads}, batch {speed.batch_size}: {speed.rtf:.4f} s for a second")


def _cells(row: ReportRow, heard: bool) -> list[str]:
    if row.diff is None:
        return [row.scheme, row.format, *["–"] * (len(BASE_COLUMNS) - 2 + (len(ERROR_RATE_COLUMNS) if heard else 0)), f"no: {row.reason}"]
    drift, words = row.diff, []
    if heard:
        words = ["–"] * 3
        if row.error_rates and row.error_rate_change:
            low, high = row.error_rates.wer_interval
            wer = f"{row.error_rates.wer * 100:.1f} ({low * 100:.1f}–{high * 100:.1f})"
            words = [wer, f"{row.error_rates.cer * 100:.2f}", f"{row.error_rate_change.wer:+.1%}"]
    numbers = [f"{row.size_bytes / 1e6:.1f}", f"{row.size_ratio:.1%}", f"{row.peak_memory_bytes / 1e6:.0f}", f"{1 / row.rtf:.1f}"]
    measured = [f"{row.speedup:.2f}", f"{drift.agreement:.2%}", f"{drift.kl:.4f}"]
    return [row.scheme, row.format, *numbers, *measured, *words, f"{row.verdict}: {row.reason}"]
