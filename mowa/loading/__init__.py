"""A name → what stands behind it, in memory: a `Model` that hears, or a `LanguageModel`. The checkpoint says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mowa.io.hub import resolve_model
from mowa.loading import causal, ctc
from mowa.loading.checkpoint import read_family
from mowa.loading.ctc import read_preprocessing, read_vocabulary
from mowa.types import Family

__all__ = ["load", "read_preprocessing", "read_vocabulary"]


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
    require_head: bool = True,
) -> Any:
    """Load a model by alias, folder or hub id, in eval mode, with no gradients, on `device` in `dtype`.

    → a `Model` of a CTC checkpoint (`speech.load` says more, also of `head`), a `LanguageModel` of a causal one.
    Raises ModelError for whatever is missing, damaged, unknown or does not fit; HubUnreachable as `files.resolve` does.
    """

    def vet(folder: Path) -> Family:
        hears = read_family(folder).task == "ctc"
        return ctc.read_ctc_family(folder, require_head=require_head) if hears else causal.read_causal_family(folder)

    origin = resolve_model(name, revision=revision, offline=offline, validate=vet)
    if vet(origin.folder).task == "ctc":
        return ctc.load(name, revision=revision, dtype=dtype, device=device, offline=offline, require_head=require_head)
    return causal.load(name, revision=revision, dtype=dtype, device=device, offline=offline)
