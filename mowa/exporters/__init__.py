"""Models as other programs run them, each compared with the net before its folder is there."""

from mowa.exporters.manifest import is_export, read_artifact
from mowa.exporters.protocol import FORMATS, export

__all__ = ["FORMATS", "export", "is_export", "read_artifact"]
