"""`mowa adapt`: what an adapter is, and a plain checkpoint made of it and its base. `mowa train` makes adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np

    from mowa.adapters.checkpoint import Adapter
    from mowa.adapters.merge import EmissionDiff

SAMPLE = Path(__file__).parents[1] / "assets" / "sample.flac"
CHUNK_S, MAX_COMPARED_S = 15.0, 60.0  # emissions are compared over so much of each recording, in pieces
ADAPTER_TYPES = {"lora": "low-rank updates (LoRA)", "bottleneck": "bottleneck adapters (MMS)"}


@click.group(short_help="Look at an adapter, or merge it into its base.")
def adapter() -> None:
    """Look at an adapter, or merge it into its base. `mowa train` makes adapters (train: lora, train: adapters)."""


@adapter.command()
@click.argument("adapter", type=click.Path(path_type=Path))
def show(adapter: Path) -> None:
    """Say what the ADAPTER in a folder is, of which base, and how well it did."""
    from mowa.adapters import causal, checkpoint
    from mowa.cli import adapter_causal as texts
    from mowa.cli.output import format_size, print_table

    if causal.is_causal_adapter(adapter):
        texts.show_causal(causal.read_adapter(adapter))
        return
    found = checkpoint.read_adapter(adapter)
    base = found.base
    specials = {found.vocabulary.blank, found.vocabulary.delimiter, *found.vocabulary.specials}
    letters = "".join(token for index, token in enumerate(found.vocabulary.tokens) if index not in specials)
    weights = adapter / found.weights_file
    rows = [
        ["kind", ADAPTER_TYPES[found.adapter_type]],
        ["base", base.load_name if base.load_name == base.name else f"{base.name} ({base.load_name})"],
        ["base's weights", f"sha256 {base.sha256}"],
        ["language", found.language or "not said"],
        ["letters", f"{len(letters)}: {letters}"],
        ["parameters", f"{found.parameters:,}, the head among them"],
        ["file", f"{weights.name}, {format_size(weights.stat().st_size) if weights.is_file() else 'missing'}"],
        ["made by", ", ".join(f"{name} {version}" for name, version in found.package_versions.items())],
        *_measured(found),
    ]
    print_table(["adapter", str(adapter)], rows)


def _measured(found: Adapter) -> list[list[str]]:
    """Error rates by set, where they are written as `mowa train` writes them."""
    return [
        [name, f"WER {row['wer']:.1%}, CER {row['cer']:.1%}"]
        for name, row in found.metrics.items()
        if isinstance(row, dict) and {"wer", "cer"} <= row.keys()
    ]


@adapter.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the checkpoint.")
@click.option("-m", "--model", help="The adapter's base, where it is not found by the name that the adapter knows.")
@click.option("--audio", "recordings", type=click.Path(exists=True, path_type=Path), multiple=True,
              help="Recording(s) to compare over. [default: the bundled sample]")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(min=0), default=1e-3, show_default=True,
              help="Speech: largest difference of a log-probability that is let pass.")  # fmt: skip
@click.option("--data", multiple=True,
              help="Text(s) or conversations to compare over. [default: what the run held out]")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              help="Language models: precision of the merged weights. [default: the base's]")  # fmt: skip
@click.option("--offline", is_flag=True, help="Never ask the hub; use what is cached.")
def merge(
    adapter: Path,
    out: Path,
    model: str | None,
    recordings: tuple[Path, ...],
    tolerance: float,
    data: tuple[str, ...],
    dtype: str,
    offline: bool,
) -> None:
    """Write ADAPTER and its base as one checkpoint, which plain transformers loads.

    It is loaded again and compared with base and adapter before it takes its place. LoRA becomes part of the weights;
    bottlenecks stay layers of their own, as transformers has them.
    """
    from mowa.adapters import causal, checkpoint
    from mowa.adapters import merge as room
    from mowa.cli import adapter_causal as texts
    from mowa.errors import ModelError
    from mowa.loading.ctc import load

    if causal.is_causal_adapter(adapter):
        texts.merge_causal(adapter, out, model, data, dtype, offline)
        return
    found = checkpoint.read_adapter(adapter)
    base = load(model or found.base.load_name, offline=offline)
    adapted = checkpoint.load_adapter(base, adapter)
    sounds = _sounds(recordings or (SAMPLE,), adapted.preprocessing.rate_hz)
    with room.atomic_checkpoint(room.merge_adapter(adapted), out) as folder:
        after = room.compare_emissions(adapted, load(str(folder)), sounds)
        rows = [_row("base with adapter → merged", after)]
        if base.vocabulary == adapted.vocabulary:
            rows.append(_row("base alone → merged", room.compare_emissions(base, adapted, sounds)))
        _say(rows)
        if after.max_abs_diff > tolerance:
            raise ModelError(
                f"the merged checkpoint says something else than {adapter} over its base: a log-probability is"
                f" {after.max_abs_diff:.2g} off, and {tolerance:g} is let pass; {out} was not written"
            )
    click.echo(str(out))


def _row(what: str, difference: EmissionDiff) -> list[str]:
    return [what, f"{difference.max_abs_diff:.2e}", f"{difference.agreement:.2%}", str(difference.frames)]


def _say(rows: list[list[str]]) -> None:
    from mowa.cli.output import print_table

    print_table(["emissions", "largest difference", "same output", "frames"], rows)


def _sounds(recordings: tuple[Path, ...], rate_hz: int) -> list[np.ndarray[Any, Any]]:
    """Pieces of every recording, none shorter than a tenth of a second. ModelError where there are none."""
    from mowa.data import audio

    piece = int(CHUNK_S * rate_hz)
    loaded = [
        audio.load_audio(file, rate_hz)[: int(MAX_COMPARED_S * rate_hz)] for file in audio.find_audio_files(recordings)
    ]
    pieces = [samples[start : start + piece] for samples in loaded for start in range(0, len(samples), piece)]
    return [samples for samples in pieces if len(samples) >= rate_hz // 10]
