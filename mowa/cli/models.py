"""`mowa models`: what can be named, what is understood, what is already here."""

from __future__ import annotations

from pathlib import Path

import click

GOOD_FOR = {
    "pl-tiny": "drafts and trying things out, offline; Polish speech of people, 28 M parameters",
    "polish": "Polish speech of people, transcripts to keep; XLSR-53, 315 M parameters, 1.3 GB to fetch",
}


@click.command(short_help="List aliases, families and what is cached.")
@click.option("--families", "only_families", is_flag=True, help="Only the families, and the linear layers they have.")
def models(only_families: bool) -> None:
    """List aliases, families and what is cached."""
    from mowa.cli.show import size, table
    from mowa.families import families, model_types
    from mowa.files import ALIASES, cached

    if only_families:
        rows = [
            [
                family.name,
                ", ".join(family.model_types),
                family.task,
                "; ".join(f"{group}: {' '.join(names)}" for group, names in family.linears.items()),
            ]
            for family in families()
        ]
        table(["family", "model_type", "task", "linear layers"], rows)
        return
    rows = [[name, "bundled" if isinstance(to, Path) else to, GOOD_FOR[name]] for name, to in ALIASES.items()]
    table(["alias", "stands for", "good for"], rows)
    here = cached(model_types())
    click.echo()
    if here:
        rows = [
            [
                one.name,
                one.model_type,
                "converted" if one.converted else (one.revision or "")[:12],
                size(one.size_bytes),
            ]
            for one in here
        ]
        table(["cached", "family", "revision", "size"], rows)
    else:
        click.echo("cached: nothing yet; a hub id (--model polish) is fetched once, when it is first used")
    click.echo(f"\nfamilies: {', '.join(model_types())} (CTC checkpoints; see mowa models --families)")
