"""Quantize a model's weights: to float16, bfloat16, int8, int4, nf4, or a mix within a size budget.

Start with `schemes` (names and properties of all schemes) and `ptq` (`quantize`, post-training quantization). `linears`
lists the layers that are quantized and estimates sizes; `calibration` records their inputs; `mixed_precision`
distributes a size budget; `qat` trains with rounded weights; `formats` reads and writes the tensors of
compressed-tensors and bitsandbytes. Importing this package does not import torch.
"""

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
