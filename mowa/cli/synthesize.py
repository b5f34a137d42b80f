"""`mowa data synthesize`: make a speech corpus from sentences with a text-to-speech program."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from mowa.data.tts.engines import ENGINES

if TYPE_CHECKING:
    from mowa.data.tts.speaker import Failure

MAX_PRINTED = 10  # skipped recordings that are printed


def _split_names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name for part in value.split(",") if (name := part.strip()))


def _split_numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        numbers = [float(name) for name in _split_names(ctx, param, value)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 120,160,200") from None
    return tuple(int(number) if number.is_integer() else number for number in numbers)


# fmt: off
@click.command(short_help="Make a speech corpus from sentences.")
@click.argument("text", type=click.File("rb"))
@click.option("-l", "--language", required=True, metavar="CODE", help="Language of the sentences, such as pl.")
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Folder for train.jsonl, dev.jsonl and audio/.")
@click.option("--engine", type=click.Choice(ENGINES), default="espeak-ng", show_default=True,
              help="Text-to-speech program.")
@click.option("--command", metavar="TEMPLATE", default="",
              help="With --engine command: a program that reads a sentence from standard input and writes {wav}, such"
              " as 'piper --model v.onnx --output_file {wav}'. {voice}, {rate} and {pitch} are filled in too. No shell"
              " is involved.")
@click.option("--voices", metavar="NAME,…", default="", callback=_split_names,
              help="espeak-ng: variants (f1) or whole voices (en-us+f1); festival: voices; command: values of {voice}."
              " [default: espeak-ng's variants without effects such as whisper]")
@click.option("--rates", metavar="NUMBER,…", default="", callback=_split_numbers,
              help="espeak-ng: words per minute, 80 to 450; festival: speed, 1 = the voice's own; command: values of"
              " {rate}. [default: espeak-ng 120,140,…,220]")
@click.option("--pitches", metavar="NUMBER,…", default="", callback=_split_numbers,
              help="espeak-ng: 0 to 99; command: values of {pitch}. [default: espeak-ng 25,40,55,70]")
@click.option("--encoding", metavar="NAME", default="",
              help="Encoding that the program reads. [default: UTF-8; festival: by language, ISO-8859-2 for cs]")
@click.option("--clips", type=click.IntRange(min=1), metavar="N",
              help="Number of recordings. If larger than the number of sentences, each is spoken by several voices; if"
              " smaller, sentences are sampled. [default: one per sentence]")
@click.option("--dev", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True, metavar="SHARE",
              help="Share of the sentences held out for dev.jsonl; with three voices or more, also of the voices.")
@click.option("--sample-rate", type=click.IntRange(8_000, 48_000), default=16_000, show_default=True, metavar="HZ",
              help="Sample rate of the recordings.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed for voices, rates and pitches.")
@click.option("--processes", type=click.IntRange(min=1), metavar="N",
              help="Number of programs that run in parallel. [default: one per processor]")
def synthesize(
    text: BinaryIO, language: str, out: Path, engine: str, command: str, voices: tuple[str, ...],
    rates: tuple[float, ...], pitches: tuple[float, ...], encoding: str, clips: int | None, dev: float,
    sample_rate: int, seed: int, processes: int | None,
) -> int:
    """Speak the sentences of TEXT and write recordings with their manifests.

    TEXT is a UTF-8 file with one sentence per line, or - for standard input. Choices follow from --seed; the same
    command continues an interrupted run. Sentences that cannot be spoken are skipped, and the exit code is then 2.

    \b
      mowa data synthesize sentences.txt --language pl -o corpus
      mowa data synthesize sentences.txt -l pl --engine command --command 'RHVoice-test -p natan -o {wav}' -o corpus
      mowa data check corpus
    """
    # fmt: on
    from tqdm import tqdm

    from mowa.data.manifests.text_tables import decode_lines
    from mowa.data.synthesize import synthesize as make_corpus

    bar = tqdm(total=0, desc="synthesizing", unit="clip", smoothing=0.05, disable=None)
    printed = 0

    def show_progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    def show_failure(failure: Failure) -> None:
        nonlocal printed
        printed += 1
        if printed <= MAX_PRINTED:
            with tqdm.external_write_mode():
                click.echo(f"line {failure.line} ({failure.voice}) skipped: {failure.reason}", err=True)

    sentences = list(decode_lines(text, getattr(text, "name", "standard input")))
    with bar:
        report = make_corpus(
            sentences, out, language=language, engine=engine, voices=voices, rates=rates, pitches=pitches,
            command=command, encoding=encoding, clips=clips, dev=dev, sample_rate_hz=sample_rate, seed=seed,
            processes=processes, on_progress=show_progress, on_failure=show_failure,
        )  # fmt: skip
    for name, split in report.splits.items():
        length = f"{split.duration_s / 3600:.2f} h" if split.duration_s >= 3600 else f"{split.duration_s / 60:.1f} min"
        counts = f"{_count(split.recordings, 'recording')}, {length}, {_count(split.voices, 'voice')}"
        click.echo(f"{name}: {counts} → {split.manifest}")
    if report.reused:
        click.echo(f"{_count(report.reused, 'recording')} reused from an earlier run")
    if report.unlisted:
        click.echo(f"{_count(report.unlisted, 'file')} of earlier runs in {out / 'audio'} not in these manifests")
    if report.failures:
        click.echo(f"{_count(len(report.failures), 'recording')} skipped", err=True)
    return 2 if report.failures else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
