"""What a Core ML program on disk gives, its operators computed by torch one after another: the numbers of the format's
definition (Apple's MIL), not those of a device.

Operators compute in float32; what is float16 in the program is rounded to it at every operator's end. It knows the
operators of speech nets and says which it does not know; it refuses to know nets.
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
    """An operator, or a way to use it, that is not known here."""


def open_program(package: Path) -> Any:
    """The main function of the mlprogram in `package`, weights included."""
    ct = import_module("coremltools")
    load = import_module("coremltools.converters.mil.frontend.milproto.load").load
    spec = ct.utils.load_spec(str(package))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    return load(spec, spec.specificationVersion, str(weights)).functions["main"]


def run_program(program: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its outputs by name, of inputs of which some may be none of its own."""
    if strange := sorted({op.op_type for op in program.operations} - {*OPERATORS, "const"}):
        raise UnsupportedOperator(", ".join(strange))
    values: dict[Any, Tensor] = {var: inputs[name].to(DTYPES[_kind(var)]) for name, var in program.inputs.items()}
    waiting = Counter(var for op in program.operations for var in _givens(op))
    waiting.update(program.outputs)
    for op in program.operations:
        if op.op_type == "const":
            continue
        made = OPERATORS[op.op_type](_Given(op, values))
        for var, value in zip(op.outputs, made if isinstance(made, tuple | list) else (made,), strict=True):
            values[var] = value.to(DTYPES[_kind(var)])
        for var in _givens(op):
            waiting[var] -= 1
            if not waiting[var]:
                values.pop(var, None)  # 20 s of a large net in all its states would be gigabytes
    return {var.name: values[var] for var in program.outputs}


def _givens(op: Any) -> list[Any]:
    return [var for given in op.inputs.values() for var in (given if isinstance(given, list | tuple) else (given,))]


def _kind(var: Any) -> str:
    types = import_module("coremltools.converters.mil.mil").types
    name: str = types.builtin_to_string(var.dtype)
    return name


class _Given:
    """What an operator is given, by the names of the definition: tensors, floats wide; and plain values."""

    def __init__(self, op: Any, values: Mapping[Any, Tensor]) -> None:
        self.op, self._values = op, values

    def __getitem__(self, name: str) -> Tensor:
        return self._tensor(self.op.inputs[name])

    def get(self, name: str, otherwise: Any = None) -> Any:
        var = self.op.inputs.get(name)
        return otherwise if var is None else self._tensor(var)

    def all(self, name: str) -> list[Tensor]:
        return [self._tensor(var) for var in self.op.inputs[name]]

    def plain(self, name: str, otherwise: Any = None) -> Any:
        var = self.op.inputs.get(name)
        if var is None:
            return otherwise
        value = self._values[var].numpy() if var in self._values else var.val
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

    def _tensor(self, var: Any) -> Tensor:
        if var in self._values:
            value = self._values[var]
            return value.float() if value.dtype == torch.float16 else value
        kind = _kind(var)
        wide = np.float32 if kind.startswith("fp") else np.bool_ if kind == "bool" else np.int64
        return torch.from_numpy(np.array(var.val, wide))


def _conv(of: _Given) -> Tensor:
    x, weight = of["x"], of["weight"]
    sides, kind = x.ndim - 2, of.plain("pad_type", "valid")
    pad = of.plain("pad", [0] * 2 * sides) if kind == "custom" else [0] * 2 * sides
    if kind not in ("valid", "custom"):
        raise UnsupportedOperator(f"conv with pad_type {kind}")
    turned = [side for axis in reversed(range(sides)) for side in pad[2 * axis : 2 * axis + 2]]
    how = (of.plain("strides", [1] * sides), 0, of.plain("dilations", [1] * sides), of.plain("groups", 1))
    function = functional.conv1d if sides == 1 else functional.conv2d
    made: Tensor = function(functional.pad(x, turned), weight, of.get("bias"), *how)
    return made


def _layer_norm(of: _Given) -> Tensor:
    x = of["x"]
    axes = [axis % x.ndim for axis in of.plain("axes", list(range(x.ndim)))]
    if axes != list(range(x.ndim - len(axes), x.ndim)):
        raise UnsupportedOperator(f"layer_norm over axes {axes}")
    shape, epsilon = x.shape[x.ndim - len(axes) :], of.plain("epsilon", 1e-5)
    return functional.layer_norm(x, shape, of.get("gamma"), of.get("beta"), epsilon)


def _batch_norm(of: _Given) -> Tensor:
    how = of.get("gamma"), of.get("beta"), False, 0.0, of.plain("epsilon", 1e-5)
    return functional.batch_norm(of["x"], of["mean"], of["variance"], *how)


def _gelu(of: _Given) -> Tensor:
    mode = of.plain("mode", "EXACT")
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise UnsupportedOperator(f"gelu in mode {mode}")
    return functional.gelu(of["x"], approximate="none" if mode == "EXACT" else "tanh")


