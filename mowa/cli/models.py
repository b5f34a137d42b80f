"""`mowa models`: list model aliases, supported families and cached models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mowa.types import Family

ALIAS_NOTES = {
    "pl-tiny": "drafts and experiments, offline; Polish speech, 28 M parameters",
    "polish": "accurate Polish transcripts; XLSR-53, 315 M parameters, 1.3 GB download",
}

GENERIC_ACCELERATIONS = ("attention", "packing", "fused_loss")
"""Accelerations of every text family unless `unsupported` lists them; `fused_modules` has the specific ones."""


@click.command(short_help="List model aliases, supported families and cached models.")
@click.option(
    "--families",
    "only_families",
    is_flag=True,
    help="List only model families, with their accelerations and adapter targets.",
)
def models(only_families: bool) -> None:
    """List model aliases, supported families and cached models."""
    from mowa.cli.output import format_size, print_table
    from mowa.families import list_model_types
    from mowa.io.hub import MODEL_ALIASES, list_cached_models

    if only_families:
        _families()
        return
    rows = [
        [name, "bundled" if isinstance(target, Path) else target, ALIAS_NOTES[name]]
        for name, target in MODEL_ALIASES.items()
    ]
    print_table(["alias", "model", "use for"], rows)
    cached = list_cached_models(list_model_types())
    click.echo()
    if cached:
        rows = [
            [
                one.name,
                one.model_type,
                "converted" if one.converted else (one.revision or "")[:12],
                format_size(one.size_bytes),
            ]
            for one in cached
        ]
        print_table(["cached", "family", "revision", "size"], rows)
    else:
        click.echo("cached: none; a Hub model (--model polish) is downloaded on first use")
    click.echo()
    for task, names in _by_task().items():
        click.echo(f"{task} families: {', '.join(names)}")
    click.echo("details: mowa models --families")


def _families() -> None:
    """Print the accelerations and adapter targets of every family, then the unsupported ones with the reason."""
    from mowa.cli.output import print_table
    from mowa.families import list_families

    rows = [
        [
            family.name,
            ", ".join(family.model_types),
            family.task,
            " ".join(_accelerations(family)) or "–",
            "; ".join(f"{group}: {' '.join(linears)}" for group, linears in family.linears.items()),
        ]
        for family in list_families()
    ]
    print_table(["family", "model_type", "task", "accelerations", "linear layers"], rows)
    unsupported: dict[tuple[str, str], list[str]] = {}
    for family in list_families():
        for limit in family.unsupported.items():
            unsupported.setdefault(limit, []).append(family.name)
    print_table(
        ["unsupported", "reason", "families"],
        [[*limit, ", ".join(names)] for limit, names in sorted(unsupported.items())],
    )


def _accelerations(family: Family) -> list[str]:
    generic = ("attention", *sorted(family.supports)) if family.task == "ctc" else GENERIC_ACCELERATIONS
    return [*family.fused_modules, *(one for one in generic if one not in family.unsupported)]


def _by_task() -> dict[str, list[str]]:
    from mowa.families import list_families

    by_task: dict[str, list[str]] = {}
    for family in list_families():
        by_task.setdefault(family.task, []).append(family.name)
    return by_task
