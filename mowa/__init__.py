"""mowa: take an open pretrained model, of speech or of text, and make it yours on the machine you have.

    import mowa

    transcript = mowa.transcribe("talk.mp3")
    for word in transcript.words:
        print(word.start_s, word.text)

The verbs are imported when first used, so that `import mowa` costs nothing and needs no torch.
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

_HOMES = {
    "engine": "mowa.engines.pytorch",
    "load": "mowa.loading",
    "stream": "mowa.engines.streaming",
    "transcribe": "mowa.engines.transcription",
    "transcripts": "mowa.engines.transcription",
    "tune": "mowa.training.config.dispatch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mowa' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found  # also where a submodule of the same name was imported first
    return found
