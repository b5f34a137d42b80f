"""Models in fewer bits, as `nouns.Scheme`s say. Names of schemes cost nothing; `shrink` needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mowa.shrink.schemes import SCHEMES, label, named

if TYPE_CHECKING:
    from mowa.shrink.make import shrink

__all__ = ["SCHEMES", "label", "named", "shrink"]


def __getattr__(name: str) -> Any:
    if name != "shrink":
        raise AttributeError(f"module 'mowa.shrink' has no attribute {name!r}")
    from mowa.shrink.make import shrink

    return shrink
