"""Tokenizers in GGUF: from transformers to metadata, and from metadata to token ids as llama.cpp makes them.

`convert_tokenizer` derives the metadata from a tokenizer's own rules and proves it by token ids; `GGUFTokenizer` is the
other side of the proof and tokenizes without llama.cpp and transformers. `kinds` shows how each kind of tokenizer is
converted, `pre_tokenizers` which regular expressions llama.cpp knows, `battery` what both sides are tried on.
"""

from mowa.exporters.gguf.tokenizer.conversion import ConvertedTokenizer, convert_tokenizer, tokenizer_metadata
from mowa.exporters.gguf.tokenizer.gguf_tokenizer import GGUFTokenizer
from mowa.exporters.gguf.tokenizer.token_ids import Difference, TokenIdReport, compare_token_ids

__all__ = [
    "ConvertedTokenizer",
    "Difference",
    "GGUFTokenizer",
    "TokenIdReport",
    "compare_token_ids",
    "convert_tokenizer",
    "tokenizer_metadata",
]
