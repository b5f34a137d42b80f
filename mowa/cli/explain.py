"""`mowa explain`: which layer of a model would be computed how, on which device, and why."""

from __future__ import annotations

import click


@click.command(short_help="Say how a model's layers would be computed here, and why.")
@click.argument("model")
@click.option("--length", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens in a sequence.")
@click.option("--device", default="", help="cpu, cuda, cuda:8.0 (of that capability). [default: what is here]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--packed", is_flag=True, help="Documents end to end in one row, as `mowa train` lays them.")
@click.option("--offline", is_flag=True, help="Never ask the hub; use what is cached.")
def explain(model: str, length: int, device: str, dtype: str, packed: bool, offline: bool) -> None:
    """Say how the layers of MODEL would be computed here, and why. Its weights are not read.

    MODEL is a folder or a hub id; of a hub id only the small files are fetched.
    """
    from mowa.cli.output import print_table
    from mowa.io.hub import fetch_config
    from mowa.loading.checkpoint import load_config, read_family
    from mowa.models.explain import default_device
    from mowa.models.explain import explain_layers as explained

    folder = fetch_config(model, offline=offline)
    family = read_family(folder)
    config = load_config(folder, family)
    rows = explained(config, length=length, device=device or default_device(), dtype=dtype, packed=packed)
    print_table(["layers", "count", "computed by", "why"], [[str(cell) for cell in row] for row in rows])
