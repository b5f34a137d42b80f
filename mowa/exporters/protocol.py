"""Export a model: check that the format supports it, write it, compare it with the net, and move the folder into place.

Defines the interface of an exporter, which is a module per format, listed in `MODULES`.
"""

from __future__ import annotations

import difflib
import errno
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from mowa.errors import DataError, ModelError
from mowa.exporters import manifest
from mowa.exporters.manifest import ExportResult
from mowa.io.atomic import atomic_folder
from mowa.types import Artifact, CTCModel

MODULES = {
    "onnx": "mowa.exporters.onnx.exporter",
    "safetensors": "mowa.exporters.safetensors",
    "coreml": "mowa.exporters.coreml.exporter",
    "tensorrt": "mowa.exporters.tensorrt.exporter",
    "ctranslate2": "mowa.exporters.ctranslate2",
}
FORMATS = {
    "onnx": "ONNX, for ONNX Runtime on CPUs, phones and in browsers",
    "safetensors": "a checkpoint, quantized or not, that transformers loads",
    "coreml": "an mlprogram for Apple's Core ML",
    "tensorrt": "an engine for NVIDIA GPUs, or the files to build it there",
    "ctranslate2": "CTranslate2",
}
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class Exporter(Protocol):
    """Interface of an exporter module."""

    def unsupported_reason(self, model: CTCModel) -> str:
        """Return why this model or its scheme cannot be exported and what to use instead; empty if it can."""

    def require_packages(self) -> None:
        """Raise MissingDependency, with the pip extra, if a required package is not installed."""

    def write(self, model: CTCModel, folder: Path, **options: Any) -> tuple[Any, ExportResult]:
        """Write `model` into the empty `folder`, load it again and compare it with the net.

        Returns the net that was written, whose config is saved beside it, and the result. Raises ModelError if the
        export differs from the net, or if the format lacks an operator.
        """


def get_exporter(to: str) -> Exporter:
    """Return the exporter of a format. Raises ModelError, with the closest match, if there is none."""
    if to not in FORMATS:
        close = difflib.get_close_matches(to, FORMATS, 1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(FORMATS)}"
        raise ModelError(f"unknown format {to!r}: {hint}")
    return cast(Exporter, import_module(MODULES[to]))


def export(model: CTCModel, to: str, out: str | Path, **options: Any) -> Artifact:
    """Export `model`, with its adapter, in the format `to` into the new folder `out`. `model` does not change.

    Raises ModelError if the format is unknown or does not support the model or scheme, or if the export differs from
    the net, in which case `out` is not created; MissingDependency; DataError if `out` exists or the disk is full.
    """
    exporter, out = get_exporter(to), Path(out)
    if reason := exporter.unsupported_reason(model):
        raise ModelError(f"{model.origin.name} ({model.scheme.name}) cannot be exported to {to}: {reason}")
    exporter.require_packages()
    try:
        with atomic_folder(out) as folder:
            net, result = exporter.write(model, folder, **options)
            manifest.write_manifest(model, net, to, folder, result)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        free = shutil.disk_usage(out.parent).free
        size = 4 * sum(weight.numel() for weight in model.net.parameters())
        raise DataError(
            f"no space left on the disk of {out}: {free / 1e6:.0f} MB are free, and the export needs up to"
            f" {2 * size / 1e6:.0f} MB. Nothing was written; free some space, or choose another folder"
        ) from None
    return manifest.read_artifact(out)
