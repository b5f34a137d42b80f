"""A CTC net in ONNX Runtime: over a folder that `mowa.export` wrote, or over one made of a model, once, in the cache.

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

from mowa import machine
from mowa.adapt import store
from mowa.engines.protocol import Sharing, frames
from mowa.errors import DataError, MissingPart, ModelError
from mowa.export import onnx as exporting
from mowa.export.onnx import Exported
from mowa.nouns import Model, Origin, Preprocessing, Vocabulary

log = logging.getLogger("mowa")

DTYPES = ("auto", "float32", "int8")


@dataclass(frozen=True)
class Onnx:
    """A loaded export. Make one with `engine`."""

    exported: Exported
    session: Any  # an onnxruntime InferenceSession
    model: Model | None = None
    threads: int | None = None

    @cached_property
    def chunk(self) -> Any:
        """The graph of one chunk (`export.chunks`), opened when it is first asked for; None where there is none."""
        return None if self.exported.chunk is None else _session(self.exported.chunk, self.threads)

    @property
    def name(self) -> str:
        return "onnx"

    @property
    def origin(self) -> Origin:
        return self.exported.origin

    @property
    def vocabulary(self) -> Vocabulary:
        return self.exported.vocabulary

    @property
    def preprocessing(self) -> Preprocessing:
        return self.exported.preprocessing

    @property
    def config(self) -> Any:
        return self.exported.config

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def dtype(self) -> str:
        return self.exported.scheme

    @property
    def sharing(self) -> Sharing:
        if self.dtype != "float32":
            return Sharing.ALONE
        return Sharing.PADDED if self.exported.masked else Sharing.EQUAL

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Engine.emissions`. ValueError for clips that may not share a batch."""
        lengths = np.array([len(clip) for clip in clips])
        longest = int(lengths.max())
        if lengths.min() != longest and self.sharing is not Sharing.PADDED:
            raise ValueError(f"clips of different lengths {lengths.tolist()} may not share a batch of this net")
        values = np.full((len(clips), longest), self.preprocessing.padding_value, np.float32)
        for row, clip in zip(values, clips, strict=True):
            row[: len(clip)] = clip
        feed = {"input_values": values}
        if self.exported.masked:
            feed["attention_mask"] = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        (logits,) = self.session.run(["logits"], feed)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return [row[: frames(self.config, int(n))] for row, n in zip(logits, lengths, strict=True)]


def engine(source: Model | str | Path, *, dtype: str = "auto", threads: int | None = None) -> Onnx:
    """A folder that was exported, or a model, whose export is made now or was before. "auto" is what the folder holds,
    and float32 of a model.

    Raises ModelError: an unknown dtype, or another than the folder's; no or a damaged export. As `export` does.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)} with ONNX Runtime; use --engine native")
    if isinstance(source, Model):
        exported = exporting.read(cached(source, "float32" if dtype == "auto" else dtype))
    else:
        exported = exporting.read(Path(source))
        if dtype not in ("auto", exported.scheme):
            raise ModelError(f"{source} was exported in {exported.scheme}: leave --dtype out, or export it in {dtype}")
    model = source if isinstance(source, Model) else None
    return Onnx(exported, _session(exported.graph, threads), model, threads)


def cached(model: Model, scheme: str) -> Path:
    """The export of `model` in `scheme` under the cache, made where it is not there or damaged."""
    folder = place(model, scheme)
    try:
        exporting.read(folder)
        return folder
    except ModelError:
        if folder.exists():
            _remove(folder)
    log.info("writing %s as ONNX in %s, once", model.origin.name, scheme)
    with suppress(DataError):  # another process was faster
        exporting.export(model, folder, int8=scheme == "int8")
    return folder


def place(model: Model, scheme: str) -> Path:
    """Where the export of `model` in `scheme` is kept; it need not be there."""
    made_by = [f"{package} {store.version_of(package)}" for package in ("mowa", "torch", "transformers", "onnxruntime")]
    said = [exporting.digest(model), scheme, str(exporting.FORMAT), *made_by]
    said += [repr(model.vocabulary), repr(model.preprocessing)]
    return machine.cache_folder() / "onnx" / hashlib.sha256("\n".join(said).encode()).hexdigest()[:24]


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _session(graph: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingPart("this engine needs onnxruntime: pip install onnxruntime, or use --engine native") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or machine.cores()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
