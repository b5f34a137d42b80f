"""The tensors of ONNX graphs: each kept as narrow as its scheme says, in one file for all graphs of a folder.

What is kept narrow here is made wide again by operators over constants, which a runtime does once, when it loads the
graph: it costs nothing later, and the file is smaller. Graphs are read and written whole, so they fit in memory.
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

from mowa.kernels.quant import weights
from mowa.types import Scheme

MIN_EXTERNAL_SIZE = 1024  # elements of what is worth a file of its own, and float16
HALF_DATA_TYPES = {"float16": 10, "bfloat16": 16}  # TensorProto.DataType


def rewrite_graphs(folder: Path, graphs: Sequence[str], scheme: Scheme, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Rewrite the `graphs` of `folder`: tensors as `scheme` has them, all in one file beside the first; what the
    exporter noted of its own work goes, and `says` is put in its place. → the files there are now."""
    import onnx

    data = f"{graphs[0]}.data"
    models = [onnx.load(folder / graph) for graph in graphs]
    for graph in graphs:
        (folder / f"{graph}.data").unlink(missing_ok=True)
    places: dict[str, tuple[int, int]] = {}
    with (folder / data).open("wb") as file:
        for graph, model in zip(graphs, models, strict=True):
            _narrow(model.graph, scheme)
            _forget(model)
            for tensor in model.graph.initializer:
                _put(tensor, data, file, places)
            onnx.helper.set_model_props(model, dict(metadata))
            model.producer_name = "mowa"
            (folder / graph).write_bytes(model.SerializeToString())
    if not places:
        (folder / data).unlink()
    return (*graphs, data) if places else tuple(graphs)


def _narrow(graph: Any, scheme: Scheme) -> None:
    from onnx import TensorProto

    integers = scheme.weights in ("int8", "int4", "nf4", "mixed")
    kind = "float16" if integers else scheme.weights
    if kind not in HALF_DATA_TYPES:
        return
    made, nodes = [], []
    for tensor in graph.initializer:
        matrix = len(tensor.dims) > 1 or "scales" in tensor.name or not integers
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) < MIN_EXTERNAL_SIZE or not matrix:
            made.append(tensor)
            continue
        convolution = "feature_extractor" in tensor.name and tensor.name.endswith("conv.weight")
        kept, wider = _in_groups(tensor) if integers and convolution else _half(tensor, kind)
        made += kept
        nodes += wider
    del graph.initializer[:]
    graph.initializer.extend(made)
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *after])


def _half(tensor: Any, kind: str) -> tuple[list[Any], list[Any]]:
    """A tensor in two bytes a number, and what makes it wide again under its old name."""
    from onnx import TensorProto, helper

    name, wide = f"{tensor.name}.{kind}", _read(tensor)
    raw = torch.from_numpy(wide).to(getattr(torch, kind)).view(torch.int16).numpy().tobytes()
    kept = TensorProto(name=name, data_type=HALF_DATA_TYPES[kind], dims=tensor.dims, raw_data=raw)
    return [kept], [helper.make_node("Cast", [name], [tensor.name], f"widen {tensor.name}", to=TensorProto.FLOAT)]


def _in_groups(tensor: Any) -> tuple[list[Any], list[Any]]:
    """A convolution's weights in int8, `narrow.side_group` of them to a scale, and what makes them wide again."""
    from onnx import TensorProto, helper, numpy_helper

    weight = torch.from_numpy(_read(tensor))
    group = weights.non_block_group_size(weight)
    if not group:
        return _half(tensor, "float16")
    found, name = weights.quantize(weight.flatten(1), 8, group), tensor.name
    codes = functional.pad(found.qweight, (0, -found.qweight.shape[1] % group)).unflatten(1, (-1, group)).numpy()
    scales, scaling = _half(numpy_helper.from_array(found.scale[..., None].numpy(), f"{name}.scales"), "float16")
    kept = [
        numpy_helper.from_array(codes, f"{name}.codes"),
        *scales,
        *(
            numpy_helper.from_array(np.array(value, np.int64), f"{name}.{what}")
            for what, value in (
                ("shape", weight.shape),
                ("rows", (len(weight), -1)),
                ("start", [0]),
                ("end", [weight[0].numel()]),
                ("axis", [1]),
            )
        ),
    ]
    wide = [
        *scaling,
        helper.make_node("Cast", [f"{name}.codes"], [f"{name}.levels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.levels", f"{name}.scales"], [f"{name}.wide"]),
        helper.make_node("Reshape", [f"{name}.wide", f"{name}.rows"], [f"{name}.flat"]),
        helper.make_node("Slice", [f"{name}.{what}" for what in ("flat", "start", "end", "axis")], [f"{name}.true"]),
        helper.make_node("Reshape", [f"{name}.true", f"{name}.shape"], [name]),
    ]
    return kept, wide


def _read(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    return np.array(numpy_helper.to_array(tensor), order="C")


def _put(tensor: Any, data: str, file: Any, places: dict[str, tuple[int, int]]) -> None:
    """What is large goes into the file, once for all graphs; the tensor says where."""
    from onnx import external_data_helper, numpy_helper

    raw = tensor.raw_data if tensor.HasField("raw_data") else _read(tensor).tobytes()
    if len(raw) < MIN_EXTERNAL_SIZE:
        return
    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(numpy_helper.from_array(_read(tensor), tensor.name))
    key = hashlib.sha256(raw).hexdigest()
    if key not in places:
        file.write(bytes(-file.tell() % 64))
        places[key] = (file.tell(), len(raw))
        file.write(raw)
    external_data_helper.set_external_data(tensor, data, *places[key])
    tensor.ClearField("raw_data")


def _forget(model: Any) -> None:
    """The names of every line of Python that a node came from are half of what a small graph weighs."""
    del model.metadata_props[:]
    for holder in (model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del model.graph.value_info[:]
