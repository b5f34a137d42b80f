"""Store the weights of ONNX graphs compactly, and in one file for all graphs of a folder.

Weights that no operator reads in their stored dtype are converted by operators over constants, which ONNX Runtime
evaluates once when it loads a graph. Graphs are processed whole, in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mowa.kernels.quant.weights import quantize
from mowa.quantization.schemes import non_block_group_size
from mowa.types import Scheme

MIN_HALF_NUMEL = 1024  # smaller tensors stay float32
MIN_EXTERNAL_BYTES = 1024  # smaller tensors stay in the graph
HALF_DATA_TYPES = {"float16": 10, "bfloat16": 16}  # TensorProto.DataType


def rewrite_graphs(folder: Path, graphs: Sequence[str], scheme: Scheme, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Rewrite `graphs`: store weights as `scheme` says, in one file beside the first graph, and replace their metadata.

    Returns the names of all files.
    """
    import onnx

    data_file = f"{graphs[0]}.data"
    models = [onnx.load(folder / graph) for graph in graphs]
    for graph in graphs:
        (folder / f"{graph}.data").unlink(missing_ok=True)
    offsets: dict[str, tuple[int, int]] = {}
    with (folder / data_file).open("wb") as file:
        for graph, model in zip(graphs, models, strict=True):
            _compress(model.graph, scheme)
            _remove_metadata(model)
            for tensor in model.graph.initializer:
                _store_externally(tensor, data_file, file, offsets)
            onnx.helper.set_model_props(model, dict(metadata))
            model.producer_name = "mowa"
            (folder / graph).write_bytes(model.SerializeToString())
    if not offsets:
        (folder / data_file).unlink()
    return (*graphs, data_file) if offsets else tuple(graphs)


def _compress(graph: Any, scheme: Scheme) -> None:
    """Convert float32 initializers: matrices and scales of integer schemes to float16 or int8, all of half schemes."""
    from onnx import TensorProto

    is_integer = scheme.weights in ("int8", "int4", "nf4", "mixed")
    dtype = "float16" if is_integer else scheme.weights
    if dtype not in HALF_DATA_TYPES:
        return
    initializers, conversions = [], []
    for tensor in graph.initializer:
        is_matrix = len(tensor.dims) > 1 or tensor.name.endswith(".scale")
        is_small = math.prod(tensor.dims) < MIN_HALF_NUMEL
        if tensor.data_type != TensorProto.FLOAT or is_small or (is_integer and not is_matrix):
            initializers.append(tensor)
            continue
        is_convolution = "feature_extractor" in tensor.name and tensor.name.endswith("conv.weight")
        stored, nodes = _to_int8(tensor) if is_integer and is_convolution else _to_half(tensor, dtype)
        initializers += stored
        conversions += nodes
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*conversions, *nodes])


def _to_half(tensor: Any, dtype: str) -> tuple[list[Any], list[Any]]:
    """Return the tensor in half precision, and the node that casts it to float32 under its original name."""
    from onnx import TensorProto, helper

    name, values = f"{tensor.name}.{dtype}", _to_numpy(tensor)
    raw = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.int16).numpy().tobytes()
    stored = TensorProto(name=name, data_type=HALF_DATA_TYPES[dtype], dims=tensor.dims, raw_data=raw)
    node = helper.make_node("Cast", [name], [tensor.name], f"dequantize {tensor.name}", to=TensorProto.FLOAT)
    return [stored], [node]


def _to_int8(tensor: Any) -> tuple[list[Any], list[Any]]:
    """Return a convolution's weights in int8, quantized per group, and the nodes that dequantize them."""
    from onnx import TensorProto, helper, numpy_helper

    weight = torch.from_numpy(_to_numpy(tensor))
    group_size = non_block_group_size(weight)
    if not group_size:
        return _to_half(tensor, "float16")
    quantized, name = quantize(weight.flatten(1), 8, group_size), tensor.name
    padding = -quantized.qweight.shape[1] % group_size
    qweight = functional.pad(quantized.qweight, (0, padding)).unflatten(1, (-1, group_size)).numpy()
    scale = numpy_helper.from_array(quantized.scale[..., None].numpy(), f"{name}.scale")
    stored_scale, scale_nodes = _to_half(scale, "float16")
    constants = {
        "shape": weight.shape,
        "matrix_shape": (len(weight), -1),
        "start": [0],
        "end": [weight[0].numel()],
        "axis": [1],
    }
    stored = [numpy_helper.from_array(qweight, f"{name}.qweight"), *stored_scale]
    stored += [numpy_helper.from_array(np.array(v, np.int64), f"{name}.{key}") for key, v in constants.items()]
    slice_inputs = [f"{name}.{key}" for key in ("flat", "start", "end", "axis")]
    nodes = [
        *scale_nodes,
        helper.make_node("Cast", [f"{name}.qweight"], [f"{name}.qweight_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.qweight_float", f"{name}.scale"], [f"{name}.dequantized"]),
        helper.make_node("Reshape", [f"{name}.dequantized", f"{name}.matrix_shape"], [f"{name}.flat"]),
        helper.make_node("Slice", slice_inputs, [f"{name}.trimmed"]),
        helper.make_node("Reshape", [f"{name}.trimmed", f"{name}.shape"], [name]),
    ]
    return stored, nodes


def _to_numpy(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    return np.array(numpy_helper.to_array(tensor), order="C")


def _store_externally(tensor: Any, data_file: str, file: Any, offsets: dict[str, tuple[int, int]]) -> None:
    """Move the data of a large tensor into the file, where equal tensors of several graphs share it."""
    from onnx import external_data_helper, numpy_helper

    raw = tensor.raw_data if tensor.HasField("raw_data") else _to_numpy(tensor).tobytes()
    if len(raw) < MIN_EXTERNAL_BYTES:
        return
    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(numpy_helper.from_array(_to_numpy(tensor), tensor.name))
    key = hashlib.sha256(raw).hexdigest()
    if key not in offsets:
        file.write(bytes(-file.tell() % 64))
        offsets[key] = (file.tell(), len(raw))
        file.write(raw)
    external_data_helper.set_external_data(tensor, data_file, *offsets[key])
    tensor.ClearField("raw_data")


def _remove_metadata(model: Any) -> None:
    """Remove the stack traces that torch attaches to every node, about half the size of a small graph."""
    del model.metadata_props[:]
    for owner in (model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del owner.metadata_props[:]
        owner.doc_string = ""
    del model.graph.value_info[:]
