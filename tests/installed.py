"""Install a package for one test: a folder on sys.path with its metadata, and its module if there is one."""

from pathlib import Path

import pytest


def install(
    site: Path, monkeypatch: pytest.MonkeyPatch, group: str, name: str, value: str, source: str | None = None
) -> None:
    """Add an entry point of `group`: `name` = `value` ("module:attribute"), and write `source` as the module."""
    module = value.partition(":")[0]
    info = site / f"{module.rpartition('.')[2]}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.stem}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    if source is not None:
        (site / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(site)