def _matmul(of: _Given) -> Tensor:
    x, y = of["x"], of["y"]
    x = x.transpose(-1, -2) if of.plain("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if of.plain("transpose_y", False) else y)


def _gather(of: _Given) -> Tensor:
    x, rows, axis = of["x"], of["indices"].long(), of.plain("axis", 0)
    if of.plain("batch_dims", 0):
        raise UnsupportedOperator("gather with batch_dims")
    rows = torch.where(rows < 0, rows + x.shape[axis], rows)
    made = x.index_select(axis, rows.flatten())
    return made.reshape([*x.shape[:axis], *rows.shape, *x.shape[axis:][1:]])


def _slice(of: _Given) -> Tensor:
    x = of["x"]
    nothing = [False] * x.ndim
    begins, ends = of.plain("begin"), of.plain("end")
    steps = of.plain("stride", [1] * x.ndim)
    masks = [of.plain(name, nothing) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    cuts: list[Any] = []
    for begin, end, step, *(from_start, to_end, single) in zip(begins, ends, steps, *masks, strict=True):
        if step < 0:
            raise UnsupportedOperator("slice_by_index backwards")
        whole = slice(None if from_start else begin, None if to_end else end, step)
        cuts.append(begin if single else whole)
    return x[tuple(cuts)]


def _reshape(of: _Given) -> Tensor:
    x = of["x"]
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(of.plain("shape"))])


def _reduced(function: Callable[..., Tensor]) -> Callable[[_Given], Tensor]:
    def reduce(of: _Given) -> Tensor:
        axes = of.plain("axes", list(range(of["x"].ndim)))
        return function(of["x"], axes, keepdim=of.plain("keep_dims", False))

    return reduce


def _split(of: _Given) -> tuple[Tensor, ...]:
    x, axis = of["x"], of.plain("axis")
    sizes = of.plain("split_sizes") or [x.shape[axis] // of.plain("num_splits")] * of.plain("num_splits")
    return x.split(sizes, axis)


def _quantize(of: _Given) -> Tensor:
    zero = of.get("zero_point", 0)
    least, most = (0, 255) if of.plain("output_dtype") == "uint8" else (-128, 127)
    return ((of["input"] / of["scale"]).round() + zero).clamp(least, most)


def _dequantize(of: _Given) -> Tensor:
    zero = of.get("zero_point", 0)
    return (of["input"].float() - zero) * of["scale"]


def _by_channel(of: _Given) -> Tensor:
    codes, axis = of["quantized_data"], of.plain("axis")
    shape = [-1 if at == axis % codes.ndim else 1 for at in range(codes.ndim)]
    zero, scale = (of[name].reshape(shape) for name in ("zero_point", "scale"))
    return (codes - zero) * scale


def _by_block(of: _Given) -> Tensor:
    codes, scale = of["data"], of["scale"]
    offset = of.get("offset")
    return (codes if offset is None else codes - _spread(offset, codes)) * _spread(scale, codes)


def _spread(of_blocks: Tensor, codes: Tensor) -> Tensor:
    for axis, (blocks, whole) in enumerate(zip(of_blocks.shape, codes.shape, strict=True)):
        of_blocks = of_blocks.repeat_interleave(whole // blocks, axis)
    return of_blocks


def _two(function: Callable[..., Tensor]) -> Callable[[_Given], Tensor]:
    return lambda of: function(of["x"], of["y"])


def _one(function: Callable[..., Tensor]) -> Callable[[_Given], Tensor]:
    return lambda of: function(of["x"])


def _expanded(of: _Given) -> Tensor:
    x, axes = of["x"], of.plain("axes")
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


OPERATORS: dict[str, Callable[[_Given], Any]] = {
    **{name: _two(getattr(torch, name)) for name in ("add", "sub", "mul", "pow", "less_equal")},
    **{name: _one(getattr(functional, name)) for name in ("relu", "silu", "sigmoid", "tanh")},
    "square": _one(torch.square),
    "sqrt": _one(torch.sqrt),
    "rsqrt": lambda of: (of["x"] + of.plain("epsilon", 1e-12)).rsqrt(),
    "cast": _one(lambda x: x),  # every output is made what the program says it is
    "shape": _one(lambda x: torch.tensor(x.shape)),
    "expand_dims": _expanded,
    "transpose": lambda of: of["x"].permute(of.plain("perm")),
    "reshape": _reshape,
    "concat": lambda of: torch.cat([torch.atleast_1d(one) for one in of.all("values")], of.plain("axis")),
    "split": _split,
    "gather": _gather,
    "slice_by_index": _slice,
    "conv": _conv,
    "linear": lambda of: functional.linear(of["x"], of["weight"], of.get("bias")),
    "matmul": _matmul,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "gelu": _gelu,
    "softmax": lambda of: of["x"].softmax(of.plain("axis", -1)),
    "reduce_mean": _reduced(torch.mean),
    "reduce_sum": _reduced(torch.sum),
    "quantize": _quantize,
    "dequantize": _dequantize,
    "constexpr_affine_dequantize": _by_channel,
    "constexpr_blockwise_shift_scale": _by_block,
}
