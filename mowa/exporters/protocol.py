"""Export a model: check that the format supports it, write it, compare it with the net, and move the folder into place.

Defines the interface of an exporter, which is a module per format; `registry` lists them.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

from mowa.errors import DataError, MissingDependency, ModelError
from mowa.exporters import manifest
from mowa.exporters.manifest import ExportResult
from mowa.exporters.registry import FORMATS, ExportFormat, validate_task
from mowa.io.atomic import atomic_folder
from mowa.types import AnyModel, Artifact

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Exporter(Protocol):
    """Interface of an exporter module."""

    def unsupported_reason(self, model: Any) -> str:
        """Return why this model or its scheme cannot be exported and what to use instead; empty if it can."""

    def write(self, model: Any, folder: Path, **options: Any) -> ExportResult:
        """Write `model` into the empty `folder`, load it again and compare it with the net.

        Raises ModelError if the export differs from the net, or if the format lacks an operator.
        """


def require_packages(to: str) -> None:
    """Raise MissingDependency, with what pip installs, if writing this format needs a package that is missing.

    Raises ModelError for an unknown format.
    """
    found = FORMATS.get(to)
    for package in found.packages:
        if not _is_installed(package):
            install = found.install or package
            raise MissingDependency(f"export to {found.name} needs {package}: pip install '{install}'")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # in sys.modules without a spec
        return True


def export(model: AnyModel, to: str, out: str | Path, **options: Any) -> Artifact:
    """Export `model`, with its adapter, in the format `to` into the new folder `out`. `model` does not change.

    Where the model of a format is one file, `out` may be its name; the other files that are written are named after it.

    Raises ModelError if the format is unknown or does not support the model or scheme, or if the export differs from
    the net, in which case `out` is not created; MissingDependency; DataError if `out` exists or the disk is full.
    """
    found, out = FORMATS.get(to), Path(out)
    validate_task(found, model.origin.name, model.task)
    found.validate_options(options)
    exporter = cast(Exporter, import_module(found.module))
    if reason := exporter.unsupported_reason(model):
        raise ModelError(f"{model.origin.name} ({model.scheme.name}) cannot be exported to {to}: {reason}")
    require_packages(to)
    try:
        if found.suffix and out.suffix.lower() == found.suffix:
            return _export_file(exporter, model, found, out.with_suffix(found.suffix), options)
        with atomic_folder(out) as folder:
            result = exporter.write(model, folder, **options)
            manifest.write_export_manifest(model, to, folder, result, artifact=found.artifact)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise DataError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
        free = shutil.disk_usage(out.parent).free
        size = 4 * sum(weight.numel() for weight in model.net.parameters())
        raise DataError(
            f"no space left on the disk of {out}: {free / 1e6:.0f} MB are free, and the export needs up to"
            f" {2 * size / 1e6:.0f} MB. Nothing was written; free some space, or choose another folder"
        ) from None
    return manifest.read_artifact(out)


def _export_file(exporter: Exporter, model: AnyModel, found: ExportFormat, out: Path, options: Any) -> Artifact:
    """Write one file and those that describe it: MODEL.gguf, MODEL.report.json, …"""
    if taken := next((one for one in (out, *out.parent.glob(f"{glob.escape(out.stem)}.*")) if one.exists()), None):
        raise DataError(f"{taken} already exists: choose another name, or delete it")
    schemes = {one.lower() for one in options.get("schemes", ())}
    if len(schemes) > 1:
        raise ModelError(f"{out} is one file, and {len(schemes)} schemes are as many files: name a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as name:
        folder = Path(name)
        result = exporter.write(model, folder, file_stem=out.stem, **options)
        others = [file for file in folder.iterdir() if file.name not in result.files]
        manifest.write_export_manifest(model, found.name, folder, result, artifact=found.artifact)
        artifact = manifest.read_artifact(folder)
        _move_new(folder / result.files[0], out)
        for file in others:
            _move_new(file, out.with_name(f"{out.stem}.{file.name}"))
    return replace(artifact, folder=out.parent, files=(out.name,))


def _move_new(file: Path, out: Path) -> None:
    """Move a file to a name that nothing has. Raises DataError if another process took it in the meantime."""
    try:
        os.link(file, out)
    except FileExistsError:
        raise DataError(f"{out} was written by another process: choose another name") from None
    except OSError:  # a file system without links
        os.replace(file, out)
