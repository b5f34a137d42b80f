"""Read and write GGUF, the file format of llama.cpp: typed metadata and tensors, aligned for memory maps.

Start with `read_gguf` and `open_writer`. `types` holds the tensor types and their block sizes. Files are little-endian,
versions 2 and 3; nothing but numpy is needed.

Source: the specification, docs/gguf.md of ggml (MIT).
"""

from mowa.io.gguf.reader import GGUFFile, read_gguf
from mowa.io.gguf.types import TENSOR_TYPES, TensorInfo, TensorType
from mowa.io.gguf.writer import GGUFWriter, open_writer

__all__ = ["TENSOR_TYPES", "GGUFFile", "GGUFWriter", "TensorInfo", "TensorType", "open_writer", "read_gguf"]
