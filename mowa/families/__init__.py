"""The architectures, one file each. Importing this package registers them all; it imports no torch."""

from mowa.families import hubert, wav2vec2, wavlm
from mowa.families.registry import families, find, model_types, names, register

__all__ = ["families", "find", "hubert", "model_types", "names", "register", "wav2vec2", "wavlm"]
