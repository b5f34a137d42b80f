"""Turn an importance matrix into the weights of squared errors, as llama.cpp does (ggml-quants.c, MIT licence).

Importance q is the mean square of the inputs that meet a column. The error of weight x counts q √(f · mean x² + x²),
where the mean is over the block, or over the row for types with one scale per 32 weights. For q6_k it counts q.
"""

from __future__ import annotations

from torch import Tensor

from mowa.kernels.quant.gguf_blocks.reductions import ordered_sum
from mowa.kernels.quant.gguf_blocks.rounding import divide, square_root

UNWEIGHTED = ("f32", "f16", "bf16", "q8_0", "mxfp4")
MEAN_OVER_ROW = ("q4_0", "q4_1", "q5_0", "q5_1")
FACTORS = {"q3_k": 2, "q4_k": 2, "q5_k": 2, "iq4_nl": 2, "iq4_xs": 2}


def error_weights(x: Tensor, importance: Tensor, type_name: str, block_size: int) -> Tensor:
    """Return weights, float32 [R, K], for x [R, K] and importance [K]. Types in MEAN_OVER_ROW need the whole row."""
    if type_name == "q6_k":
        return importance.expand(x.shape)
    span = x.shape[1] if type_name in MEAN_OVER_ROW else block_size
    squares = (x * x).view(-1, span)
    total = ordered_sum(squares.T.contiguous()).mul_(FACTORS.get(type_name, 1))
    return square_root(squares.add_(divide(total, span)[:, None])).view(x.shape).mul_(importance)
