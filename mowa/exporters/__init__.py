"""Export CTC models to other runtimes: ONNX, safetensors, Core ML, TensorRT and CTranslate2.

Start with `registry` (the formats) and `protocol` (`export`, and what an exporter has to implement). `prepare` returns
the net that exporters write, `verify` compares an export with it, and `manifest` describes the folder.
docs/add-an-exporter.md shows how to add one.
"""

from mowa.exporters.manifest import is_export, read_artifact
from mowa.exporters.protocol import export
from mowa.exporters.registry import FORMATS

__all__ = ["FORMATS", "export", "is_export", "read_artifact"]
