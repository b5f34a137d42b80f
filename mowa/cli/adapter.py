"""`mowa adapter`: inspect adapters and merge them into their base model. `mowa train` creates adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mowa.models.tolerances import MAX_ABS_DIFF

if TYPE_CHECKING:
    from mowa.adapters.causal import CausalAdapter
    from mowa.adapters.checkpoint import Adapter, BaseCheckpoint
    from mowa.models.diff import ModelDiff

ADAPTER_TYPES = {"lora": "LoRA", "bottleneck": "bottleneck adapters (MMS)"}


@click.group(short_help="Inspect adapters and merge them into their base model.")
def adapter() -> None:
    """Inspect adapters and merge them into their base model.

    `mowa train` creates adapters (--method lora, --method bottleneck).
    """


@adapter.command()
@click.argument("folder", metavar="ADAPTER", type=click.Path(path_type=Path))
def show(folder: Path) -> None:
    """Show an adapter's type, base model, size and metrics."""
    from mowa.adapters import causal, checkpoint
    from mowa.cli.output import print_table

    rows = (
        _causal_rows(causal.read_adapter(folder))
        if causal.is_causal_adapter(folder)
        else _speech_rows(checkpoint.read_adapter(folder))
    )
    print_table(["adapter", str(folder)], rows)


def _speech_rows(found: Adapter) -> list[list[str]]:
    special_ids = {found.vocabulary.blank, found.vocabulary.delimiter, *found.vocabulary.specials}
    tokens = [token for index, token in enumerate(found.vocabulary.tokens) if index not in special_ids]
    characters = ("" if all(len(token) == 1 for token in tokens) else " ").join(tokens)
    return [
        ["type", ADAPTER_TYPES[found.adapter_type]],
        *_base_rows(found.base),
        ["language", found.language or "unknown"],
        ["characters", f"{len(tokens)}: {characters}"],
        ["parameters", f"{found.parameters:,}, including the head"],
        *_file_rows(found.folder / found.weights_file, found.package_versions),
        *(
            [name, f"WER {metrics['wer']:.1%}, CER {metrics['cer']:.1%}"]
            for name, metrics in found.metrics.items()
            if isinstance(metrics, dict) and {"wer", "cer"} <= metrics.keys()
        ),
    ]


def _causal_rows(found: CausalAdapter) -> list[list[str]]:
    from mowa.adapters.causal import WEIGHTS_FILE

    return [
        ["type", "LoRA of a language model"],
        *_base_rows(found.base),
        ["parameters", f"{found.parameters:,}"],
        *_file_rows(found.folder / WEIGHTS_FILE, found.package_versions),
        *(
            [name, f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}"]
            for name, metrics in found.metrics.items()
        ),
    ]


def _base_rows(base: BaseCheckpoint) -> list[list[str]]:
    return [
        ["base model", base.load_name if base.load_name == base.name else f"{base.name} ({base.load_name})"],
        ["base weights", f"sha256 {base.sha256}"],
    ]


def _file_rows(weights: Path, versions: Mapping[str, str | None]) -> list[list[str]]:
    from mowa.cli.output import format_size

    return [
        ["file", f"{weights.name}, {format_size(weights.stat().st_size) if weights.is_file() else 'missing'}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
    ]


# fmt: off
@adapter.command()
@click.argument("folder", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option("-m", "--base-model", help="Base model, if it is not where the adapter recorded it.")
@click.option("--audio", "audio_files", type=click.Path(exists=True, path_type=Path), multiple=True,
              help="Speech: recording(s) to compare on. [default: the bundled sample]")
@click.option("--tolerance", type=click.FloatRange(min=0), default=MAX_ABS_DIFF, show_default=True,
              help="Speech: maximum absolute difference of any log-probability.")
@click.option("--data", multiple=True,
              help="Language models: text or conversation file(s) to compare on. [default: the run's held-out data]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              help="Language models: dtype of the merged weights. [default: the base model's]")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def merge(
    folder: Path, out: Path, base_model: str | None, audio_files: tuple[Path, ...], tolerance: float,
    data: tuple[str, ...], dtype: str, offline: bool,
) -> None:
    # fmt: on
    """Merge ADAPTER into its base model and write a checkpoint that transformers loads.

    The checkpoint is loaded again and compared with base model plus adapter before it is kept. LoRA updates are added
    to the weights; bottleneck adapters stay separate layers, as in transformers.
    """
    import mowa
    from mowa.cli.output import print_table

    rows = []
    try:
        mowa.merge(
            folder, out=out, base_model=base_model, audio_files=audio_files, data=data, dtype=dtype,
            tolerance=tolerance, offline=offline, on_comparison=lambda label, diff: rows.append(_diff_row(label, diff)),
        )  # fmt: skip
    finally:
        if rows:
            print_table(["compared", "max abs diff", "KL", "agreement", "positions"], rows)
    click.echo(str(out))


def _diff_row(label: str, diff: ModelDiff) -> list[str]:
    cells = f"{diff.max_abs_diff:.2e}", f"{diff.kl:.2e}", f"{diff.agreement:.2%}", str(diff.num_frames)
    return [label, *cells]
