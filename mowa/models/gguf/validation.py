"""Check the metadata of a GGUF file before a net is built or llama.cpp reads it, which aborts the process instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mowa.errors import ModelError

MAX_SIZE = 2**31 - 1
COUNTS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")


def validate_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise ModelError if a size of the model is no number from 1 to 2³¹ − 1, or a number is NaN or infinite.

    The other keys of the architecture may be 0. Sizes per block, which are arrays, are checked one by one.
    """
    prefix = f"{metadata.get('general.architecture')}."
    for key, value in metadata.items():
        if not key.startswith(prefix):
            continue
        name, values = key.removeprefix(prefix), np.atleast_1d(value) if _is_number(value) else None
        if values is not None and not all(math.isfinite(one) for one in values.tolist()):
            raise ModelError(f"the metadata {key} of the GGUF file is {value}, which is not finite")
        if name == "context_length" or name in COUNTS:
            least = 0 if isinstance(value, np.ndarray) else 1  # a block may have no attention
            if values is None or not all(least <= one <= MAX_SIZE for one in values.tolist()):
                raise ModelError(
                    f"the metadata {key} of the GGUF file is {value!r:.40}; it must be a number from 1 to {MAX_SIZE}"
                )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | str):
        return False
    return isinstance(value, int | float | np.number) or (isinstance(value, np.ndarray) and value.dtype.kind in "iuf")
