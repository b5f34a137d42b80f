"""`mowa doctor`: show hardware and installed packages, and transcribe the bundled sample as a self-test."""

from __future__ import annotations

import difflib
import json
import time

import click

from mowa import hardware
from mowa.errors import MowaError

MIN_SIMILARITY = 0.9  # share of matching characters between transcript and reference that the self-test requires


@click.command(short_help="Show hardware and installed packages, and run a self-test.")
def doctor() -> int:
    """Show hardware and installed packages, and transcribe a bundled sample as a self-test."""
    import platform

    from mowa.cli.output import format_size, print_table

    features = " ".join(hardware.cpu_features()) or "generic"
    print_table(
        ["machine", ""],
        [
            ["  python", platform.python_version()],
            ["  cpu", f"{hardware.describe_machine()} ({features})"],
            ["  memory", format_size(hardware.total_memory_bytes())],
            ["  gpu", hardware.gpu_name() or "none"],
            ["  cache", str(hardware.cache_folder())],
        ],
    )
    click.echo()
    print_table(
        ["package", "version", "used for"],
        [
            ["  " + name, version or "missing", hardware.OPTIONAL_PACKAGES[name]]
            for name, version in hardware.optional_package_versions().items()
        ],
    )
    click.echo("\nself-test")
    try:
        return _self_test()
    except MowaError as error:
        click.echo(f"  FAILED: {error}")
        return 2


def _self_test() -> int:
    """Transcribe the sample in float32 and in the fastest dtype, compare both with its text, return the exit code."""
    import mowa
    from mowa.data.text.normalize import normalize_text
    from mowa.io.hub import SAMPLE_CLIP

    reference = normalize_text(json.loads(SAMPLE_CLIP.with_suffix(".json").read_text())["text"])
    lowest = 1.0
    for device, dtype in (("cpu", "float32"), ("auto", "auto")):
        engine = mowa.open_engine(mowa.load("pl-tiny"), device=device, dtype=dtype)
        started_s = time.perf_counter()
        transcript = mowa.transcribe(SAMPLE_CLIP, engine)
        elapsed_s = time.perf_counter() - started_s
        similarity = difflib.SequenceMatcher(None, reference, transcript.text, autojunk=False).ratio()
        lowest = min(lowest, similarity)
        click.echo(f"  {engine.precision.dtype} on {engine.device}: {transcript.text}")
        click.echo(f"    {transcript.duration_s:.1f} s of audio in {elapsed_s:.2f} s, similarity {similarity:.0%}")
    if lowest < MIN_SIMILARITY:
        click.echo(f"  FAILED: expected at least {MIN_SIMILARITY:.0%} similarity with: {reference}")
        return 2
    click.echo("  ok")
    return 0
