"""The part of an engine that every export has in common, read from its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mowa.types import Artifact, Origin, Preprocessing, Vocabulary


@dataclass(frozen=True)
class ArtifactEngine:
    """Properties of `protocol.Engine` that an artifact provides."""

    artifact: Artifact

    @property
    def origin(self) -> Origin:
        return self.artifact.origin

    @property
    def vocabulary(self) -> Vocabulary:
        return self.artifact.vocabulary

    @property
    def preprocessing(self) -> Preprocessing:
        return self.artifact.preprocessing

    @property
    def config(self) -> Any:
        return self.artifact.config

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def scheme(self) -> str:
        return self.artifact.scheme.name


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the log-softmax of float32 [..., V] over the last axis, in place."""
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits
