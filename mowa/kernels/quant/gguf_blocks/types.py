"""The block types of GGUF: how many weights share a block, and how many bytes it takes."""

from __future__ import annotations

from dataclasses import dataclass

from mowa.errors import ModelError


@dataclass(frozen=True)
class BlockType:
    """A GGUF tensor type.

    Args:
        name: llama.cpp's, in lower case.
        type_id: number of the type in a GGUF file.
        block_size: weights per block; a row holds a whole number of blocks.
        block_bytes: bytes per block.
        half_offsets: byte offsets of the float16 numbers in a block. A block with an infinite one is not valid.
    """

    name: str
    type_id: int
    block_size: int
    block_bytes: int
    half_offsets: tuple[int, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of `columns` weights. Raises ModelError if it is not a whole number of blocks."""
        if columns % self.block_size:
            raise ModelError(
                f"{self.name} has blocks of {self.block_size} weights, and rows of {columns} are not a multiple of "
                "that; choose q8_0 or q5_0 for multiples of 32, f16 for any other row"
            )
        return columns // self.block_size * self.block_bytes


BLOCK_TYPES = {
    one.name: one
    for one in (
        BlockType("f32", 0, 1, 4),
        BlockType("f16", 1, 1, 2, (0,)),
        BlockType("q4_0", 2, 32, 18, (0,)),
        BlockType("q4_1", 3, 32, 20, (0, 2)),
        BlockType("q5_0", 6, 32, 22, (0,)),
        BlockType("q5_1", 7, 32, 24, (0, 2)),
        BlockType("q8_0", 8, 32, 34, (0,)),
        BlockType("q2_k", 10, 256, 84, (80, 82)),
        BlockType("q3_k", 11, 256, 110, (108,)),
        BlockType("q4_k", 12, 256, 144, (0, 2)),
        BlockType("q5_k", 13, 256, 176, (0, 2)),
        BlockType("q6_k", 14, 256, 210, (208,)),
        BlockType("iq4_nl", 20, 32, 18, (0,)),
        BlockType("iq4_xs", 23, 256, 136, (0,)),
        BlockType("bf16", 30, 1, 2),
        BlockType("mxfp4", 39, 32, 17),
    )
}


def get_block_type(name: str) -> BlockType:
    """Return the type called `name`. Raises ModelError with the known names."""
    if name not in BLOCK_TYPES:
        raise ModelError(f"{name!r} is not a GGUF type that mowa encodes; choose one of {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[name]
