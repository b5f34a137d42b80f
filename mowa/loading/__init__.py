"""Load a checkpoint by name into memory: a `Model` (CTC) or a `LanguageModel` (causal), as its config says.

Start with `load`. `ctc` and `causal` load the two kinds, `checkpoint` holds what they share, and `quantized` rebuilds
quantized linear layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mowa.io.hub import resolve_model
from mowa.loading import causal, ctc
from mowa.loading.checkpoint import read_family
from mowa.types import Family

__all__ = ["load"]


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
    require_head: bool = True,
) -> Any:
    """Load a model by alias, folder or Hub id onto `device` in `dtype`, in eval mode and without gradients.

    Returns a `Model` for a CTC checkpoint (see `ctc.load`, also for `require_head`) and a `LanguageModel` for a causal
    one. Raises ModelError if the checkpoint is incomplete, damaged or unsupported, and as `resolve_model`.
    """

    def validate(folder: Path) -> Family:
        if read_family(folder, name).task == "ctc":
            return ctc.read_ctc_family(folder, name, require_head=require_head)
        return causal.read_causal_family(folder, name)

    origin = resolve_model(name, revision=revision, offline=offline, validate=validate)
    if validate(origin.folder).task == "ctc":
        return ctc.load(name, revision=revision, dtype=dtype, device=device, offline=offline, require_head=require_head)
    return causal.load(name, revision=revision, dtype=dtype, device=device, offline=offline)
