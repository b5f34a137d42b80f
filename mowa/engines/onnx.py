"""A CTC net in ONNX Runtime: over a folder that `mowa.exporters` wrote, or over one made of a model, once, in the cache.

It knows arrays, lengths and the cache; it refuses to know files, windows and words. The cache is asked by all that
makes the numbers (weights, an adapter's among them, config, versions, scheme): a changed model is exported anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mowa import exporters as exporting
from mowa import hardware
from mowa.adapters import checkpoint
from mowa.engines.artifact import ArtifactEngine, log_softmax
from mowa.engines.protocol import BatchPolicy, num_frames
from mowa.errors import DataError, MissingDependency, ModelError
from mowa.exporters import manifest
from mowa.exporters.onnx.exporter import run
from mowa.quantization import quantize
from mowa.types import FLOAT32, Model

log = logging.getLogger("mowa")

DTYPES = ("auto", "float32", "int8")
KIND = "onnx"
FLOAT_MATMUL_WEIGHTS = ("float32", "float16", "bfloat16", "int4", "nf4")  # weights that are multiplied in float32


@dataclass(frozen=True)
class OnnxEngine(ArtifactEngine):
    """A loaded export. Make one with `engine`."""

    session: Any  # an onnxruntime InferenceSession
    model: Model | None = None
    threads: int | None = None

    @cached_property
    def streaming_session(self) -> Any:
        """The graph of one chunk (`export.chunks`), opened when it is first asked for; None where there is none."""
        name = self.artifact.details["chunk"]
        return None if name is None else _session(self.artifact.folder / name, self.threads)

    @property
    def name(self) -> str:
        return "onnx"

    @property
    def dtype(self) -> str:
        scheme = self.artifact.scheme
        return "float32" if scheme.activations == "none" and scheme.weights in FLOAT_MATMUL_WEIGHTS else "int8"

    @property
    def batch_policy(self) -> BatchPolicy:
        if self.dtype != "float32":
            return BatchPolicy.SINGLE
        return BatchPolicy.PADDED if self.artifact.details["masked"] else BatchPolicy.EQUAL_LENGTH

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Engine.emissions`. ValueError for clips that may not share a batch."""
        lengths = np.array([len(clip) for clip in clips])
        longest = int(lengths.max())
        if lengths.min() != longest and self.batch_policy is not BatchPolicy.PADDED:
            raise ValueError(f"clips of different lengths {lengths.tolist()} may not share a batch of this net")
        logits = log_softmax(
            run(self.session, clips, self.artifact.details["masked"], self.preprocessing.padding_value)
        )
        return [row[: num_frames(self.config, int(n))] for row, n in zip(logits, lengths, strict=True)]


def open_engine(source: Model | str | Path, *, dtype: str = "auto", threads: int | None = None) -> OnnxEngine:
    """A folder that was exported, or a model, whose export is made now or was before. "auto" is what the folder holds,
    or the model's own scheme.

    Raises ModelError: an unknown dtype, or another than the folder's; no or a damaged export. As `export` does.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)} with ONNX Runtime; use --engine pytorch")
    if isinstance(source, Model):
        exported = manifest.read_artifact(export_to_cache(source, dtype), (KIND,))
    else:
        exported = manifest.read_artifact(Path(source), (KIND,))
        if dtype not in ("auto", exported.scheme.weights):
            name = exported.scheme.name
            raise ModelError(f"{source} was exported in {name}: leave --dtype out, or export it in {dtype}")
    model = source if isinstance(source, Model) else None
    return OnnxEngine(exported, _session(exported.folder / exported.details["graph"], threads), model, threads)


def export_to_cache(model: Model, dtype: str = "auto") -> Path:
    """The export of `model` under the cache, made where it is not there or damaged; in int8-dynamic where `dtype` is
    int8 and the model is wide."""
    folder = cache_path(model, dtype)
    try:
        manifest.read_artifact(folder, (KIND,))
        return folder
    except ModelError:
        if folder.exists():
            _remove(folder)
    narrow = quantize(model, "int8-dynamic") if _needs_int8(model, dtype) else model
    log.info("writing %s as ONNX in %s, once", model.origin.name, narrow.scheme.name)
    with suppress(DataError):  # another process was faster
        exporting.export(narrow, KIND, folder)
    return folder


def _needs_int8(model: Model, dtype: str) -> bool:
    if dtype == "float32" and model.scheme != FLOAT32:
        raise ModelError(f"{model.origin.name} is in {model.scheme.name}: leave --dtype out")
    return dtype == "int8" and model.scheme == FLOAT32


def cache_path(model: Model, dtype: str = "auto") -> Path:
    """Where the export of `model` is kept; it need not be there."""
    made_by = [
        f"{package} {checkpoint.installed_version(package)}"
        for package in ("mowa", "torch", "transformers", "onnxruntime")
    ]
    said = [
        manifest.model_sha256(model),
        "int8" if _needs_int8(model, dtype) else "as it is",
        str(manifest.FORMAT_VERSION),
        *made_by,
    ]
    said += [repr(model.vocabulary), repr(model.preprocessing)]
    return hardware.cache_folder() / "onnx" / hashlib.sha256("\n".join(said).encode()).hexdigest()[:24]


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _session(graph: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency(
            "this engine needs onnxruntime: pip install onnxruntime, or use --engine pytorch"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or hardware.cpu_count()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
