"""Every verb of mowa as a typed function: `load`, `transcribe`, `stream`, `generate`, `train`, `distill`, `merge`,
`quantize`, `export`, `evaluate`, `bench`.

The command line and Python programs call these; `mowa` re-exports them lazily. Each is a few lines over the packages
below: start with the file of the verb (`speech`, `text`, `training`, `artifacts`, `measuring`).
"""

from mowa.api.artifacts import export, merge, quantize
from mowa.api.measuring import bench, evaluate
from mowa.api.models import accelerate, load, restore
from mowa.api.speech import stream, transcribe
from mowa.api.text import generate
from mowa.api.training import Run, distill, train

__all__ = [
    "Run",
    "accelerate",
    "bench",
    "distill",
    "evaluate",
    "export",
    "generate",
    "load",
    "merge",
    "quantize",
    "restore",
    "stream",
    "train",
    "transcribe",
]
