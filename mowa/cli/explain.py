"""`mowa explain`: show which implementation each layer of a model would use on a device, and why."""

from __future__ import annotations

import click


# fmt: off
@click.command(short_help="Show which implementation each layer would use, and why.")
@click.argument("model")
@click.option("--seq-length", type=click.IntRange(min=1), default=2048, show_default=True,
              help="Sequence length in tokens.")
@click.option("--device", default="",
              help="cpu, cuda, or cuda:8.0 (that compute capability). [default: this machine's]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True,
              help="Compute dtype.")
@click.option("--packing", is_flag=True, help="Assume packed sequences, as in `mowa train --packing`.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def explain(model: str, seq_length: int, device: str, dtype: str, packing: bool, offline: bool) -> None:
    # fmt: on
    """Show which implementation each layer of MODEL would use on this machine, and why. Weights are not loaded.

    For a language model it explains attention, norms, MLPs, rotary embeddings, LoRA and loss in training; for a speech
    model attention, inference on CPUs, training batches and live speech.

    MODEL is a folder or a Hub id; only the config files of a Hub model are downloaded.
    """
    import mowa
    from mowa.cli.output import print_table

    rows = mowa.explain(
        model, seq_length=seq_length, device=device, dtype=dtype, packing=packing, offline=offline
    )
    print_table(["layers", "count", "implementation", "reason"], [[str(cell) for cell in row] for row in rows])
