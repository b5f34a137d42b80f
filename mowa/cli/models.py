"""`mowa models`: what can be named, what is understood, what is already here."""

from __future__ import annotations

from pathlib import Path

import click

GOOD_FOR = {
    "pl-tiny": "drafts and trying things out, offline; Polish speech of people, 28 M parameters",
    "polish": "Polish speech of people, transcripts to keep; XLSR-53, 315 M parameters, 1.3 GB to fetch",
}

ANYWHERE = ("attention", "packing", "fused_head")
"""What makes every family faster that does not say why not; `Family.swaps` is what only some have a place for."""


@click.command(short_help="List aliases, families and what is cached.")
@click.option("--families", "only_families", is_flag=True, help="Only the families, and what is known of each.")
def models(only_families: bool) -> None:
    """List aliases, families and what is cached."""
    from mowa.cli.show import size, table
    from mowa.families import model_types
    from mowa.files import ALIASES, cached

    if only_families:
        _families()
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
    click.echo()
    for task, known in _by_task().items():
        click.echo(f"{task} families: {', '.join(known)}")
    click.echo("what is known of each: mowa models --families")


def _families() -> None:
    """Every family, what makes it fast and where adapters may sit; then what does not apply to it, and why."""
    from mowa.cli.show import table
    from mowa.families import families

    rows = [
        [
            family.name,
            ", ".join(family.model_types),
            family.task,
            " ".join([*family.swaps, *(one for one in ANYWHERE if one not in family.limits)]) or "–",
            "; ".join(f"{group}: {' '.join(linears)}" for group, linears in family.linears.items()),
        ]
        for family in families()
    ]
    table(["family", "model_type", "task", "acceleration", "linear layers"], rows)
    refused: dict[tuple[str, str], list[str]] = {}
    for family in families():
        for limit in family.limits.items():
            refused.setdefault(limit, []).append(family.name)
    table(["without", "because", "families"], [[*limit, ", ".join(names)] for limit, names in sorted(refused.items())])


def _by_task() -> dict[str, list[str]]:
    from mowa.families import families

    known: dict[str, list[str]] = {}
    for family in families():
        known.setdefault(family.task, []).append(family.name)
    return known
