"""Command line of pl-tiny's build: `python -m projects.pl_tiny text|synth|festival|people|shards|train`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from mowa.cli.main import NOISY_LOGGERS
from mowa.errors import MowaError

SENTENCES = click.argument("sentences", type=click.Path(exists=True, dir_okay=False, path_type=Path))
OUT_FOLDER = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for manifests and audio."
)
DOWNLOADS = click.option(
    "--downloads",
    type=click.Path(path_type=Path),
    default=Path("build/debian"),
    show_default=True,
    help="Folder for Debian packages.",
)
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random choices.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Build pl-tiny, the bundled Polish model: collect sentences, synthesize speech, train.

    `make model` runs all steps in order; README.md in this folder describes them.
    """


@cli.command(short_help="Collect sentences.")
@click.option(
    "--debian",
    "packages",
    multiple=True,
    metavar="PACKAGE",
    help="Debian text package; repeatable. `all`: every known one.",
)
@click.option(
    "--text",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plain text file; repeatable.",
)
@DOWNLOADS
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output file, one sentence per line.")
def text(packages: tuple[str, ...], files: tuple[Path, ...], downloads: Path, out: Path) -> None:
    """Collect Polish sentences that are read aloud exactly as they are written."""
    from mowa.errors import DataError
    from mowa.io.atomic import atomic_write
    from projects.pl_tiny.text import READERS, extract_sentences, read_debian_package

    names = READERS if "all" in packages else packages
    sources = {name: read_debian_package(name, downloads) for name in names}
    sources |= {str(file): iter(file.read_text().splitlines()) for file in files}
    sentences: dict[str, None] = {}
    for source, paragraphs in sources.items():
        before = len(sentences)
        sentences.update(dict.fromkeys(extract_sentences(paragraphs)))
        click.echo(f"{source}: {len(sentences) - before} sentences", err=True)
    if not sentences:
        raise DataError("no sentences found: give --debian PACKAGE or --text FILE")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, "\n".join(sentences) + "\n")


@cli.command(short_help="Synthesize speech with espeak-ng.")
@SENTENCES
@OUT_FOLDER
@click.option("--clips", type=click.IntRange(min=1), default=40_000, show_default=True, help="Training clips.")
@SEED
@click.option("--processes", type=click.IntRange(min=1), default=2, show_default=True, help="Parallel processes.")
def synth(sentences: Path, out: Path, clips: int, seed: int, processes: int) -> None:
    """Synthesize SENTENCES with espeak-ng in many voices, rates and pitches.

    Writes the manifests train, dev, seen and unseen (held-out sentences, in voices that train has and has not).
    """
    from projects.pl_tiny.synth import build_corpus

    lines = [line for line in sentences.read_text().splitlines() if line.strip()]
    for name, hours in build_corpus(lines, out, clips=clips, seed=seed, processes=processes).items():
        click.echo(f"{name}: {hours:.2f} h", err=True)


@cli.command(short_help="Synthesize speech with festival.")
@SENTENCES
@OUT_FOLDER
@click.option("--voice", default="msu_ru_nsh_clunits", show_default=True, help="Festival voice.")
@click.option("--clips", type=click.IntRange(min=1), default=4_000, show_default=True, help="Clips to synthesize.")
@click.option(
    "--max-chars", type=click.IntRange(min=1), default=110, show_default=True, help="Skip sentences longer than this."
)
@SEED
def festival(sentences: Path, out: Path, voice: str, clips: int, max_chars: int, seed: int) -> None:
    """Synthesize SENTENCES with a Czech or Russian festival voice, built from recordings of a person."""
    from projects.pl_tiny.festival import build_corpus

    lines = [line for line in sentences.read_text().splitlines() if line.strip() and len(line) <= max_chars]
    for name, hours in build_corpus(lines, out, clips={voice: clips}, seed=seed).items():
        click.echo(f"{name}: {hours:.2f} h", err=True)


@cli.command(short_help="Extract human recordings.")
@OUT_FOLDER
@click.option(
    "--source",
    "names",
    multiple=True,
    metavar="NAME",
    help="Recordings to extract; repeatable. [default: all for training]",
)
@DOWNLOADS
def people(out: Path, names: tuple[str, ...], downloads: Path) -> None:
    """Extract human recordings in other languages from Debian packages, respelt in Polish letters."""
    from projects.pl_tiny.people import SOURCES, build_corpus

    for name in names or [name for name, source in SOURCES.items() if source.training]:
        report = build_corpus(out, [name], downloads)[name]
        skipped = "".join(f"; skipped {count}: {reason}" for reason, count in sorted(report.skipped.items()))
        click.echo(f"{name}: {report.clips} clips, {report.hours:.2f} h ({SOURCES[name].licence}){skipped}", err=True)


@cli.command(short_help="Unpack a corpus of tar shards.")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@OUT_FOLDER
def shards(source: Path, out: Path) -> None:
    """Unpack a folder of tar shards with a manifest.jsonl into recordings and one manifest for each voice."""
    from projects.pl_tiny.shards import unpack_corpus

    for voice, hours in unpack_corpus(source, out).items():
        click.echo(f"{voice}: {hours:.2f} h", err=True)


@cli.command(short_help="Train a staged recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the finished checkpoint.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all cores]")
def train(recipe: Path, out: Path, threads: int | None) -> None:
    """Train the stages of RECIPE (YAML). An interrupted run resumes from its last checkpoint."""
    from mowa import hardware
    from projects.pl_tiny.recipe import read_recipe

    plan = read_recipe(recipe)
    hardware.enable_huge_pages()
    from projects.pl_tiny import pretrain

    pretrain.train(plan, out, threads=threads)
    click.echo(str(out))


def main() -> None:
    """Run the command; print a MowaError as one line and exit with code 2."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        cli(prog_name="python -m projects.pl_tiny")
    except MowaError as error:
        click.echo(f"pl_tiny: {error}", err=True)
        sys.exit(2)
