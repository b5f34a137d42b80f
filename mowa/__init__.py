"""Transcribe speech, and fine-tune, quantize and export open pretrained speech and language models.

    import mowa

    transcript = mowa.transcribe("talk.mp3")
    for word in transcript.words:
        print(word.start_s, word.text)

Functions are imported on first use: `import mowa` alone imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mowa.engines.pytorch import open_engine
    from mowa.engines.streaming import stream
    from mowa.engines.transcription import iter_transcripts, transcribe
    from mowa.loading import load
    from mowa.training.config.dispatch import train

__version__ = "0.1.0"
__all__ = ["iter_transcripts", "load", "open_engine", "stream", "train", "transcribe"]

_MODULES = {
    "iter_transcripts": "mowa.engines.transcription",
    "load": "mowa.loading",
    "open_engine": "mowa.engines.pytorch",
    "stream": "mowa.engines.streaming",
    "train": "mowa.training.config.dispatch",
    "transcribe": "mowa.engines.transcription",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mowa' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
