"""`mowa data split`: split a corpus into train, dev and test that share no speakers and no sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mowa.data.quality.split import DISJOINT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mowa.types import Example


# fmt: off
@click.command(short_help="Split a corpus into train, dev and test.")
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER",
              help="Write train.jsonl, dev.jsonl and test.jsonl into this folder.")
@click.option("--dev", default="5%", show_default=True, metavar="SIZE",
              help="Size of dev: 5% of the duration, 2h, 30min, or a number of recordings; 0: none.")
@click.option("--test", default="5%", show_default=True, metavar="SIZE", help="Size of test, likewise.")
@click.option("--disjoint", type=click.Choice(DISJOINT), default="auto", show_default=True,
              help="What no two splits may share. both: recordings that would violate it are dropped; auto: both if"
              " nothing has to be dropped, else speakers, or sentences if speakers are few.")
@click.option("--speaker-by", metavar="COLUMN",
              help="Column that names the speaker. [default: speaker, speaker_id or client_id]")
@click.option("--split", "source_split", default="",
              help="Split of the source to divide. [default: train, or the only split]")
@click.option("--seed", default=0, show_default=True, help="Another seed gives another split.")
def split(
    source: str, out: Path, dev: str, test: str, disjoint: str, speaker_by: str | None, source_split: str, seed: int
) -> None:
    # fmt: on
    """Split a corpus into train, dev and test that share no speakers and no sentences.

    SOURCE is a manifest or corpus with texts. Sentences are compared without case and punctuation. Whole groups of
    recordings are taken by a hash of their names, so that the result is reproducible and changes little when data is
    added. Recordings that are missing, or whose header cannot be read where a duration is needed, are left out.
    """
    from mowa.data.quality.split import SPLITS, split_corpus, write_split
    from mowa.data.quality.unreadable import read_available

    columns = {"speaker": speaker_by} if speaker_by else None
    examples, unreadable = read_available(
        source, source_split, columns=columns, cache_dir=out / "audio", cut_excerpts=False
    )
    unreadable.require_few(1.0, len(examples))
    result = split_corpus(examples, dev=dev, test=test, disjoint=disjoint, seed=seed)
    write_split(result, out)
    _print_sizes({name: result[name] for name in SPLITS}, len(examples))
    click.echo(f"no two splits share {' or '.join(result.disjoint) or 'recordings'}")
    if result.dropped:
        click.echo(f"dropped to keep them disjoint: {len(result.dropped)} of {len(examples)} recordings")
    if unreadable.errors:
        click.echo(unreadable.summary())
    for note in result.notes:
        click.echo(f"note: {note}")


def _print_sizes(splits: dict[str, Sequence[Example]], total: int) -> None:
    from mowa.cli.output import print_table
    from mowa.data.text.normalize import normalize_text

    rows = []
    for name, examples in splits.items():
        speakers = {example.tags["speaker"] for example in examples if example.tags.get("speaker")}
        rows.append(
            [
                name,
                f"{sum(example.duration_s for example in examples) / 3600:.2f}",
                f"{len(examples)} ({len(examples) / max(1, total):.1%})",
                str(len(speakers)),
                str(len({normalize_text(example.text) for example in examples})),
            ]
        )
    print_table(["split", "hours", "recordings", "speakers", "sentences"], rows)
