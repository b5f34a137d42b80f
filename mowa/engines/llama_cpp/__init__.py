"""Run GGUF files in llama.cpp, in this process: generate text, and score given tokens.

Start with `open_model`; `generate` and `stream_text` answer prompts as `engines.generation` does in PyTorch, and
`score` returns log-probabilities of given tokens. `runtimes` are the packages that hold llama.cpp.
"""

from mowa.engines.llama_cpp.model import LlamaCppModel, open_model, score
from mowa.engines.llama_cpp.runtimes import find_runtime
from mowa.engines.llama_cpp.text import generate, stream_text

__all__ = ["LlamaCppModel", "find_runtime", "generate", "open_model", "score", "stream_text"]
