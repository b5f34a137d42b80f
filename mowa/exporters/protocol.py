"""What every exporter is, and the one way a model leaves: asked first, written beside, compared, and only then there.

An exporter is a module of this room. How any format looks is not known here.
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
from mowa.types import Artifact, Model

MODULES = {
    "onnx": "mowa.exporters.onnx.exporter",
    "safetensors": "mowa.exporters.safetensors",
    "coreml": "mowa.exporters.coreml.exporter",
    "tensorrt": "mowa.exporters.tensorrt.exporter",
    "ctranslate2": "mowa.exporters.ctranslate2",
}
FORMATS = {
    "onnx": "ONNX, for ONNX Runtime on processors, phones and in browsers",
    "safetensors": "quantised weights that transformers loads",
    "coreml": "an mlprogram for Apple's Core ML",
    "tensorrt": "an engine for NVIDIA GPUs, or all that builds one there",
    "ctranslate2": "CTranslate2",
}


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class Exporter(Protocol):
    """A module of this room, named as its format is."""

    def unsupported_reason(self, model: Model) -> str:
        """Why this model, as it is shrunk, cannot be written so, and what could instead; empty where it can."""

    def require_packages(self) -> None:
        """MissingPart, with what to install, where a package that writing needs is not there."""

    def write(self, model: Model, folder: Path, **options: Any) -> tuple[Any, ExportResult]:
        """Write `model` into `folder`, which is there and empty, read it again and compare it with the net where that
        can be done here. → the net that was written (its config is what goes beside it), and what was written.

        Raises ModelError where what was written does not say what the net says, or an operator has no equal: named.
        """


def get_exporter(to: str) -> Exporter:
    """The exporter called `to`. ModelError with the nearest name where there is none."""
    if to not in FORMATS:
        near = difflib.get_close_matches(to, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(FORMATS)}"
        raise ModelError(f"no format is called {to!r}; {hint}")
    return cast(Exporter, import_module(MODULES[to]))


def export(model: Model, to: str, out: str | Path, **options: Any) -> Artifact:
    """Write `model`, adapter included, as `to` into the folder `out`, which must not be there. `model` stays as it is.

    Raises ModelError: an unknown format, a model or scheme that it cannot hold, a result that is not what the net says
    (nothing is left then); MissingPart; DataError where `out` is there, or the disk is full.
    """
    chosen, out = get_exporter(to), Path(out)
    if why := chosen.unsupported_reason(model):
        raise ModelError(f"{model.origin.name} in {model.scheme.name} cannot be written as {to}: {why}")
    chosen.require_packages()
    try:
        with atomic_folder(out) as folder:
            net, written = chosen.write(model, folder, **options)
            manifest.write_manifest(model, net, to, folder, written)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        free = shutil.disk_usage(out.parent).free
        need = 4 * sum(weight.numel() for weight in model.net.parameters())
        raise DataError(
            f"the disk of {out} is full ({free / 1e6:.0f} MB are free, and writing takes up to {2 * need / 1e6:.0f}):"
            " nothing was left there; make room, or choose another folder"
        ) from None
    return manifest.read_artifact(out)
