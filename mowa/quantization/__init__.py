"""Models in fewer bits, as `nouns.Scheme`s say. Names of schemes cost nothing; `shrink` needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mowa.quantization.schemes import SCHEMES, format_scheme, parse_scheme

if TYPE_CHECKING:
    from mowa.quantization.ptq import quantize

__all__ = ["SCHEMES", "format_scheme", "parse_scheme", "quantize"]


def __getattr__(name: str) -> Any:
    if name != "quantize":
        raise AttributeError(f"module 'mowa.quantization' has no attribute {name!r}")
    from mowa.quantization.ptq import quantize

    return quantize
