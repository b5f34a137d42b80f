"""`mowa data`: sentences from text, speech from sentences, and human recordings in neighbouring languages."""

from __future__ import annotations

from pathlib import Path

import click


@click.group(short_help="Collect sentences and speak them.")
def data() -> None:
    """Collect sentences and speak them, for training where no recordings are."""


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
    from mowa.data import text as room
    from mowa.errors import DataError
    from mowa.files import atomic_write

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
    from mowa.data import synth as room

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
    from mowa.data import festival as room

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
    from mowa.data import people as room

    for name in sources or [name for name, source in room.SOURCES.items() if source.training]:
        tally = room.corpus(out, [name], downloads)[name]
        left_out = "".join(f"; {count} {reason}" for reason, count in sorted(tally.skipped.items()))
        licence = room.SOURCES[name].licence
        click.echo(f"{name}: {tally.clips} clips, {tally.hours:.2f} h ({licence}){left_out}", err=True)
