"""State dicts whose tensors are loaded one at a time: of a net in memory, and of a checkpoint on disk.

transformers keeps the experts of a block in one tensor, and writes them one by one; names are those in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mowa.errors import ModelError
from mowa.io.weights import ensure_safetensors, safetensors_header, weight_files

_EXPERT = re.compile(r"(?P<prefix>.*\.experts)\.(?P<index>\d+)\.(?P<linear>gate_proj|up_proj|down_proj|w[123])\.weight")
_LINEARS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # of Mixtral
# model type → parts of names on disk and what they are in memory
_RENAMED = {
    "mixtral": {".block_sparse_moe.": ".mlp."},
    "granitemoe": {
        ".block_sparse_moe.input_linear.weight": ".block_sparse_moe.experts.gate_up_proj",
        ".block_sparse_moe.output_linear.weight": ".block_sparse_moe.experts.down_proj",
        ".block_sparse_moe.router.layer.weight": ".block_sparse_moe.router.weight",
    },
}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is computed when it is needed, and its shape."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def net_state(net: Any) -> dict[str, LazyTensor]:
    """Return the state dict of a net in memory; loading a tensor copies nothing."""
    return {
        name: LazyTensor(tuple(tensor.shape), partial(_identity, tensor.detach()))
        for name, tensor in net.state_dict().items()
    }


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def checkpoint_state(folder: Path, model_type: str) -> dict[str, LazyTensor]:
    """Return the state dict of the checkpoint in `folder`, with the names that transformers has in memory.

    Loading a tensor reads it from disk without a memory map, whose pages would stay in memory.

    Raises ModelError if weights are missing, damaged or not floats.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, LazyTensor] = {}
    for file in weight_files(ensure_safetensors(folder)):
        try:
            with safe_open(file, "pt"):  # checks offsets and sizes
                header = safetensors_header(file)
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged: {error}") from error
        with file.open("rb") as opened:
            data_offset = 8 + int.from_bytes(opened.read(8), "little")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise ModelError(f"{name} in {file} is {entry['dtype']}: weights must be {', '.join(_DTYPES)}")
            shape, start = tuple(entry["shape"]), data_offset + entry["data_offsets"][0]
            load = partial(_read, file, start, shape, _DTYPES[entry["dtype"]])
            found[_rename(name, model_type)] = LazyTensor(shape, load)
    return _join_experts(found)


def _read(file: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    with file.open("rb") as opened:
        opened.seek(start)
        opened.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


def _rename(name: str, model_type: str) -> str:
    for old, new in _RENAMED.get(model_type, {}).items():
        name = name.replace(old, new)
    return name


def _join_experts(state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Replace the linear layers of single experts by stacked ones: gate_up_proj [E, 2F, H] and down_proj [E, H, F]."""
    joined: dict[str, LazyTensor] = {}
    experts: dict[str, dict[str, dict[int, LazyTensor]]] = {}
    for name, tensor in state.items():
        if match := _EXPERT.fullmatch(name):
            linear = _LINEARS.get(match["linear"], match["linear"])
            experts.setdefault(match["prefix"], {}).setdefault(linear, {})[int(match["index"])] = tensor
        else:
            joined[name] = tensor
    for prefix, linears in experts.items():
        down, gate, up = ([linears[name][index] for index in sorted(linears[name])] for name in _STACKED)
        (out, size), count = down[0].shape, len(down)
        joined[f"{prefix}.down_proj"] = LazyTensor((count, out, size), partial(_stack, [down]))
        joined[f"{prefix}.gate_up_proj"] = LazyTensor((count, 2 * size, out), partial(_stack, [gate, up]))
    return joined


_STACKED = ("down_proj", "gate_proj", "up_proj")


def _stack(parts: Sequence[Sequence[LazyTensor]]) -> Tensor:
    """Return [E, rows of all parts, columns], read expert by expert."""
    rows, columns = sum(part[0].shape[0] for part in parts), parts[0][0].shape[1]
    result: Tensor | None = None
    for index in range(len(parts[0])):
        expert = torch.cat([part[index].load() for part in parts])
        if result is None:
            result = torch.empty(len(parts[0]), rows, columns, dtype=expert.dtype)
        result[index] = expert
    assert result is not None
    return result
