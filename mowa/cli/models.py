"""`mowa models`: list aliases, cached models and supported families; download and remove models."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mowa.io.model_cache import CachedModel
    from mowa.types import Family

ALIAS_NOTES = {
    "pl-tiny": "drafts and experiments, offline; Polish speech, 28 M parameters",
    "polish": "accurate Polish transcripts; XLSR-53, 315 M parameters, 1.3 GB download",
}

KIND_LABELS = {"snapshot": "from the Hub", "converted": "safetensors", "onnx": "ONNX export"}

GENERIC_ACCELERATIONS = ("attention", "packing", "fused_loss")
"""Accelerations of every text family unless `unsupported` lists them; `fused_modules` has the specific ones."""


@click.group(short_help="List, download and remove models.", invoke_without_command=True)
@click.option("--families", "only_families", is_flag=True, help="As `mowa models list --families`.")
@click.pass_context
def models(context: click.Context, only_families: bool) -> None:
    """List, download and remove models; without a command, list them."""
    if context.invoked_subcommand is None:
        context.invoke(list_models, only_families=only_families, as_json=False)


@models.command("list")
@click.option(
    "--families",
    "only_families",
    is_flag=True,
    help="List only model families, with their accelerations and adapter targets.",
)
@click.option("--json", "as_json", is_flag=True, help="Print aliases, cached models and families as JSON.")
def list_models(only_families: bool, as_json: bool) -> None:
    """List model aliases, cached models with their sizes and last use, and supported families."""
    from mowa.cli.output import print_table
    from mowa.families import list_model_types
    from mowa.io.hub import MODEL_ALIASES
    from mowa.io.model_cache import list_cached

    if only_families:
        _families()
        return
    cached = list_cached(list_model_types())
    if as_json:
        aliases = {name: "bundled" if isinstance(target, Path) else target for name, target in MODEL_ALIASES.items()}
        tree = {"aliases": aliases, "cached": [asdict(one) for one in cached], "families": _by_task()}
        click.echo(json.dumps(tree, ensure_ascii=False, indent=1, default=str))
        return
    rows = [
        [name, "bundled" if isinstance(target, Path) else target, ALIAS_NOTES[name]]
        for name, target in MODEL_ALIASES.items()
    ]
    print_table(["alias", "model", "use for"], rows)
    click.echo()
    if cached:
        print_table(["cached", "family", "revision", "kind", "size", "last used"], [_cached_row(one) for one in cached])
    else:
        click.echo("cached: none; a Hub model (--model polish) is downloaded on first use, or by `mowa models pull`")
    click.echo()
    for task, names in _by_task().items():
        click.echo(f"{task} families: {', '.join(names)}")
    click.echo("details: mowa models list --families")


@models.command()
@click.argument("name")
def pull(name: str) -> None:
    """Download a model, so that it can be used without a network.

    NAME is an alias or a Hub id owner/name[@revision]. Only what loading needs is fetched: config, weights, tokenizer
    and processor files.
    """
    from mowa.cli.output import format_size, hub_progress
    from mowa.families import resolve_family
    from mowa.io import model_cache
    from mowa.io.atomic import read_json

    with hub_progress():
        model = model_cache.pull(name, validate=lambda folder: resolve_family(name, read_json(folder / "config.json")))
    click.echo(f"{model.name}@{(model.revision or '')[:12]}: {format_size(model.size_bytes)} in {model.folder}")


@models.command()
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Remove a downloaded model from the cache, with what was converted or exported from it there.

    NAME is an alias or a Hub id owner/name; with @revision, only that revision is removed.
    """
    from mowa.cli.output import format_size
    from mowa.errors import DataError
    from mowa.io import model_cache

    removal = model_cache.plan_removal(name)
    revisions = sum(one.kind == "snapshot" for one in removal.models)
    derived = len(removal.models) - revisions
    also = f" and {derived} converted or exported from {'it' if revisions == 1 else 'them'}" if derived else ""
    count = f"{revisions} revision{'s' * (revisions > 1)}"
    size = format_size(removal.size_bytes)
    if not yes:
        if not sys.stdin.isatty():
            raise DataError(f"{name}: removing {count}{also} ({size}) needs --yes where nobody can be asked")
        click.confirm(f"remove {count} of {removal.models[0].name}{also} ({size})?", abort=True)
    model_cache.remove(removal)
    click.echo(f"removed {count} of {removal.models[0].name}{also}: {size}")


def _cached_row(model: CachedModel) -> list[str]:
    from mowa.cli.output import format_size

    used = "–" if model.last_used_s is None else time.strftime("%Y-%m-%d", time.localtime(model.last_used_s))
    revision = (model.revision or "–")[:12]
    return [model.name, model.model_type, revision, KIND_LABELS[model.kind], format_size(model.size_bytes), used]


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
