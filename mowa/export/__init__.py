"""Models as other programs run them, each compared with the net before its folder is there."""

from mowa.export.onnx import Exported, export, read

__all__ = ["Exported", "export", "read"]
