"""`mowa export`: export a model to another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mowa.cli import output
from mowa.errors import ModelError
from mowa.quantization.schemes import SCHEMES

FORMAT_OF_OPTION = {
    "opset": "onnx",
    "no_attention_mask": "onnx",
    "lengths_s": "coreml",
    "optimization_profile": "tensorrt",
}
"""Options that only one format takes."""


# fmt: off
@click.command(short_help="Export a model to another runtime.")
@click.argument("model")
@click.option("--to", required=True, metavar="FORMAT",
              help="Output format: onnx, safetensors, coreml, tensorrt or ctranslate2.")
@click.option("--scheme", default="float32", show_default=True, metavar="SCHEME",
              help=f"Weight storage scheme: {', '.join(SCHEMES)}; suffixes as in `mowa quantize`.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder; must not exist.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER", help="Adapter to merge before export.")
@click.option("--calibration-data", default="", metavar="SOURCE",
              help="Calibration recordings, for schemes that need them.")
@click.option("--calibration-split", default="", help="Split of --calibration-data.")
@click.option("--opset", type=int, help="onnx: opset version, 18 to 23. [default: 20]")
@click.option("--no-attention-mask", is_flag=True,
              help="onnx: omit the attention_mask input; batches then need equal lengths.")
@click.option("--lengths-s", metavar="LIST", help="coreml: input lengths to accept, in seconds. [default: 5,10,20]")
@click.option("--optimization-profile", metavar="LIST",
              help="tensorrt: min, opt and max input shape as batch x samples. [default: 1x16000,1x160000,4x480000]")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def export(
    model: str, to: str, scheme: str, out: Path, adapter: Path | None, calibration_data: str, calibration_split: str,
    revision: str | None, offline: bool, **format_options: Any,
) -> None:
    # fmt: on
    """Export MODEL to FORMAT.

    The result is loaded again and compared with the model before the folder is created. `mowa transcribe -m FOLDER`
    runs formats that have an engine here; `mowa quantize` measures what a scheme costs in accuracy.
    """
    import mowa
    from mowa.quantization import schemes

    options = _exporter_options(to, format_options)
    with output.stage_progress() as on_progress:
        artifact = mowa.export(
            model, to, out, scheme=scheme, adapter=adapter, calibration_data=calibration_data,
            calibration_split=calibration_split, revision=revision, offline=offline,
            on_progress=lambda fraction: on_progress(f"{scheme}: quantizing", fraction), **options,
        )  # fmt: skip
    click.echo(f"{out}  {output.format_size(artifact.size_bytes)}, {to}, {schemes.format_scheme(artifact.scheme)}")
    if artifact.unverified_reason:
        click.echo(f"not verified on this machine: {artifact.unverified_reason}")


def _exporter_options(to: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the exporter's keyword arguments. Raises ModelError for an option of another format and for a bad list."""
    options = {name: value for name, value in given.items() if value}
    for name in options:
        if FORMAT_OF_OPTION[name] != to:
            raise ModelError(f"--{name.replace('_', '-')} is an option of {FORMAT_OF_OPTION[name]}, not of {to}")
    if options.pop("no_attention_mask", False):
        options["attention_mask"] = False
    if "lengths_s" in options:
        try:
            options["lengths_s"] = tuple(float(one) for one in options["lengths_s"].split(","))
        except ValueError:
            raise ModelError(f"--lengths-s {options['lengths_s']}: expected seconds, e.g. 5,10,20") from None
    if "optimization_profile" in options:
        shapes = [one.partition("x") for one in options["optimization_profile"].split(",")]
        if len(shapes) != 3 or not all(batch.isdigit() and samples.isdigit() for batch, _, samples in shapes):
            raise ModelError(
                f"--optimization-profile {options['optimization_profile']}: expected three shapes, e.g."
                " 1x16000,1x160000,4x480000"
            )
        options["optimization_profile"] = tuple((int(batch), int(samples)) for batch, _, samples in shapes)
    return options
