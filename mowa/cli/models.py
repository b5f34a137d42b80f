"""`mowa models`: what can be named, what is understood, what is already here."""

from __future__ import annotations

from pathlib import Path

import click

ALIAS_NOTES = {
    "pl-tiny": "drafts and trying things out, offline; Polish speech of people, 28 M parameters",
    "polish": "Polish speech of people, transcripts to keep; XLSR-53, 315 M parameters, 1.3 GB to fetch",
}

GENERIC_ACCELERATIONS = ("attention", "packing", "fused_head")
"""What makes every family faster that does not say why not; `Family.swaps` is what only some have a place for."""


@click.command(short_help="List aliases, families and what is cached.")
@click.option("--families", "only_families", is_flag=True, help="Only the families, and what is known of each.")
def models(only_families: bool) -> None:
    """List aliases, families and what is cached."""
    from mowa.cli.output import format_size, print_table
    from mowa.families import list_model_types
    from mowa.io.hub import MODEL_ALIASES, list_cached_models

    if only_families:
        _families()
        return
    rows = [[name, "bundled" if isinstance(to, Path) else to, ALIAS_NOTES[name]] for name, to in MODEL_ALIASES.items()]
    print_table(["alias", "stands for", "good for"], rows)
    here = list_cached_models(list_model_types())
    click.echo()
    if here:
        rows = [
            [
                one.name,
                one.model_type,
                "converted" if one.converted else (one.revision or "")[:12],
                format_size(one.size_bytes),
            ]
            for one in here
        ]
        print_table(["cached", "family", "revision", "size"], rows)
    else:
        click.echo("cached: nothing yet; a hub id (--model polish) is fetched once, when it is first used")
    click.echo()
    for task, known in _by_task().items():
        click.echo(f"{task} families: {', '.join(known)}")
    click.echo("what is known of each: mowa models --families")


def _families() -> None:
    """Every family, what makes it fast and where adapters may sit; then what does not apply to it, and why."""
    from mowa.cli.output import print_table
    from mowa.families import list_families

    rows = [
        [
            family.name,
            ", ".join(family.model_types),
            family.task,
            " ".join([*family.fused_modules, *(one for one in GENERIC_ACCELERATIONS if one not in family.unsupported)])
            or "–",
            "; ".join(f"{group}: {' '.join(linears)}" for group, linears in family.linears.items()),
        ]
        for family in list_families()
    ]
    print_table(["family", "model_type", "task", "acceleration", "linear layers"], rows)
    refused: dict[tuple[str, str], list[str]] = {}
    for family in list_families():
        for limit in family.unsupported.items():
            refused.setdefault(limit, []).append(family.name)
    print_table(
        ["without", "because", "families"], [[*limit, ", ".join(names)] for limit, names in sorted(refused.items())]
    )


def _by_task() -> dict[str, list[str]]:
    from mowa.families import list_families

    known: dict[str, list[str]] = {}
    for family in list_families():
        known.setdefault(family.task, []).append(family.name)
    return known
