"""`mowa data`: check and split corpora before training on them, and make synthetic ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any

import click

from mowa.cli.split import split
from mowa.cli.synthesize import synthesize

if TYPE_CHECKING:
    from mowa.data.quality.corpus_report import CorpusReport, Issues, SplitOverlap

# If a corpus has any of these splits, its other splits (e.g. Common Voice's `validated`) overlap them and are skipped.
STANDARD_SPLITS = ("train", "dev", "validation", "valid", "val", "test")
MAX_PRINTED = 5  # issues printed per kind; --json lists more


@click.group(short_help="Check, split and synthesize speech corpora.")
def data() -> None:
    """Check and split corpora before training on them, and make synthetic ones."""


data.add_command(split)
data.add_command(synthesize)


@data.command()
@click.argument("names", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--split", default="", help="Check one split. [default: every split]")
@click.option(
    "--column",
    "named",
    multiple=True,
    metavar="ROLE=NAME",
    help="Column of a role: audio, text, speaker, …; repeatable.",
)
@click.option(
    "--disjoint-from",
    "others",
    multiple=True,
    metavar="SOURCE",
    help="Also report what is shared with SOURCE; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the complete report as JSON.")
def check(names: tuple[str, ...], split: str, named: tuple[str, ...], others: tuple[str, ...], as_json: bool) -> int:
    """Report what a corpus contains and what is wrong with it.

    Durations, sample rates, characters, duplicates, silent and broken files, and overlap between splits. SOURCE is
    anything that `mowa transcribe --results` accepts. Every recording is decoded. The exit code is 2 if something
    cannot be read.
    """
    from mowa.cli import output
    from mowa.cli.batch import parse_columns
    from mowa.data.manifests.examples import list_examples
    from mowa.data.quality.corpus_report import check_corpus, compare_reports
    from mowa.io.atomic import dump_json

    columns = parse_columns(named)
    splits, skipped = _select_splits(names, split)
    reports: dict[str, CorpusReport] = {}
    with output.audio_progress(None) as bar:
        for name in splits:
            examples = list_examples(names, name, columns=columns)
            reports[name or ", ".join(names)] = check_corpus(examples, on_progress=bar.update)
        for other in others:
            reports[other] = check_corpus(list_examples(other, columns=columns), on_progress=bar.update)
    overlaps = {
        (one, other): compare_reports(reports[one], reports[other])
        for one, other in combinations(reports, 2)
        if not {one, other} <= set(others)
    }
    if as_json:
        pairs = [{"between": pair, **asdict(overlap)} for pair, overlap in overlaps.items()]
        report_dicts = {name: _report_dict(report) for name, report in reports.items()}
        click.echo(dump_json({"splits": report_dicts, "overlaps": pairs}, indent=1))
    else:
        for line in _format_reports(reports, overlaps, skipped):
            click.echo(line)
    return 2 if any(report.unreadable.count for report in reports.values()) else 0


def _select_splits(names: Sequence[str], split: str) -> tuple[list[str], list[str]]:
    """Return the splits to check ("" for a source without splits), and those to skip."""
    from mowa.data.manifests import discover, examples

    if split or len(names) > 1:
        return [split], []
    sources = list(discover.expand_pattern(names[0]))
    available = examples.list_splits(sources[0]) if len(sources) == 1 else []
    selected = [name for name in STANDARD_SPLITS if name in available] or available
    return selected or [""], [name for name in available if name not in selected]


def _report_dict(report: CorpusReport) -> dict[str, Any]:
    """Convert a report to a dict, without the hashes that only comparisons need."""
    values = {field.name: getattr(report, field.name) for field in fields(report)}
    return {
        name: asdict(value) if hasattr(value, "examples") else value
        for name, value in values.items()
        if name not in ("audio_hashes", "text_hashes")
    }


def _format_reports(
    reports: Mapping[str, CorpusReport], overlaps: Mapping[tuple[str, str], SplitOverlap], skipped: Sequence[str]
) -> Iterator[str]:
    for name, report in reports.items():
        yield name
        yield from (f"  {line}" for line in _format_report(report))
    for (one, other), overlap in overlaps.items():
        yield f"{one} and {other}"
        yield f"  shared recordings: {_format_issues(overlap.audio, ' = ')}"
        yield f"  shared texts: {_format_issues(overlap.texts, ' = ')}"
        yield f"  shared speakers: {_format_issues(overlap.speakers, ' = ')}"
    if skipped:
        yield f"not checked: {', '.join(skipped)} (select one with --split)"


def _format_report(report: CorpusReport) -> Iterator[str]:
    shortest, median, longest = report.min_median_max_s
    hours = report.total_duration_s / 3600
    yield f"{report.recordings} recordings, {f'{hours:.2f} h' if hours >= 1 else f'{60 * hours:.1f} min'}"
    yield f"durations: {shortest:.2f} to {longest:.2f} s, median {median:.2f} s"
    yield f"  {_format_counts(report.duration_histogram)}"
    yield f"sample rates: {_format_counts({f'{rate} Hz': count for rate, count in report.sample_rates_hz.items()})}"
    yield f"channels: {_format_counts(report.channels)}; formats: {_format_counts(report.formats)}"
    if report.languages:
        yield f"languages: {_format_counts(report.languages)}"
    if report.speakers:
        yield f"speakers: {len(report.speakers)}, at most {next(iter(report.speakers.values()))} recordings each"
    if report.characters:
        total, characters = sum(report.characters.values()), "".join(report.characters)
        rare = ", ".join(f"{character} {report.characters[character]}" for character in report.rare_characters)
        outliers = _format_issues(report.chars_per_s_outliers, ", ")
        yield f"characters: {len(report.characters)} distinct, {total} in total: {characters}"
        yield f"rare characters: {rare or 'none'}"
        yield f"characters per second: median {report.median_chars_per_s:.1f}; outliers: {outliers}"
    yield f"no text: {_format_issues(report.empty_text, ', ')}"
    yield f"duplicate audio: {_format_issues(report.duplicate_audio, ' = ')}"
    yield f"duplicate text: {_format_issues(report.duplicate_text, ' = ')}"
    yield f"silent: {_format_issues(report.silent, ', ')}"
    yield f"clipped: {_format_issues(report.clipped, ', ')}"
    yield f"unreadable: {_format_issues(report.unreadable, ', ')}"


def _format_counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"


def _format_issues(issues: Issues, separator: str) -> str:
    if not issues.count:
        return "none"
    shown = "; ".join(separator.join(filter(None, pair)) for pair in issues.examples[:MAX_PRINTED])
    return f"{issues.count} ({shown}{'; …' if issues.count > MAX_PRINTED else ''})"
