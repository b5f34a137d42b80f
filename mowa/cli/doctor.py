"""`mowa doctor`: facts of the machine, optional parts, and a self-test on the bundled sample."""

from __future__ import annotations

import difflib
import json
import time
from pathlib import Path

import click

from mowa import hardware
from mowa.errors import MowaError

MIN_SIMILARITY = 0.9  # the share of matching characters below which something is wrong with this machine
SAMPLE = Path(__file__).parents[1] / "assets" / "sample.flac"


@click.command(short_help="Say what this machine has and whether mowa works on it.")
def doctor() -> int:
    """Say what this machine has, which optional parts are there, and transcribe the bundled sample."""
    import platform

    from mowa.cli.output import format_size, print_table

    print_table(
        ["machine", ""],
        [
            ["  python", platform.python_version()],
            [
                "  processor",
                f"{hardware.cpu_name()}, {hardware.cpu_count()} cores ({' '.join(hardware.cpu_features()) or 'plain'})",
            ],
            ["  memory", format_size(hardware.total_memory_bytes())],
            ["  gpu", hardware.gpu_name() or "none"],
            ["  cache", str(hardware.cache_folder())],
        ],
    )
    click.echo()
    print_table(
        ["part", "version", "for"],
        [
            ["  " + name, version or "missing", hardware.OPTIONAL_PACKAGES[name]]
            for name, version in hardware.optional_package_versions().items()
        ],
    )
    click.echo("\nself-test")
    try:
        return _self_test()
    except MowaError as wrong:
        click.echo(f"  failed: {wrong}")
        return 2


def _self_test() -> int:
    """Transcribe the sample in float32 and in what this machine is fastest in; both must come close to what is said."""
    import mowa
    from mowa.data.text.normalize import normalize_text

    said = normalize_text(json.loads(SAMPLE.with_suffix(".json").read_text())["said"])
    worst = 1.0
    for device, dtype in (("cpu", "float32"), ("auto", "auto")):
        engine = mowa.open_engine(mowa.load("pl-tiny"), device=device, dtype=dtype)
        started = time.perf_counter()
        heard = mowa.transcribe(SAMPLE, engine)
        took_s = time.perf_counter() - started
        alike = difflib.SequenceMatcher(None, said, heard.text, autojunk=False).ratio()
        worst = min(worst, alike)
        click.echo(f"  {engine.precision.dtype} on {engine.device}: {heard.text}")
        click.echo(f"    {heard.duration_s:.1f} s of audio in {took_s:.2f} s, {alike:.0%} as it was spoken")
    click.echo(
        "  well" if worst >= MIN_SIMILARITY else f"  NOT WELL: at least {MIN_SIMILARITY:.0%} was expected of: {said}"
    )
    return 0 if worst >= MIN_SIMILARITY else 2
