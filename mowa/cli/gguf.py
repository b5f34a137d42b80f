"""`mowa gguf`: inspect GGUF files and compare two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mowa.io.gguf import TensorInfo


@click.group(short_help="Inspect GGUF files and compare them.")
def gguf() -> None:
    """Inspect GGUF files, of any program, and compare two of them."""


@gguf.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor with its type, shape and size.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all tensors.")
def show(file: Path, tensors: bool, as_json: bool) -> None:
    """Show what is in a GGUF file: architecture, sizes, tensor types and metadata.

    Only the header is read. Long texts and arrays are shortened.
    """
    from mowa.cli.output import format_size, print_table
    from mowa.exporters.gguf.inspect import shorten, summarize

    found = summarize(file)
    if as_json:
        click.echo(json.dumps(_summary_to_json(found), ensure_ascii=False))
        return
    rows = [
        ["architecture", found.architecture or "not named"],
        ["size", f"{format_size(found.size_bytes)}, GGUF version {found.version}"],
        ["weights", f"{found.num_weights:,} in {len(found.tensors):,} tensors"],
        ["bits per weight", f"{found.bits_per_weight:.2f}"],
    ]
    print_table(["file", str(found.path)], rows)
    counts = [
        [name, f"{one.tensors:,}", f"{one.weights:,}", format_size(one.bytes)] for name, one in found.types.items()
    ]
    click.echo()
    print_table(["type", "tensors", "weights", "size"], counts)
    click.echo()
    print_table(["key", "value"], [[shorten(key), shorten(value)] for key, value in found.metadata.items()])
    if tensors:
        click.echo()
        lines = [
            [shorten(name), info.type_name, _shape(info), format_size(info.nbytes)]
            for name, info in found.tensors.items()
        ]
        print_table(["tensor", "type", "shape", "size"], lines)


@gguf.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def diff(context: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Compare metadata and tensors of two GGUF files; the exit code is 1 if they differ.

    Weights whose bytes differ are dequantized: the relative RMSE is their root mean square difference, divided by the
    root mean square of the first file's weights.
    """
    from mowa.cli.output import print_table
    from mowa.exporters.gguf.inspect import compare, to_json

    found = compare(first, second)
    if as_json:
        content = {
            "equal_tensors": found.num_equal,
            "metadata": [
                {"key": one.key, "first": to_json(one.first), "second": to_json(one.second)} for one in found.metadata
            ],
            "tensors": [
                {
                    "name": one.name,
                    "first": _tensor_to_json(one.first),
                    "second": _tensor_to_json(one.second),
                    "relative_rmse": to_json(one.relative_rmse),
                }
                for one in found.tensors
            ],
        }
        click.echo(json.dumps(content, ensure_ascii=False))
    else:
        if found.metadata:
            rows = [[_shorten(one.key), _shorten(one.first), _shorten(one.second)] for one in found.metadata]
            print_table(["key", str(first), str(second)], rows)
            click.echo()
        if found.tensors:
            print_table(
                ["tensor", str(first), str(second), "relative RMSE"],
                [
                    [_shorten(one.name), _describe(one.first), _describe(one.second), _rmse(one.relative_rmse)]
                    for one in found.tensors
                ],
            )
            click.echo()
        click.echo(
            f"{len(found.metadata):,} keys and {len(found.tensors):,} tensors differ, {found.num_equal:,} tensors are"
            " equal"
        )
    context.exit(0 if found.is_empty else 1)


def _summary_to_json(found: Any) -> dict[str, Any]:
    from mowa.exporters.gguf.inspect import to_json

    return {
        "file": str(found.path),
        "version": found.version,
        "architecture": found.architecture,
        "size_bytes": found.size_bytes,
        "tensor_bytes": found.tensor_bytes,
        "weights": found.num_weights,
        "bits_per_weight": found.bits_per_weight,
        "types": {
            name: {"tensors": one.tensors, "weights": one.weights, "bytes": one.bytes}
            for name, one in found.types.items()
        },
        "metadata": {key: to_json(value) for key, value in found.metadata.items()},
        "tensors": [{"name": name} | (_tensor_to_json(info) or {}) for name, info in found.tensors.items()],
    }


def _tensor_to_json(info: TensorInfo | None) -> dict[str, Any] | None:
    return None if info is None else {"type": info.type_name, "shape": list(info.shape), "bytes": info.nbytes}


def _shape(info: TensorInfo) -> str:
    return " × ".join(map(str, info.shape))


def _describe(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{info.type_name} {_shape(info)}"


def _shorten(value: Any) -> str:
    from mowa.exporters.gguf.inspect import shorten

    return "missing" if value is None else shorten(value)


def _rmse(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
