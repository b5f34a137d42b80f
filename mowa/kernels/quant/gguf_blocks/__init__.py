"""Encode and decode the block types of GGUF, with the bytes of ggml.

Start with `codec` (`encode`, `decode`) and `types` (`BLOCK_TYPES`). `legacy`, `kquants` and `levels` hold an encoder
per type, `search` and `refine` the least-squares searches that they share, on tensors of any device. `decoders` is the
way back.

The reference is ggml 0.20.2 on x86-64, built without fused multiply-add. Builds for other processors, or with it, round
some sums differently, and some weights that lie between two integers get the other one.
"""

from mowa.kernels.quant.gguf_blocks.codec import decode, encode
from mowa.kernels.quant.gguf_blocks.types import BLOCK_TYPES, BlockType

__all__ = ["BLOCK_TYPES", "BlockType", "decode", "encode"]
