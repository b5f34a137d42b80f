"""Interpret a Core ML program on disk with torch, operator by operator, as Apple's MIL specification defines them.

Operators compute in float32, or in float64 to tell an error of the program from rounding. Outputs that are float16 in
the program are rounded to it. Results on a device differ by its own rounding. Only the operators of speech models are
implemented (`OPERATORS`).

Source: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

DTYPES = {
    "fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool, "int8": torch.int8, "uint8": torch.uint8,
    "int16": torch.int16, "uint16": torch.int32, "int32": torch.int32, "int64": torch.int64,
    "int4": torch.int8, "uint4": torch.uint8,
}  # fmt: skip


class UnsupportedOperator(Exception):
    """The program has an operator, or an attribute of one, that is not implemented."""


def open_program(package: Path) -> Any:
    """Load the main function of an mlprogram with its weights."""
    ct = import_module("coremltools")
    load = import_module("coremltools.converters.mil.frontend.milproto.load").load
    spec = ct.utils.load_spec(str(package))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    return load(spec, spec.specificationVersion, str(weights)).functions["main"]


def run_program(
    program: Any, inputs: Mapping[str, Tensor], compute_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Run a program on inputs by name, ignoring those that it does not have, and return its outputs by name.

    `compute_dtype`: what operators compute in, and what values are kept in that are float32 in the program.

    Raises UnsupportedOperator.
    """
    dtypes = DTYPES | {"fp32": compute_dtype}
    if unsupported := sorted({op.op_type for op in program.operations} - {*OPERATORS, "const"}):
        raise UnsupportedOperator(", ".join(unsupported))
    values: dict[Any, Tensor] = {var: inputs[name].to(dtypes[_dtype(var)]) for name, var in program.inputs.items()}
    uses = Counter(var for op in program.operations for var in _operands(op))
    uses.update(program.outputs)
    for op in program.operations:
        if op.op_type == "const":
            continue
        result = OPERATORS[op.op_type](_Operands(op, values, compute_dtype))
        for var, value in zip(op.outputs, result if isinstance(result, tuple | list) else (result,), strict=True):
            values[var] = value.to(dtypes[_dtype(var)])
        for var in _operands(op):
            uses[var] -= 1
            if not uses[var]:
                values.pop(var, None)  # else all states of a large net for 20 s would take gigabytes
    return {var.name: values[var] for var in program.outputs}


def _operands(op: Any) -> list[Any]:
    return [var for given in op.inputs.values() for var in (given if isinstance(given, list | tuple) else [given])]


def _dtype(var: Any) -> str:
    types = import_module("coremltools.converters.mil.mil").types
    name: str = types.builtin_to_string(var.dtype)
    return name


class _Operands:
    """Operands of an operator by name: as tensors, with floats in `compute_dtype`, or as Python values."""

    def __init__(self, op: Any, values: Mapping[Any, Tensor], compute_dtype: torch.dtype) -> None:
        self.op, self._values, self.compute_dtype = op, values, compute_dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._tensor(self.op.inputs[name])

    def get(self, name: str, default: Any = None) -> Any:
        var = self.op.inputs.get(name)
        return default if var is None else self._tensor(var)

    def all(self, name: str) -> list[Tensor]:
        return [self._tensor(var) for var in self.op.inputs[name]]

    def value(self, name: str, default: Any = None) -> Any:
        var = self.op.inputs.get(name)
        if var is None:
            return default
        value = self._values[var].numpy() if var in self._values else var.val
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

    def _tensor(self, var: Any) -> Tensor:
        if var in self._values:
            value = self._values[var]
            return value.to(self.compute_dtype) if value.is_floating_point() else value
        name = _dtype(var)
        dtype = self.compute_dtype if name.startswith("fp") else torch.bool if name == "bool" else torch.int64
        return torch.as_tensor(np.array(var.val)).to(dtype)


def _conv(op: _Operands) -> Tensor:
    x, weight = op["x"], op["weight"]
    dims, pad_type = x.ndim - 2, op.value("pad_type", "valid")
    pad = op.value("pad", [0] * 2 * dims) if pad_type == "custom" else [0] * 2 * dims
    if pad_type not in ("valid", "custom"):
        raise UnsupportedOperator(f"conv with pad_type {pad_type}")
    torch_pad = [size for axis in reversed(range(dims)) for size in pad[2 * axis : 2 * axis + 2]]
    settings = (op.value("strides", [1] * dims), 0, op.value("dilations", [1] * dims), op.value("groups", 1))
    function = functional.conv1d if dims == 1 else functional.conv2d
    output: Tensor = function(functional.pad(x, torch_pad), weight, op.get("bias"), *settings)
    return output


def _layer_norm(op: _Operands) -> Tensor:
    x = op["x"]
    axes = [axis % x.ndim for axis in op.value("axes", list(range(x.ndim)))]
    if axes != list(range(x.ndim - len(axes), x.ndim)):
        raise UnsupportedOperator(f"layer_norm over axes {axes}")
    shape, epsilon = x.shape[x.ndim - len(axes) :], op.value("epsilon", 1e-5)
    return functional.layer_norm(x, shape, op.get("gamma"), op.get("beta"), epsilon)


