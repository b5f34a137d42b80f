"""ONNX graphs in which every tensor has the type it is to be computed in, as runtimes want them that choose none.

Products (`PRODUCTS`) are made of half-precision inputs and give half precision; all else, LayerNormalization and
Softmax among it, stays float32. Quantised products have symmetric int8 on both sides and give float32. It knows graphs
in memory; it refuses to know files, nets and who runs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

MATMUL_OPS = ("MatMul", "Gemm", "Conv")


def cast_to_half(graph: Any, dtype: str) -> None:
    """Make the products of a float32 `graph` in `kind`, float16 or bfloat16: constants are rounded, all else is cast.
    Quantised products stay as they are."""
    from onnx import TensorProto

    half = TensorProto.DataType.Value(dtype.upper())
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    quantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    narrowed: dict[str, str] = {}
    nodes: list[Any] = []
    for node in list(graph.node):
        if node.op_type not in MATMUL_OPS or quantised & set(node.input):
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name and name not in narrowed:
                narrowed[name] = f"{name}.{dtype}"
                if name in constants:
                    graph.initializer.append(_rounded(constants[name], narrowed[name], dtype, half))
                else:
                    nodes.append(_cast(name, narrowed[name], half))
            node.input[index] = narrowed[name] if name else ""
        out = node.output[0]
        node.output[0] = f"{out}.{dtype}"
        nodes += [node, _cast(f"{out}.{dtype}", out, TensorProto.FLOAT)]
    _put(graph, nodes)


def _cast(name: str, out: str, to: int) -> Any:
    from onnx import helper

    return helper.make_node("Cast", [name], [out], f"{name} to {out}", to=to)


def _rounded(tensor: Any, name: str, kind: str, half: int) -> Any:
    from onnx import TensorProto, numpy_helper

    wide = torch.from_numpy(np.array(numpy_helper.to_array(tensor), order="C"))
    raw = wide.to(getattr(torch, kind)).view(torch.int16).numpy().tobytes()
    return TensorProto(name=name, data_type=half, dims=tensor.dims, raw_data=raw)


def make_symmetric(graph: Any) -> None:
    """Let every uint8 input of a product be int8 around 0, in steps that cover the same range: up to twice as wide."""
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[tuple[str, str], tuple[str, str]] = {}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        scale, zero = node.input[1], node.input[2]
        if constants[zero].data_type != TensorProto.UINT8:
            continue
        if (scale, zero) not in made:
            names = f"step.{len(made)}.around_zero", f"middle.{len(made)}.around_zero"
            middle = numpy_helper.to_array(constants[zero]).astype(np.float32)
            step = numpy_helper.to_array(constants[scale]) * np.maximum(middle, 255 - middle) / 127
            graph.initializer.append(numpy_helper.from_array(np.asarray(step, np.float32), names[0]))
            graph.initializer.append(numpy_helper.from_array(np.zeros(middle.shape, np.int8), names[1]))
            made[scale, zero] = names
        node.input[1], node.input[2] = made[scale, zero]
    _put(graph, list(graph.node))


def emulate_half(graph: Any) -> None:
    """The graph that `in_halves` made, for a runtime without such products: their inputs and outputs are rounded as
    they would be, and their sums are made in float32."""
    from onnx import TensorProto

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    found = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.data_type in halves}
    found |= {
        node.output[0]: node.attribute[0].i
        for node in graph.node
        if node.op_type == "Cast" and node.attribute[0].i in halves
    }
    widened: dict[str, str] = {}
    nodes: list[Any] = []
    for node in list(graph.node):
        half = found.get(node.input[0]) if node.op_type in MATMUL_OPS else None
        if half is None:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name and name not in widened:
                widened[name] = f"{name}.wide"
                nodes.append(_cast(name, widened[name], TensorProto.FLOAT))
            node.input[index] = widened[name] if name else ""
        out = node.output[0]
        node.output[0] = f"{out}.wide"
        nodes += [node, _cast(f"{out}.wide", out, half)]
    _put(graph, nodes)


def list_operators(graph: Any) -> set[str]:
    return {f"{node.domain}::{node.op_type}".removeprefix("::") for node in graph.node}


def _put(graph: Any, nodes: Iterable[Any]) -> None:
    """These nodes, and of the constants those that are used."""
    nodes = list(nodes)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
