"""Define the interface of an engine and how clips are batched for it.

An engine turns clips into log-probabilities; `BatchPolicy` says which clips may share a batch without changing results:

PADDED        layer-norm front ends in float32. The attention mask keeps padding out of every sum, so a padded batch
              gives what each clip gives alone, to 1e-5. Engines that concatenate clips without padding use it for all
              float32 nets.
EQUAL_LENGTH  group-norm front ends normalize over time, padding included; only clips of equal length share a batch.
SINGLE        half precision and int8 on a CPU. Matrix products of another shape round differently, which may change a
              token, and a CPU gains little from batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mowa.decode.stream import LogProbs
from mowa.decode.stream_state import Samples
from mowa.types import Artifact, Origin, Preprocessing, Vocabulary

if TYPE_CHECKING:
    from mowa.models.ctc_encoder.streaming import CacheShape


FloatArray = NDArray[np.float32]


class BatchPolicy(Enum):
    PADDED = "padded"
    EQUAL_LENGTH = "equal"
    SINGLE = "alone"


class Engine(Protocol):
    """A loaded speech recognizer. `config` is the transformers config of its net."""

    @property
    def name(self) -> str:
        """The name in `registry.ENGINES`."""

    @property
    def origin(self) -> Origin: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def config(self) -> Any: ...

    @property
    def batch_policy(self) -> BatchPolicy: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str:
        """float32, bfloat16, float16 or int8: the dtype of most matrix products."""

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the log-probabilities of one batch: clips float32 [n_i], normalized → float32 [T_i, V] each.

        T_i is the number of frames of clip i alone; frames of padding are not returned.
        """


class ChunkStep(Protocol):
    """Encodes one chunk, as `models.ctc_encoder.streaming.encode_chunk` does, on arrays."""

    cache_shape: CacheShape

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]: ...


class SteppingEngine(Engine, Protocol):
    """An engine with the capability `step`: cached streaming."""

    def chunk_step(self) -> ChunkStep | None:
        """Return the function that encodes one chunk; None if there is none for this net."""


@dataclass(frozen=True)
class ArtifactEngine:
    """The part of an engine that every export has in common, read from its manifest."""

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


def batch_by_length(lengths: Sequence[int], max_padded_samples: int, policy: BatchPolicy) -> list[list[int]]:
    """Group clips into batches, shortest first, with clips × longest clip ≤ `max_padded_samples`.

    Return the indices of the clips in each batch. A clip longer than that is a batch of its own.
    """
    grouped: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        last = grouped[-1] if grouped else []
        fits = bool(last) and lengths[index] * (len(last) + 1) <= max_padded_samples
        alike = bool(last) and lengths[index] == lengths[last[0]]
        if fits and (policy is BatchPolicy.PADDED or (policy is BatchPolicy.EQUAL_LENGTH and alike)):
            last.append(index)
        else:
            grouped.append([index])
    return grouped
