"""`mowa export`: export a model to another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mowa.cli import output
from mowa.errors import ModelError
from mowa.exporters.registry import FORMATS
from mowa.quantization.schemes import SCHEMES
from mowa.types import Artifact


class ExportCommand(click.Command):
    """`mowa export`, with the options of every format: those of installed packages too."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        flags: dict[str, click.Parameter] = {}
        for found in FORMATS.all():
            for option in found.options:
                takes_text = option.constant is None
                flags.setdefault(
                    option.flag,
                    click.Option(
                        [option.flag, option.name],
                        is_flag=not takes_text,
                        metavar=None if not takes_text else option.metavar,
                        multiple=option.multiple,
                        help=f"{found.name}: {option.help}",
                    ),
                )
        return [*super().get_params(ctx), *flags.values()]


# fmt: off
@click.command(cls=ExportCommand, short_help="Export a model to another runtime.")
@click.argument("model")
@click.option("--to", required=True, metavar="FORMAT",
              help=f"Output format: {', '.join(FORMATS.names())}.")
@click.option("--scheme", "names", multiple=True, metavar="SCHEME",
              help=f"Weight storage scheme: {', '.join(SCHEMES)}; suffixes as in `mowa quantize`."
              f" gguf, repeatable: {', '.join(FORMATS.get('gguf').schemes)}."
              " [default: as the model is stored; gguf: q8_0]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True,
              help="Output folder, or FILE.gguf; must not exist.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER", help="Adapter to merge before export.")
@click.option("--calibration-data", default="", metavar="SOURCE",
              help="Calibration recordings, for schemes that need them.")
@click.option("--calibration-split", default="", help="Split of --calibration-data.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--target-lang", metavar="LANG", help="Language of an MMS checkpoint, such as pol.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def export(
    model: str, to: str, names: tuple[str, ...], out: Path, adapter: Path | None, calibration_data: str,
    calibration_split: str,
    revision: str | None, target_lang: str | None, offline: bool, **format_options: Any,
) -> None:
    # fmt: on
    """Export MODEL to FORMAT.

    The result is loaded again and compared with the model before the folder is created. `mowa transcribe -m FOLDER`
    runs formats that have an engine here; `mowa quantize` measures what a scheme costs in accuracy. Language models
    are exported to safetensors and gguf, which `mowa generate` runs.
    """
    import mowa
    from mowa.quantization import schemes

    options = read_options(to, format_options)
    with output.stage_progress() as on_progress:
        artifact = mowa.export(
            model, to, out, scheme=names, adapter=adapter, calibration_data=calibration_data,
            calibration_split=calibration_split, revision=revision, target_lang=target_lang,
            offline=offline, on_progress=on_progress, **options,
        )  # fmt: skip
    if FORMATS.get(to).schemes:
        print_files(artifact)
    else:
        click.echo(f"{out}  {output.format_size(artifact.size_bytes)}, {to}, {schemes.format_scheme(artifact.scheme)}")
    if artifact.unverified_reason:
        click.echo(f"not verified on this machine: {artifact.unverified_reason}")


def print_files(artifact: Artifact) -> None:
    """Print a row per file and runtime: size, and how outputs differ from the model's."""
    head = ("file", "size", "bits per weight", "runtime", "KL, nats", "same top token", "perplexity", "the original's")
    rows = []
    for file in artifact.details["files"]:
        bits = f"{file['bits_per_weight']:.2f}"
        cells = (str(artifact.folder / file["name"]), output.format_size(file["size_bytes"]), bits)
        rows += [
            (
                *cells, one["runtime"], f"{one['kl']:.1e}", f"{one['agreement']:.1%}", *(
                    "" if one[key] is None else f"{one[key]:.4g}" for key in ("perplexity", "reference_perplexity")
                ),
            )
            for one in file["outputs"]
        ] or [(*cells, "not compared", "", "", "", "")]  # fmt: skip
    output.print_table(head, rows)


def read_options(to: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the exporter's keyword arguments. Raises ModelError for an option of another format or a bad value."""
    own = {option.name: option for option in FORMATS.get(to).options}
    values = {}
    for name, text in given.items():
        if text is None or text is False or text == ():
            continue
        if name not in own:
            others = ((one, option) for one in FORMATS.all() for option in one.options)
            owner, option = next((one, option) for one, option in others if option.name == name)
            raise ModelError(f"{option.flag} is an option of {owner.name}, not of {to}")
        if own[name].multiple:
            values[name] = tuple(map(own[name].read, text))
        else:
            values[name] = own[name].constant if text is True else own[name].read(text)
    return values
