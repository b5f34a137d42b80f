"""A CTC net in CTranslate2, over a folder that `mowa.exporters` wrote.

It knows arrays and lengths; it refuses to know files, windows and words. CTranslate2 takes no mask for these nets, so
only recordings of one length share a batch, and none in int8 (`engines.protocol`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mowa import hardware
from mowa.engines.artifact import ArtifactEngine, log_softmax
from mowa.engines.protocol import BatchPolicy, num_frames
from mowa.errors import ModelError
from mowa.exporters import ctranslate2 as exporting
from mowa.exporters import manifest
from mowa.types import Artifact

KIND = "ctranslate2"
DTYPES = ("auto", "float32", "int8")


@dataclass(frozen=True)
class CTranslate2Engine(ArtifactEngine):
    """A loaded export. Make one with `engine`."""

    runtime_model: Any  # a ctranslate2.models.Wav2Vec2

    @property
    def name(self) -> str:
        return KIND

    @property
    def dtype(self) -> str:
        return _dtype(self.artifact)

    @property
    def batch_policy(self) -> BatchPolicy:
        return BatchPolicy.EQUAL_LENGTH if self.dtype == "float32" else BatchPolicy.SINGLE

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Engine.emissions`. ValueError for clips that may not share a batch."""
        lengths = [len(clip) for clip in clips]
        if min(lengths) != max(lengths):
            raise ValueError(f"clips of different lengths {lengths} may not share a batch of this net")
        logits = log_softmax(exporting.run(self.runtime_model, clips))
        return [row[: num_frames(self.config, lengths[0])] for row in logits]


def open_engine(folder: str | Path, dtype: str = "auto", threads: int | None = None) -> CTranslate2Engine:
    """The export in `folder`. "auto" is what it computes in, and nothing else can be had.

    Raises ModelError: an unknown dtype, or another than the folder's; no or a damaged export; MissingPart.
    """
    exported = manifest.read_artifact(Path(folder), (KIND,))
    found = _dtype(exported)
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)} with CTranslate2")
    if dtype not in ("auto", found):
        raise ModelError(f"{folder} computes in {found}: leave --dtype out, or export the model in {dtype}")
    exporting.require_packages()
    where = exported.folder / exported.details["model"]
    return CTranslate2Engine(exported, exporting.open_model(where, exported.scheme, threads or hardware.cpu_count()))


def _dtype(exported: Artifact) -> str:
    """Half precision is multiplied in float32."""
    return "int8" if exported.scheme.weights == "int8" else "float32"
