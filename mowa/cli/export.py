"""`mowa export`: a model as other programs run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mowa.cli import output
from mowa.errors import ModelError
from mowa.quantization.schemes import SCHEME_SYNTAX, SCHEMES

FORMAT_OF_OPTION = {
    "opset": "onnx",
    "no_mask": "onnx",
    "seconds": "coreml",
    "profile": "tensorrt",
}  # options of one format


# fmt: off
@click.command(short_help="Write a model as other programs run it.")
@click.argument("model")
@click.option("--to", required=True, metavar="FORMAT", help="onnx, safetensors, coreml, tensorrt, ctranslate2.")
@click.option("--scheme", default="float32", show_default=True, metavar="SCHEME",
              help=f"{', '.join(SCHEMES)}. {SCHEME_SYNTAX[0].upper()}{SCHEME_SYNTAX[1:]}.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for it.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER", help="An adapter, to be part of it.")
@click.option("--data", default="", metavar="SOURCE", help="Recordings to calibrate on, where the scheme needs some.")
@click.option("--split", default="", help="Split of --data.")
@click.option("--opset", type=int, help="onnx: version of the operators, 18 to 23. [default: 20]")
@click.option("--no-mask", is_flag=True, help="onnx: one input, for recordings that share no batch.")
@click.option("--seconds", metavar="LIST", help="coreml: lengths of recordings it takes. [default: 5,10,20]")
@click.option("--profile", metavar="LIST",
              help="tensorrt: least, likeliest and largest batch x samples. [default: 1x16000,1x160000,4x480000]")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--offline", is_flag=True, help="Never ask the hub; use what is cached.")
def export(
    model: str, to: str, scheme: str, out: Path, adapter: Path | None, data: str, split: str, revision: str | None,
    offline: bool, **turned: Any,
) -> None:
    # fmt: on
    """Write MODEL as FORMAT into a folder, in a scheme; it is read again and compared before the folder is there.

    `mowa transcribe -m FOLDER` runs what runs here. What a scheme does to the words, `mowa shrink` measures.
    """
    from mowa.adapters import checkpoint
    from mowa.exporters import protocol
    from mowa.loading.ctc import load
    from mowa.quantization import calibration, schemes
    from mowa.quantization import quantize as narrow

    chosen = schemes.parse_scheme(scheme)
    protocol.get_exporter(to).require_packages()
    options = _options(to, turned)
    loaded = load(model, revision=revision, offline=offline)
    loaded = loaded if adapter is None else checkpoint.load_adapter(loaded, adapter)
    sounds = calibration.load_clips(data, loaded, split=split) if data and schemes.calibration_reason(chosen) else None
    with output.stage_progress() as told:
        shrunk = narrow(loaded, chosen, sounds, on_progress=lambda share: told(f"{scheme}: shrinking", share))
        told(f"{scheme}: writing {to}", 1.0)
        artifact = protocol.export(shrunk, to, out, **options)
    click.echo(f"{out}  {output.format_size(artifact.size_bytes)}, {to}, {schemes.format_scheme(artifact.scheme)}")
    if artifact.unverified_reason:
        click.echo(f"not checked here: {artifact.unverified_reason}")


def _options(to: str, turned: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in turned.items() if value}
    for name in given:
        if FORMAT_OF_OPTION[name] != to:
            raise ModelError(f"--{name.replace('_', '-')} is for {FORMAT_OF_OPTION[name]}, not for {to}")
    if "no_mask" in given:
        given["masked"] = not given.pop("no_mask")
    if "seconds" in given:
        try:
            given["seconds"] = tuple(float(one) for one in given["seconds"].split(","))
        except ValueError:
            raise ModelError(f"--seconds {given['seconds']} is no list of seconds: say 5,10,20") from None
    if "profile" in given:
        sizes = [one.partition("x") for one in given["profile"].split(",")]
        if len(sizes) != 3 or not all(batch.isdigit() and samples.isdigit() for batch, _, samples in sizes):
            raise ModelError(f"--profile {given['profile']} is not three sizes: say 1x16000,1x160000,4x480000")
        given["profile"] = tuple((int(batch), int(samples)) for batch, _, samples in sizes)
    return given
