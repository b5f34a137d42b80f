"""`mowa data`: what is in a corpus; sentences from text, speech from sentences, human recordings of neighbours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mowa.data.quality.corpus_report import CorpusReport, Issues, SplitOverlap

STANDARD_SPLITS = (
    "train",
    "dev",
    "validation",
    "valid",
    "val",
    "test",
)  # where there are such splits, others overlap them
MAX_PRINTED = 5  # of what is wrong, so many are printed; --json has more


@click.group(short_help="Check corpora; collect sentences and speak them.")
def data() -> None:
    """Check what is in a corpus; collect sentences and speak them, for training where no recordings are."""


@data.command()
@click.option(
    "--debian", "packages", multiple=True, metavar="PACKAGE", help="Debian text package(s); `all` for every known one."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plain text file(s).",
)
@click.option("--downloads", type=click.Path(path_type=Path), default=Path("build/debian"), show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="File for the sentences, one a line.")
def text(packages: tuple[str, ...], texts: tuple[Path, ...], downloads: Path, out: Path) -> None:
    """Sentences that are read aloud exactly as they are written, each once, one a line."""
    from mowa.errors import DataError
    from mowa.io.atomic import atomic_write
    from projects.pl_tiny import text as room

    debian = {package: room.debian(package, downloads) for package in (room.READERS if "all" in packages else packages)}
    plain = {str(file): file.read_text().splitlines() for file in texts}
    kept: dict[str, None] = {}
    for source, paragraphs in (debian | plain).items():
        before = len(kept)
        kept.update(dict.fromkeys(room.sentences(paragraphs)))
        click.echo(f"{source}: {len(kept) - before} sentences", err=True)
    if not kept:
        raise DataError("no sentences: name --debian PACKAGE or --text FILE")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, "\n".join(kept) + "\n")


@data.command()
@click.argument("sentences", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for manifests and audio.")
@click.option("--clips", type=click.IntRange(min=1), default=40_000, show_default=True, help="Training clips to speak.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--processes", type=click.IntRange(min=1), default=2, show_default=True)
def synth(sentences: Path, out: Path, clips: int, seed: int, processes: int) -> None:
    """Speak SENTENCES with espeak-ng in many voices, speeds and pitches: train, dev, and two examinations."""
    from projects.pl_tiny import synth as room

    lines = [line for line in sentences.read_text().splitlines() if line.strip()]
    for name, hours in room.corpus(lines, out, clips=clips, seed=seed, processes=processes).items():
        click.echo(f"{name}: {hours:.2f} h", err=True)


@data.command()
@click.argument("sentences", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for manifests and audio.")
@click.option("--voice", default="msu_ru_nsh_clunits", show_default=True, help="One of festival's voices.")
@click.option("--clips", type=click.IntRange(min=1), default=4_000, show_default=True, help="Clips to speak.")
@click.option("--longest", type=click.IntRange(min=1), default=110, show_default=True, help="Letters in a sentence.")
@click.option("--seed", type=int, default=0, show_default=True)
def festival(sentences: Path, out: Path, voice: str, clips: int, longest: int, seed: int) -> None:
    """Speak SENTENCES with a Czech or Russian festival voice, which is made of recordings of a person."""
    from projects.pl_tiny import festival as room

    lines = [line for line in sentences.read_text().splitlines() if line.strip() and len(line) <= longest]
    for name, hours in room.corpus(lines, out, clips={voice: clips}, seed=seed).items():
        click.echo(f"{name}: {hours:.2f} h", err=True)


@data.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for manifests and audio.")
@click.option(
    "--source", "sources", multiple=True, metavar="NAME", help="Which recordings; without it all that may be learnt."
)
@click.option("--downloads", type=click.Path(path_type=Path), default=Path("build/debian"), show_default=True)
def people(out: Path, sources: tuple[str, ...], downloads: Path) -> None:
    """Human recordings in other languages out of Debian packages, their words respelt in Polish letters."""
    from projects.pl_tiny import people as room

    for name in sources or [name for name, source in room.SOURCES.items() if source.training]:
        tally = room.corpus(out, [name], downloads)[name]
        left_out = "".join(f"; {count} {reason}" for reason, count in sorted(tally.skipped.items()))
        licence = room.SOURCES[name].licence
        click.echo(f"{name}: {tally.clips} clips, {tally.hours:.2f} h ({licence}){left_out}", err=True)


@data.command()
@click.argument("names", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--split", default="", help="One split. [default: of one corpus every one]")
@click.option("--column", "named", multiple=True, metavar="ROLE=NAME", help="Which column is audio, text, speaker, …")
@click.option("--against", multiple=True, metavar="SOURCE", help="Another source that should share nothing with it.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def check(names: tuple[str, ...], split: str, named: tuple[str, ...], against: tuple[str, ...], as_json: bool) -> int:
    """What is in a corpus, and what is wrong with it: hours, rates, letters, doubles, silence, leaks between splits.

    SOURCE is anything that `mowa transcribe --journal` takes. Every recording is decoded. The exit code is 2 where
    something cannot be read.
    """
    from mowa.cli import output
    from mowa.cli.batch import parse_columns
    from mowa.data.manifests import examples
    from mowa.data.quality import corpus_report as room

    columns = parse_columns(named)
    looked, left = _splits(names, split)
    reports: dict[str, CorpusReport] = {}
    with output.audio_progress(None) as bar:
        for part in looked:
            reports[part or ", ".join(names)] = room.check_corpus(
                examples.list_examples(names, part, columns=columns), on_progress=bar.update
            )
        for other in against:
            reports[other] = room.check_corpus(examples.list_examples(other, columns=columns), on_progress=bar.update)
    leaks = {
        (one, other): room.compare_reports(reports[one], reports[other])
        for one, other in combinations(reports, 2)
        if not {one, other} <= set(against)
    }
    if as_json:
        told = {name: _report_dict(report) for name, report in reports.items()}
        between = [{"between": pair, **asdict(found)} for pair, found in leaks.items()]
        click.echo(json.dumps({"splits": told, "shared": between}, ensure_ascii=False, indent=1))
    else:
        for line in _rendered(reports, leaks, left):
            click.echo(line)
    return 2 if any(report.unreadable.count for report in reports.values()) else 0


def _splits(names: Sequence[str], split: str) -> tuple[list[str], list[str]]:
    """The splits to look at ("": the only one there is), and those that are left out."""
    from mowa.data.manifests import discover, examples

    if split or len(names) > 1:
        return [split], []
    places = list(discover.expand_pattern(names[0]))
    there = examples.list_splits(places[0]) if len(places) == 1 else []
    usual = [name for name in STANDARD_SPLITS if name in there]
    looked = usual or there
    return looked or [""], [name for name in there if name not in looked]


def _report_dict(report: CorpusReport) -> dict[str, Any]:
    """A report without what only comparisons need."""
    return {
        field.name: asdict(value) if hasattr(value := getattr(report, field.name), "named") else value
        for field in fields(report)
        if field.name not in ("sounds", "texts")
    }


def _rendered(
    reports: Mapping[str, CorpusReport], leaks: Mapping[tuple[str, str], SplitOverlap], left: Sequence[str]
) -> Iterator[str]:
    for name, report in reports.items():
        yield name
        yield from (f"  {line}" for line in _lines(report))
    for (one, other), found in leaks.items():
        yield f"{one} and {other}"
        pairs = {"the same recording": found.audio, "the same text": found.texts, "the same speaker": found.speakers}
        for what, findings in pairs.items():
            yield f"  {what}: {_listed(findings, ' = ')}"
    if left:
        yield f"not looked at: {', '.join(left)} (name one with --split)"


def _lines(report: CorpusReport) -> Iterator[str]:
    shortest, middle, longest = report.min_median_max_s
    hours = report.total_duration_s / 3600
    yield f"{report.recordings} recordings, {f'{hours:.2f} h' if hours >= 1 else f'{60 * hours:.1f} min'}"
    yield f"lengths: {shortest:.2f} to {longest:.2f} s, half of them under {middle:.2f} s"
    yield f"  {_counted(report.duration_histogram)}"
    yield f"rates: {_counted({f'{rate} Hz': count for rate, count in report.sample_rates_hz.items()})}"
    yield f"channels: {_counted(report.channels)}; formats: {_counted(report.formats)}"
    if report.languages:
        yield f"languages: {_counted(report.languages)}"
    if report.speakers:
        yield f"speakers: {len(report.speakers)}, the busiest {next(iter(report.speakers.values()))} recordings"
    if report.characters:
        yield f"letters: {len(report.characters)} kinds, {sum(report.characters.values())} in all: {''.join(report.characters)}"
        rare = ", ".join(f"{letter} {report.characters[letter]}" for letter in report.rare_characters)
        yield f"rare letters: {rare or 'none'}"
        yield f"letters a second: {report.median_chars_per_s:.1f}; far from that: {_listed(report.chars_per_s_outliers, ', ')}"
    wrong = {
        "without a text": report.empty_text,
        "the same sound again": report.duplicate_audio,
        "the same text again": report.duplicate_text,
        "silent": report.silent,
        "clipped": report.clipped,
        "not to be read": report.unreadable,
    }
    for what, findings in wrong.items():
        yield f"{what}: {_listed(findings, ' = ' if 'again' in what else ', ')}"


def _counted(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"


def _listed(findings: Issues, sign: str) -> str:
    if not findings.count:
        return "none"
    shown = "; ".join(sign.join(filter(None, pair)) for pair in findings.examples[:MAX_PRINTED])
    return f"{findings.count} ({shown}{'; …' if findings.count > MAX_PRINTED else ''})"
