"""Encode tensors as GGUF blocks, and decode them, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mowa.errors import DataError, ModelError
from mowa.kernels.quant.gguf_blocks import decoders, kquants, legacy, levels
from mowa.kernels.quant.gguf_blocks.importance import MEAN_OVER_ROW, UNWEIGHTED, error_weights
from mowa.kernels.quant.gguf_blocks.types import BlockType, get_block_type

SLICE = 262_144  # weights encoded at once on the CPU: 16 MB of scratch memory
SLICE_ON_GPU = 64 * SLICE
KEPT_BYTES = 24 * 2**20

Part = tuple[slice, slice]  # rows and columns

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ENCODERS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "q4_0": legacy.encode_q4_0,
    "q4_1": legacy.encode_q4_1,
    "q5_0": legacy.encode_q5_0,
    "q5_1": legacy.encode_q5_1,
    "q8_0": legacy.encode_q8_0,
    "q2_k": kquants.encode_q2_k,
    "q3_k": kquants.encode_q3_k,
    "q4_k": kquants.encode_q4_k,
    "q5_k": kquants.encode_q5_k,
    "q6_k": kquants.encode_q6_k,
    "iq4_nl": levels.encode_iq4_nl,
    "iq4_xs": levels.encode_iq4_xs,
    "mxfp4": levels.encode_mxfp4,
}
DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": decoders.decode_q4_0,
    "q4_1": decoders.decode_q4_1,
    "q5_0": decoders.decode_q5_0,
    "q5_1": decoders.decode_q5_1,
    "q8_0": decoders.decode_q8_0,
    "q2_k": decoders.decode_q2_k,
    "q3_k": decoders.decode_q3_k,
    "q4_k": decoders.decode_q4_k,
    "q5_k": decoders.decode_q5_k,
    "q6_k": decoders.decode_q6_k,
    "iq4_nl": decoders.decode_iq4_nl,
    "iq4_xs": decoders.decode_iq4_xs,
    "mxfp4": decoders.decode_mxfp4,
}


def encode(weight: Tensor, type_name: str, importance: Tensor | None = None, *, threads: int = 1) -> Tensor:
    """Encode weights as ggml does on x86-64, to the byte.

    Args:
        weight: [..., K], any float dtype; K a multiple of the type's block.
        type_name: a key of `BLOCK_TYPES`.
        importance: [K] ≥ 0, mean square of the inputs of each column, from an importance matrix. f32, f16, bf16, q8_0
            and mxfp4 do not use it.
        threads: slices encoded at the same time, each with its own scratch memory of about 16 MB.

    Returns:
        uint8 [..., bytes of a row], on the device of `weight`.

    Raises:
        ModelError: K is not a multiple of the block; a weight is NaN or infinite, or so large that a block's float16
            scale would be.
        DataError: `importance` does not fit.
    """
    block_type = get_block_type(type_name)
    if not weight.is_floating_point() or not weight.ndim:
        raise ModelError(f"{type_name} encodes rows of floating-point weights, not {weight.dtype} {[*weight.shape]}")
    rows = weight.detach()[None] if weight.ndim == 1 else weight.detach().flatten(0, -2)
    blocks = rows.new_empty(len(rows), block_type.row_bytes(rows.shape[1]), dtype=torch.uint8)
    importance = None if block_type.name in UNWEIGHTED else _check_importance(importance, rows)
    if rows.device.type == "cpu":
        _keep_freed_memory()

    def encode_slice(part: Part) -> None:
        x = rows[part].float()
        _check_finite(x, type_name, part, rows.shape)
        encoded = encode_blocks(x, block_type, None if importance is None else importance[part[1]])
        _check_scales(x, encoded, block_type, part, rows.shape)
        start = part[1].start // block_type.block_size * block_type.block_bytes
        blocks[part[0], start : start + encoded.shape[1]] = encoded

    whole_rows = importance is not None and block_type.name in MEAN_OVER_ROW
    parts = _slices(rows, SLICE if rows.device.type == "cpu" else SLICE_ON_GPU, whole_rows=whole_rows)
    if threads == 1:
        for part in parts:
            encode_slice(part)
    else:
        _run_in_threads(encode_slice, parts, threads)
    return blocks.view(*weight.shape[:-1], blocks.shape[1])


def encode_blocks(x: Tensor, block_type: BlockType, importance: Tensor | None = None) -> Tensor:
    """Encode x, float32 [R, K], at once and without checks → uint8 [R, bytes]. NaN and infinity give any bytes."""
    if block_type.name in PLAIN:
        return x.to(PLAIN[block_type.name]).contiguous().view(torch.uint8)
    size = block_type.block_size
    with np.errstate(over="ignore", invalid="ignore"):  # weights near 1e20, whose squares overflow
        weights = None if importance is None else error_weights(x, importance, block_type.name, size).reshape(-1, size)
        return ENCODERS[block_type.name](x.reshape(-1, size), weights).view(len(x), -1)


def decode(blocks: Tensor, type_name: str) -> Tensor:
    """Decode blocks as ggml does, to the bit.

    Args:
        blocks: uint8 [..., bytes of a row].
        type_name: a key of `BLOCK_TYPES`.

    Returns:
        float32 [..., K].

    Raises:
        ModelError: the rows are not whole numbers of blocks.
    """
    block_type = get_block_type(type_name)
    if blocks.dtype is not torch.uint8 or not blocks.ndim or blocks.shape[-1] % block_type.block_bytes:
        raise ModelError(
            f"{type_name} decodes rows of uint8, {block_type.block_bytes} bytes for each block, not {blocks.dtype} "
            f"{[*blocks.shape]}"
        )
    if type_name in PLAIN:
        return blocks.contiguous().view(PLAIN[type_name]).float()
    flat = blocks.reshape(-1, block_type.block_bytes)
    weights = torch.empty(len(flat), block_type.block_size, device=blocks.device)
    step = (SLICE if blocks.device.type == "cpu" else SLICE_ON_GPU) // block_type.block_size
    for first in range(0, len(flat), step):
        weights[first : first + step] = DECODERS[type_name](flat[first : first + step])
    return weights.view(*blocks.shape[:-1], blocks.shape[-1] // block_type.block_bytes * block_type.block_size)


def _run_in_threads(encode_slice: Callable[[Part], None], parts: Iterator[Part], threads: int) -> None:
    """Run slices in a pool; each of its threads keeps torch to itself, or their teams would compete for the cores."""
    torch_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "encode", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(encode_slice, parts):  # raises what the first slice that failed raised
                pass
    finally:
        torch.set_num_threads(torch_threads)  # what the pool's threads set is the default of new ones


def _slices(x: Tensor, size: int, *, whole_rows: bool) -> Iterator[Part]:
    """Cut [R, K] into parts of about `size` weights: whole rows, or stretches of one where it is longer."""
    rows, columns = x.shape
    width = max(1, columns if whole_rows else min(columns, size))
    height = max(1, size // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, min(row + height, rows)), slice(column, min(column + width, columns))


def _check_importance(importance: Tensor | None, rows: Tensor) -> Tensor | None:
    if importance is None:
        return None
    columns = rows.shape[1]
    if importance.shape != (columns,):
        raise DataError(f"importance has shape {[*importance.shape]}, and the weights have {columns} columns")
    wrong = (~(importance >= 0) | importance.isinf()).nonzero()
    if len(wrong):
        column = int(wrong[0])
        raise DataError(f"importance must be finite and not negative; column {column} is {float(importance[column])}")
    return importance.to(rows.device, torch.float32)


def _check_finite(x: Tensor, name: str, part: Part, shape: torch.Size) -> None:
    """Raise ModelError with the place of the first weight that is NaN or infinite."""
    if x.sum().isfinite():
        return
    wrong = (~x.isfinite()).nonzero()
    if len(wrong):  # otherwise only the sum is beyond float32
        row, column = wrong[0].tolist()
        raise ModelError(
            f"{name} cannot store {float(x[row, column])}: row {part[0].start + row}, column "
            f"{part[1].start + column} of weights {[*shape]}; the checkpoint is damaged, or its training diverged"
        )


def _check_scales(x: Tensor, encoded: Tensor, block_type: BlockType, part: Part, shape: torch.Size) -> None:
    """Raise ModelError with the row if a float16 (or, of bf16, a bfloat16) became infinite or NaN."""
    if block_type.name == "bf16":
        infinite = ~encoded.view(torch.bfloat16).isfinite()
    else:
        high_bytes = [one + 1 for one in block_type.half_offsets]
        infinite = (encoded.unflatten(1, (-1, block_type.block_bytes))[..., high_bytes] & 0x7C == 0x7C).flatten(1)
    if infinite.any():
        row = int(infinite.any(1).nonzero()[0])
        raise ModelError(
            f"{block_type.name} cannot store row {part[0].start + row} of weights {[*shape]}: its largest weight is "
            f"{float(x[row].abs().max()):.3g}, and float16 scales end at 65504; keep this tensor in f32"
        )


def _keep_freed_memory() -> None:
    """Let glibc keep freed buffers: without this each operation's result is mapped and cleared anew, at twice the time.

    It keeps blocks up to the size of the largest mapped one that was freed; this one is never touched.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)
