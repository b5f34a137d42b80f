"""A name → what stands behind it, in memory: a `Model` that hears, or a `LanguageModel`. The checkpoint says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mowa.files import resolve
from mowa.loading import speech, text
from mowa.loading.checkpoint import family_of
from mowa.loading.speech import preprocessing, vocabulary
from mowa.nouns import Family

__all__ = ["load", "preprocessing", "vocabulary"]


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
    head: bool = True,
) -> Any:
    """Load a model by alias, folder or hub id, in eval mode, with no gradients, on `device` in `dtype`.

    → a `Model` of a CTC checkpoint (`speech.load` says more, also of `head`), a `LanguageModel` of a causal one.
    Raises ModelError for whatever is missing, damaged, unknown or does not fit; HubUnreachable as `files.resolve` does.
    """

    def vet(folder: Path) -> Family:
        hears = family_of(folder).task == "ctc"
        return speech.family_of(folder, head=head) if hears else text.family_of(folder)

    origin = resolve(name, revision=revision, offline=offline, vet=vet)
    if vet(origin.folder).task == "ctc":
        return speech.load(name, revision=revision, dtype=dtype, device=device, offline=offline, head=head)
    return text.load(name, revision=revision, dtype=dtype, device=device, offline=offline)
