"""Record what a benchmark measured as benchmarks/results/NAME.json: rows, command, commit, date, machine, versions.

A row is a dict. Strings and booleans label it, a list holds one value per round, a number stands for a single value,
and `{"value": …, "low": …, "high": …}` is an estimate with its 95 % interval. Nothing but the standard library is
imported, as the arms of a benchmark may run in environments of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "onnxruntime", "ctranslate2", "torchao", "numpy")
Row = dict[str, Any]


def add_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--record NAME`, the result file to write; an empty name writes none."""
    parser.add_argument(
        "--record", default=name, metavar="NAME", help=f"write benchmarks/results/NAME.json; '' for none [{name}]"
    )


def write(name: str, rows: list[Row], *, rounds: int = 1, **also: Any) -> Path | None:
    """Write results/`name`.json and return its path; None where `name` is empty.

    `also` are further top-level entries, such as the versions of packages in another environment.
    """
    if not name:
        return None
    result: dict[str, Any] = {"command": command(), **environment(), "rounds": rounds} | also | {"rows": rows}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(to_json(result))
    print(f"\nwrote {path.relative_to(ROOT)}; `python -m benchmarks.figures` puts it into the docs", file=sys.stderr)
    return path


def read(name: str) -> dict[str, Any]:
    """Return results/`name`.json. Raises FileNotFoundError where there is none."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def to_json(result: dict[str, Any]) -> str:
    """JSON with a line per row, so that a diff shows which rows changed."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, ensure_ascii=False, indent=1)
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in result["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def command() -> str:
    """The command line as one would type it in the repository root; absolute paths elsewhere shrink to their names."""
    words = [_portable(word) for word in sys.argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def _portable(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def environment() -> dict[str, Any]:
    """Commit, date, machine and versions of this run."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"commit": commit(), "date": today, "machine": machine(), "versions": versions()}


def commit() -> str:
    """The short hash of HEAD, with -dirty where tracked files outside the results differ from it."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return _git("rev-parse", "--short=7", "HEAD") + ("-dirty" if changed else "") or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB and, where torch sees one, the GPU."""
    from mowa import hardware

    memory_gib = round(hardware.total_memory_bytes() / 2**30)
    found = {"cpu": hardware.cpu_name(), "cores": hardware.cpu_count(), "memory_gib": memory_gib}
    found["features"] = " ".join(hardware.cpu_features())
    if "torch" in sys.modules and (gpu := hardware.gpu_name()):
        found["gpu"] = gpu
    return found


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those `packages` that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