def _batch_norm(op: _Operands) -> Tensor:
    settings = op.get("gamma"), op.get("beta"), False, 0.0, op.value("epsilon", 1e-5)
    return functional.batch_norm(op["x"], op["mean"], op["variance"], *settings)


def _gelu(op: _Operands) -> Tensor:
    mode = op.value("mode", "EXACT")
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise UnsupportedOperator(f"gelu in mode {mode}")
    return functional.gelu(op["x"], approximate="none" if mode == "EXACT" else "tanh")


def _matmul(op: _Operands) -> Tensor:
    x, y = op["x"], op["y"]
    x = x.transpose(-1, -2) if op.value("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if op.value("transpose_y", False) else y)


def _gather(op: _Operands) -> Tensor:
    x, indices, axis = op["x"], op["indices"].long(), op.value("axis", 0)
    if op.value("batch_dims", 0):
        raise UnsupportedOperator("gather with batch_dims")
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    selected = x.index_select(axis, indices.flatten())
    return selected.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis:][1:]])


def _slice(op: _Operands) -> Tensor:
    x = op["x"]
    begins, ends = op.value("begin"), op.value("end")
    steps = op.value("stride", [1] * x.ndim)
    masks = [op.value(name, [False] * x.ndim) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    index: list[Any] = []
    for begin, end, step, *(from_start, to_end, squeeze) in zip(begins, ends, steps, *masks, strict=True):
        if step < 0:
            raise UnsupportedOperator("slice_by_index with a negative stride")
        index.append(begin if squeeze else slice(None if from_start else begin, None if to_end else end, step))
    return x[tuple(index)]


def _reshape(op: _Operands) -> Tensor:
    x = op["x"]
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(op.value("shape"))])


def _reduction(function: Callable[..., Tensor]) -> Callable[[_Operands], Tensor]:
    def reduce(op: _Operands) -> Tensor:
        axes = op.value("axes", list(range(op["x"].ndim)))
        return function(op["x"], axes, keepdim=op.value("keep_dims", False))

    return reduce


def _split(op: _Operands) -> tuple[Tensor, ...]:
    x, axis = op["x"], op.value("axis")
    sizes = op.value("split_sizes") or [x.shape[axis] // op.value("num_splits")] * op.value("num_splits")
    return x.split(sizes, axis)


def _quantize(op: _Operands) -> Tensor:
    zero = op.get("zero_point", 0)
    low, high = (0, 255) if op.value("output_dtype") == "uint8" else (-128, 127)
    return ((op["input"] / op["scale"]).round() + zero).clamp(low, high)


def _dequantize(op: _Operands) -> Tensor:
    zero = op.get("zero_point", 0)
    return (op["input"].to(op.compute_dtype) - zero) * op["scale"]


def _affine_dequantize(op: _Operands) -> Tensor:
    qweight, axis = op["quantized_data"], op.value("axis")
    shape = [-1 if dim == axis % qweight.ndim else 1 for dim in range(qweight.ndim)]
    zero, scale = (op[name].reshape(shape) for name in ("zero_point", "scale"))
    return (qweight - zero) * scale


def _blockwise_shift_scale(op: _Operands) -> Tensor:
    qweight, scale, offset = op["data"], op["scale"], op.get("offset")
    shifted = qweight if offset is None else qweight - _repeat_blocks(offset, qweight.shape)
    return shifted * _repeat_blocks(scale, qweight.shape)


def _repeat_blocks(values: Tensor, shape: torch.Size) -> Tensor:
    for axis, (blocks, size) in enumerate(zip(values.shape, shape, strict=True)):
        values = values.repeat_interleave(size // blocks, axis)
    return values


def _binary(function: Callable[..., Tensor]) -> Callable[[_Operands], Tensor]:
    return lambda op: function(op["x"], op["y"])


def _unary(function: Callable[..., Tensor]) -> Callable[[_Operands], Tensor]:
    return lambda op: function(op["x"])


def _expand_dims(op: _Operands) -> Tensor:
    x, axes = op["x"], op.value("axes")
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


OPERATORS: dict[str, Callable[[_Operands], Any]] = {
    **{name: _binary(getattr(torch, name)) for name in ("add", "sub", "mul", "pow", "less_equal")},
    **{name: _unary(getattr(functional, name)) for name in ("relu", "silu", "sigmoid", "tanh")},
    "square": _unary(torch.square),
    "sqrt": _unary(torch.sqrt),
    "rsqrt": lambda op: (op["x"] + op.value("epsilon", 1e-12)).rsqrt(),
    "cast": _unary(lambda x: x),  # `run_program` casts every output
    "shape": _unary(lambda x: torch.tensor(x.shape)),
    "expand_dims": _expand_dims,
    "transpose": lambda op: op["x"].permute(op.value("perm")),
    "reshape": _reshape,
    "concat": lambda op: torch.cat([torch.atleast_1d(value) for value in op.all("values")], op.value("axis")),
    "split": _split,
    "gather": _gather,
    "slice_by_index": _slice,
    "conv": _conv,
    "linear": lambda op: functional.linear(op["x"], op["weight"], op.get("bias")),
    "matmul": _matmul,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "gelu": _gelu,
    "softmax": lambda op: op["x"].softmax(op.value("axis", -1)),
    "reduce_mean": _reduction(torch.mean),
    "reduce_sum": _reduction(torch.sum),
    "quantize": _quantize,
    "dequantize": _dequantize,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
}
