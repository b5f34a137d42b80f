"""Run a CTC net in ONNX Runtime, from an export or from a model that is exported to the cache once.

The cache key covers everything that determines the result (weights including an adapter's, config, scheme, package
versions), so a changed model is exported again.
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

from mowa import exporters, hardware
from mowa.decode.stream import LogProbs
from mowa.decode.stream_state import Samples
from mowa.engines.protocol import ArtifactEngine, BatchPolicy, ChunkStep, FloatArray, log_softmax
from mowa.engines.registry import ENGINES, validate_device_and_dtype
from mowa.errors import DataError, MissingDependency, ModelError
from mowa.exporters import manifest
from mowa.exporters.onnx.exporter import run
from mowa.io.manifest import FORMAT_VERSION
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.ctc_encoder.streaming import CacheShape
from mowa.quantization import quantize
from mowa.types import FLOAT32, CTCModel, Model

log = logging.getLogger("mowa")

FORMAT = "onnx"
FLOAT_MATMUL_WEIGHTS = (
    "float32",
    "float16",
    "bfloat16",
    "int4",
    "nf4",
)  # dtypes of weights that are multiplied in float32


@dataclass(frozen=True)
class OnnxEngine(ArtifactEngine):
    """A loaded export. Create it with `open_engine`."""

    session: Any  # an onnxruntime InferenceSession
    threads: int | None = None

    @cached_property
    def streaming_session(self) -> Any:
        """The session of the streaming graph, opened on first use; None where the export has none."""
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
        return BatchPolicy.PADDED if self.artifact.details["attention_mask"] else BatchPolicy.EQUAL_LENGTH

    def chunk_step(self) -> ChunkStep | None:
        """As `SteppingEngine.chunk_step`."""
        return None if self.streaming_session is None else _OnnxStep(self)

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Engine.emissions`. Raises ValueError for clips that cannot share a batch."""
        lengths = np.array([len(clip) for clip in clips])
        longest = int(lengths.max())
        if lengths.min() != longest and self.batch_policy is not BatchPolicy.PADDED:
            raise ValueError(f"clips of different lengths {lengths.tolist()} cannot share a batch of this net")
        logits = log_softmax(
            run(self.session, clips, self.artifact.details["attention_mask"], self.preprocessing.padding_value)
        )
        geometry = frame_geometry(self.config)
        return [row[: geometry.num_frames(int(n))] for row, n in zip(logits, lengths, strict=True)]


class _OnnxStep:
    """Inputs of the graph, in order: samples, position, key-value cache and, without absolute positions, conv cache."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._session = engine.streaming_session
        inputs = self._session.get_inputs()
        layers, _, _, heads, head_dim = inputs[2].shape
        conv_frames, conv_size = inputs[3].shape if len(inputs) > 3 else (0, 0)
        self._names = [one.name for one in inputs]
        self.cache_shape = CacheShape(layers, heads, head_dim, conv_frames, conv_size)

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]:
        values = (samples, np.array([position]), np.ascontiguousarray(kv_cache), conv_cache)
        logits, new_kv, *new_conv = self._session.run(None, dict(zip(self._names, values, strict=False)))
        scores = log_softmax(logits)
        return scores, new_kv, new_conv[0] if new_conv else np.zeros((len(scores), 0), np.float32)


def open_engine(
    source: CTCModel | str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    from_disk: bool = False,
) -> OnnxEngine:
    """Open an export, or a model, which is exported to the cache first unless it was before.

    Args:
        dtype: auto: the export's, or the model's own scheme.
        from_disk: the model was loaded by name and has not changed since, so that its files identify it.

    Raises ModelError for an unsupported device or dtype and for a missing or damaged export, and as `export` does.
    """
    export = Path(source) if isinstance(source, str | Path) else None
    validate_device_and_dtype(ENGINES.get(FORMAT), device, dtype, export=export)
    if isinstance(source, Model):
        exported = manifest.read_artifact(export_to_cache(source, dtype, from_disk=from_disk), (FORMAT,))
    else:
        exported = manifest.read_artifact(Path(source), (FORMAT,))
        if dtype not in ("auto", exported.scheme.weights):
            raise ModelError(
                f"{source} was exported with scheme {exported.scheme.name}: omit --dtype, or export it in {dtype}"
            )
    return OnnxEngine(exported, _session(exported.folder / exported.details["graph"], threads), threads)


def open_cached_engine(
    model: CTCModel, *, device: str, dtype: str, threads: int | None, from_disk: bool
) -> OnnxEngine | None:
    """Return the engine of the model's export in the cache; None if there is none in this dtype, or it is damaged."""
    if not any((hardware.cache_folder() / "onnx").glob("*")):
        return None  # avoids hashing the weights
    if dtype == "float32" and model.scheme != FLOAT32:
        return None
    folder = cache_path(model, dtype, from_disk=from_disk)
    if not folder.is_dir():
        return None
    try:
        return open_engine(folder, threads=threads)
    except ModelError as error:
        log.warning("%s", error)
        return None


def export_to_cache(model: CTCModel, dtype: str = "auto", *, from_disk: bool = False) -> Path:
    """Return the folder of the model's export in the cache, exporting it if it is missing or damaged.

    With `dtype` int8, a float32 model is quantized with int8-dynamic first.
    """
    folder = cache_path(model, dtype, from_disk=from_disk)
    try:
        manifest.read_artifact(folder, (FORMAT,))
        return folder
    except ModelError:
        if folder.exists():
            _remove(folder)
    quantized = quantize(model, "int8-dynamic") if _needs_int8(model, dtype) else model
    log.info("exporting %s to ONNX with scheme %s into the cache", model.origin.name, quantized.scheme.name)
    with suppress(DataError):  # another process created the folder first
        exporters.export(quantized, FORMAT, folder)
    return folder


def _needs_int8(model: CTCModel, dtype: str) -> bool:
    if dtype == "float32" and model.scheme != FLOAT32:
        raise ModelError(
            f"{model.origin.name} is quantized with scheme {model.scheme.name} and has no float32 weights: omit --dtype"
        )
    return dtype == "int8" and model.scheme == FLOAT32


def cache_path(model: CTCModel, dtype: str = "auto", *, from_disk: bool = False) -> Path:
    """Return the folder of the model's export in the cache, which need not exist.

    It is named by the weights in memory; with `from_disk`, their checksum is looked up by that of the files.
    """
    adapter = getattr(model.net, "mowa_adapter", None)
    identity = manifest.loaded_model_sha256(model, adapter) if from_disk else manifest.model_sha256(model)
    versions = [
        f"{package} {hardware.installed_version(package)}"
        for package in ("mowa", "torch", "transformers", "onnxruntime")
    ]
    key = [
        identity,
        "int8" if _needs_int8(model, dtype) else "as it is",
        str(FORMAT_VERSION),
        *versions,
    ]
    key += [repr(model.vocabulary), repr(model.preprocessing), str(model.origin.target_lang)]
    return hardware.cache_folder() / "onnx" / hashlib.sha256("\n".join(key).encode()).hexdigest()[:24]


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _session(graph: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency(
            "the onnx engine needs onnxruntime: pip install onnxruntime, or use --engine pytorch"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or hardware.cpu_count()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
