"""Run an exported CTC net in CTranslate2.

CTranslate2 takes no attention mask for these nets, so only clips of equal length share a batch, and none in int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mowa import hardware
from mowa.engines.protocol import ArtifactEngine, BatchPolicy, log_softmax
from mowa.engines.registry import ENGINES, validate_device_and_dtype
from mowa.errors import ModelError
from mowa.exporters import ctranslate2 as exporter
from mowa.exporters import manifest
from mowa.exporters.protocol import require_packages
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.types import Artifact

FORMAT = "ctranslate2"


@dataclass(frozen=True)
class CTranslate2Engine(ArtifactEngine):
    """A loaded export. Create it with `open_engine`."""

    runtime_model: Any  # a ctranslate2.models.Wav2Vec2

    @property
    def name(self) -> str:
        return FORMAT

    @property
    def dtype(self) -> str:
        return _dtype(self.artifact)

    @property
    def batch_policy(self) -> BatchPolicy:
        return BatchPolicy.EQUAL_LENGTH if self.dtype == "float32" else BatchPolicy.SINGLE

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Engine.emissions`. Raises ValueError for clips that cannot share a batch."""
        lengths = [len(clip) for clip in clips]
        if min(lengths) != max(lengths):
            raise ValueError(f"clips of different lengths {lengths} cannot share a batch in CTranslate2")
        logits = log_softmax(exporter.run(self.runtime_model, clips))
        return [row[: frame_geometry(self.config).num_frames(lengths[0])] for row in logits]


def open_engine(
    folder: str | Path, *, device: str = "auto", dtype: str = "auto", threads: int | None = None
) -> CTranslate2Engine:
    """Open the export in `folder`. Its dtype is fixed: `dtype` must be "auto" or that one.

    Raises ModelError for another device or dtype and for a missing or damaged export; MissingDependency without
    CTranslate2.
    """
    validate_device_and_dtype(ENGINES.get(FORMAT), device, dtype, export=Path(folder))
    exported = manifest.read_artifact(Path(folder), (FORMAT,))
    available = _dtype(exported)
    if dtype not in ("auto", available):
        raise ModelError(f"{folder} was exported for {available}: omit --dtype, or export the model for {dtype}")
    require_packages(FORMAT)
    model = exporter.open_model(
        exported.folder / exported.details["model"], exported.scheme, threads or hardware.cpu_count()
    )
    return CTranslate2Engine(exported, model)


def _dtype(exported: Artifact) -> str:
    """Return the compute dtype; half-precision weights are multiplied in float32."""
    return "int8" if exported.scheme.weights == "int8" else "float32"
