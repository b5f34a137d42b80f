"""Minimal checkpoints for tests of mowa.io, which reads only file names, configs and tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def write_checkpoint(folder: Path, *, safetensors: bool = True, pickled: bool = False, size: int = 63) -> Path:
    """Write a minimal checkpoint of one tensor with `size` elements, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    (folder / "vocab.json").write_text('{"<pad>": 0, "a": 1}')
    (folder / "README.md").write_text("---\nlanguage: pl\nlicense: apache-2.0\n---\n# A model\nlicense: none of it\n")
    (folder / "flax_model.msgpack").write_bytes(b"never wanted")
    tensors = {"lm_head.weight": torch.arange(float(size))}
    if safetensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder
