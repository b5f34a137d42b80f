"""Give every tensor of an ONNX graph the dtype that it is computed in, for runtimes that choose none themselves.

Products (`MATMUL_OPS`) compute in half precision; everything else, including LayerNormalization and Softmax, stays
float32. Quantized products have symmetric int8 inputs and weights and return float32. Graphs are changed in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

MATMUL_OPS = ("MatMul", "Gemm", "Conv")


def cast_to_half(graph: Any, dtype: str) -> None:
    """Compute the products of a float32 `graph` in `dtype`, float16 or bfloat16, except quantized ones.

    Constant inputs are stored in `dtype`; other inputs and the outputs are cast.
    """
    from onnx import TensorProto

    half = TensorProto.DataType.Value(dtype.upper())
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    quantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    half_names: dict[str, str] = {}
    nodes: list[Any] = []
    for node in list(graph.node):
        if node.op_type not in MATMUL_OPS or quantized & set(node.input):
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name and name not in half_names:
                half_names[name] = f"{name}.{dtype}"
                if name in constants:
                    graph.initializer.append(_round_tensor(constants[name], half_names[name], dtype, half))
                else:
                    nodes.append(_cast(name, half_names[name], half))
            node.input[index] = half_names[name] if name else ""
        output = node.output[0]
        node.output[0] = f"{output}.{dtype}"
        nodes += [node, _cast(f"{output}.{dtype}", output, TensorProto.FLOAT)]
    _replace_nodes(graph, nodes)


def _cast(name: str, output: str, to: int) -> Any:
    from onnx import helper

    return helper.make_node("Cast", [name], [output], f"{name} to {output}", to=to)


def _round_tensor(tensor: Any, name: str, dtype: str, half: int) -> Any:
    from onnx import TensorProto, numpy_helper

    values = torch.from_numpy(np.array(numpy_helper.to_array(tensor), order="C"))
    raw = values.to(getattr(torch, dtype)).view(torch.int16).numpy().tobytes()
    return TensorProto(name=name, data_type=half, dims=tensor.dims, raw_data=raw)


def make_symmetric(graph: Any) -> None:
    """Convert uint8 inputs of quantized products to symmetric int8 that covers the same range.

    Scales grow by a factor of up to two.
    """
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    symmetric: dict[tuple[str, str], tuple[str, str]] = {}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        scale, zero_point = node.input[1], node.input[2]
        if constants[zero_point].data_type != TensorProto.UINT8:
            continue
        if (scale, zero_point) not in symmetric:
            count = len(symmetric)
            names = f"input_scale.{count}.symmetric", f"input_zero_point.{count}.symmetric"
            zero = numpy_helper.to_array(constants[zero_point]).astype(np.float32)
            new_scale = numpy_helper.to_array(constants[scale]) * np.maximum(zero, 255 - zero) / 127
            graph.initializer.append(numpy_helper.from_array(np.asarray(new_scale, np.float32), names[0]))
            graph.initializer.append(numpy_helper.from_array(np.zeros(zero.shape, np.int8), names[1]))
            symmetric[scale, zero_point] = names
        node.input[1], node.input[2] = symmetric[scale, zero_point]
    _replace_nodes(graph, list(graph.node))


def emulate_half(graph: Any) -> None:
    """Change a graph from `cast_to_half` for runtimes without half-precision products.

    Inputs and outputs of products are rounded to half precision, and sums are computed in float32.
    """
    from onnx import TensorProto

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    data_types = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.data_type in halves}
    data_types |= {
        node.output[0]: node.attribute[0].i
        for node in graph.node
        if node.op_type == "Cast" and node.attribute[0].i in halves
    }
    float_names: dict[str, str] = {}
    nodes: list[Any] = []
    for node in list(graph.node):
        half = data_types.get(node.input[0]) if node.op_type in MATMUL_OPS else None
        if half is None:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name and name not in float_names:
                float_names[name] = f"{name}.float32"
                nodes.append(_cast(name, float_names[name], TensorProto.FLOAT))
            node.input[index] = float_names[name] if name else ""
        output = node.output[0]
        node.output[0] = f"{output}.float32"
        nodes += [node, _cast(f"{output}.float32", output, half)]
    _replace_nodes(graph, nodes)


def list_operators(graph: Any) -> set[str]:
    """Return the operators of a graph, with their domain if it is not ONNX's own."""
    return {f"{node.domain}::{node.op_type}".removeprefix("::") for node in graph.node}


def _replace_nodes(graph: Any, nodes: Iterable[Any]) -> None:
    """Replace the nodes of a graph, and remove initializers that are not used any more."""
    nodes = list(nodes)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
