"""Narrow linears under the names that two packages give their tensors: written so, and read again without either.

| weights, inputs           | by                 | tensors, beside `bias`                                             |
|---------------------------|--------------------|--------------------------------------------------------------------|
| int8 by row or in groups  | compressed-tensors | `weight` int8 [N, K], `weight_scale` [N, G]                        |
| … and inputs by a range   |                    | `input_scale` [1], `input_zero_point` int8 [1]                     |
| int4 in groups            | compressed-tensors | `weight_packed` int32 [N, ⌈K/8⌉], `weight_scale`, `weight_shape`,  |
|                           |                    | `weight_zero_point` int32 [⌈N/8⌉, G] where there are zeros         |
| nf4                       | bitsandbytes       | `weight` uint8 [NK/2, 1], `weight.absmax`, `weight.quant_map`,     |
|                           |                    | `weight.quant_state.bitsandbytes__nf4` (JSON)                      |

`settings` is what config.json calls `quantization_config`: which linears are narrow, and how. Inputs are rounded by one
range for all of a linear's inputs, to both sides of 0 apart (`strategy: tensor`, not symmetric), as `kernels.narrow`
does; theirs are 128 lower. Files, and what is kept how wide beside the narrow linears, are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mowa.errors import ModelError
from mowa.kernels.quant import int4_layout
from mowa.kernels.quant.linear import Activations, QuantizedLinear
from mowa.kernels.quant.weights import NF4_LEVELS, QuantizedWeight

COMPRESSED_TENSORS, BITSANDBYTES = "compressed-tensors", "bitsandbytes"
COMPRESSED_TENSORS_FORMATS = {8: "int-quantized", 4: "pack-quantized"}  # bits → compressed-tensors' name of the layout
BNB_QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
INT8_OFFSET = 128  # uint8 as we have it, int8 as compressed-tensors does

QuantizedLinears = Mapping[str, QuantizedLinear]
Tensors = Mapping[str, Tensor]


def quantization_config(linears: QuantizedLinears, unquantized: Iterable[str]) -> dict[str, Any]:
    """How `linears` (name → module) are written; `others` are the names of the linears that are not narrow."""
    if any(linear.quant_type == "nf4" for linear in linears.values()):
        return {
            "quant_method": BITSANDBYTES,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(unquantized),
        }
    groups: dict[str, dict[str, Any]] = {}
    for name, linear in linears.items():
        how = _how(linear)
        groups.setdefault(json.dumps(how), {"targets": [], **how})["targets"].append(name)
    layouts = {group["format"] for group in groups.values()}
    made: dict[str, Any] = {
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": [],
    }
    if any(linear.zero_point is not None for linear in linears.values()):
        made["dequantize"] = True  # transformers 5.23 takes zeros only where it makes weights wide as it reads them
    return made


def _how(linear: QuantizedLinear) -> dict[str, Any]:
    by_row = linear.bits == 8 and linear.group_size >= linear.in_features
    inputs = None
    if linear.activations != "none":
        inputs = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor"}
        inputs["dynamic"] = linear.activations == "dynamic"
    return {
        "weights": {
            "num_bits": linear.bits,
            "type": "int",
            "symmetric": linear.zero_point is None,
            "strategy": "channel" if by_row else "group",
            "group_size": None if by_row else min(linear.group_size, linear.in_features),
        },
        "input_activations": inputs,
        "output_activations": None,
        "format": COMPRESSED_TENSORS_FORMATS[linear.bits],
    }


def pack_linear(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """What is written of the linear called `name`. Scales are in float16 where that loses nothing.

    Beside zeros they are in float32: weights that transformers makes wide as it reads them take the scales' dtype.
    """
    if linear.quant_type == "nf4":
        state = {
            "quant_type": "nf4",
            "blocksize": linear.group_size,
            "dtype": "float32",
            "shape": [*linear.qweight.shape],
        }
        made = {
            "weight": int4_layout.pack_bnb_4bit(linear.qweight),
            "weight.absmax": linear.scale.flatten(),
            "weight.quant_map": torch.tensor(NF4_LEVELS),
            BNB_QUANT_STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        }
    else:
        made = {"weight_scale": _least(linear.scale) if linear.zero_point is None else linear.scale}
        if linear.bits == 4:
            made |= {
                "weight_packed": int4_layout.pack_to_int32(linear.qweight),
                "weight_shape": torch.tensor(linear.qweight.shape),
            }
        else:
            made["weight"] = linear.qweight
        if linear.zero_point is not None:
            made["weight_zero_point"] = int4_layout.pack_to_int32(linear.zero_point, 0)
        if linear.input_qparams is not None:
            step, zero = linear.input_qparams
            made |= {
                "input_scale": torch.tensor([step]),
                "input_zero_point": torch.tensor([zero - INT8_OFFSET], dtype=torch.int8),
            }
    if linear.bias is not None:
        made["bias"] = linear.bias
    return {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in made.items()}


def _least(scales: Tensor) -> Tensor:
    half = scales.half()
    return half if torch.equal(half.float(), scales) else scales


def unsupported_reason(config: Mapping[str, Any]) -> str:
    """Why weights that are kept so cannot be read here; empty where they can."""
    method = config.get("quant_method")
    if method == BITSANDBYTES:
        plain = config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4"
        if (
            plain
            and not config.get("bnb_4bit_use_double_quant")
            and config.get("bnb_4bit_quant_storage", "uint8") == "uint8"
        ):
            return ""
        return f"{method}, of which only nf4 with plain scales is read here"
    if method != COMPRESSED_TENSORS:
        return str(method)
    groups = (config.get("config_groups") or {}).values()
    odd = (
        config.get("quantization_status") != "compressed"
        or config.get("kv_cache_scheme")
        or config.get("transform_config")
    )
    if odd or not groups or not all(isinstance(group, dict) and _known(group) for group in groups):
        return f"{method}, of which only int8 and int4 weights with wide inputs or one range for all are read here"
    return ""


def _known(group: Mapping[str, Any]) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    return (
        weights.get("type") == "int"
        and weights.get("num_bits") in COMPRESSED_TENSORS_FORMATS
        and group.get("format") in (None, COMPRESSED_TENSORS_FORMATS[weights["num_bits"]])
        and weights.get("strategy") in ("channel", "group")
        and (bool(weights.get("symmetric")) or weights["num_bits"] == 4)
        and not weights.get("dynamic")
        and not group.get("output_activations")
        and (not inputs or [inputs.get(key) for key in ("num_bits", "type", "strategy")] == [8, "int", "tensor"])
        and not (inputs and inputs.get("symmetric"))
    )


def unpack_linears(
    config: Mapping[str, Any], state_dict: Tensors
) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """The narrow linears among the tensors `kept`, and the other tensors. ModelError where one has no like."""
    rest, linears = dict(state_dict), {}
    mark = f".{BNB_QUANT_STATE}" if config["quant_method"] == BITSANDBYTES else ".weight_scale"
    for name in sorted(key.removesuffix(mark) for key in state_dict if key.endswith(mark)):
        of_it = {key.removeprefix(f"{name}."): rest.pop(key) for key in state_dict if key.startswith(f"{name}.")}
        try:
            linears[name] = _nf4(of_it) if mark != ".weight_scale" else _integers(of_it, _group_of(config, name))
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"the narrow weights of {name} are damaged: {error or type(error).__name__}") from error
    return linears, rest


def _group_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    groups = list(config["config_groups"].values())
    found = [group for group in groups if name in group["targets"]] or (groups if len(groups) == 1 else [])
    if not found:
        raise ValueError("config.json does not say how they are kept")
    return cast(Mapping[str, Any], found[0])


def _integers(of_it: dict[str, Tensor], group: Mapping[str, Any]) -> QuantizedLinear:
    weights, inputs = group["weights"], group.get("input_activations")
    scales = of_it["weight_scale"].float()
    zeros = of_it.get("weight_zero_point")
    if weights["num_bits"] == 4:
        rows, columns = of_it["weight_shape"].tolist()
        codes = int4_layout.unpack_from_int32(of_it["weight_packed"], columns)
        zeros = None if zeros is None else int4_layout.unpack_from_int32(zeros, rows, 0)
    else:
        codes = of_it["weight"]
    if codes.dtype is not torch.int8 or codes.ndim != 2 or len(codes) != len(scales):
        raise ValueError(f"{list(codes.shape)} of {codes.dtype} have scales {list(scales.shape)}")
    size = weights["group_size"] if weights["strategy"] == "group" else codes.shape[1]
    if scales.shape[1] != -(-codes.shape[1] // size):
        raise ValueError(f"{scales.shape[1]} scales a row are not for groups of {size} of {codes.shape[1]} columns")
    if weights["symmetric"] != (zeros is None):
        raise ValueError("zeros are there, or not, against what config.json says")
    narrow = QuantizedWeight(codes, scales, zeros, weights["num_bits"], size)
    activations: Activations = "none" if not inputs else "dynamic" if inputs.get("dynamic") else "static"
    range_ = None
    if activations == "static":
        range_ = float(of_it["input_scale"]), int(of_it["input_zero_point"]) + INT8_OFFSET
    return QuantizedLinear(narrow, of_it.get("bias"), activations, range_)


def _nf4(of_it: dict[str, Tensor]) -> QuantizedLinear:
    state = json.loads(bytes(of_it[BNB_QUANT_STATE].tolist()))
    rows, columns = state["shape"]
    size = state["blocksize"]
    if columns % size or not torch.equal(of_it["weight.quant_map"], torch.tensor(NF4_LEVELS)):
        raise ValueError(f"{columns} columns in blocks of {size}, or other levels than nf4's")
    codes = int4_layout.unpack_bnb_4bit(of_it["weight"], (rows, columns))
    scales = of_it["weight.absmax"].float().view(rows, -1)
    return QuantizedLinear(QuantizedWeight(codes, scales, None, 4, size, "nf4"), of_it.get("bias"))


def assign_weights(net: Any, linears: QuantizedLinears, other_tensors: Tensors) -> Any:
    """`net`, whose tensors are on no device yet, with `linears` in place and the rest in float32. → net, in eval mode.

    ModelError where a tensor is missing, left over or of another shape.
    """
    for name, linear in linears.items():
        try:
            wide = net.get_submodule(name)
        except AttributeError:
            wide = None
        if not isinstance(wide, nn.Linear) or (wide.out_features, wide.in_features) != tuple(linear.qweight.shape):
            raise ModelError(
                f"the weights hold {name} {list(linear.qweight.shape)}, for which config.json has no place"
            )
        net.set_submodule(name, linear)
    own = {f"{name}.{key}": value for name, linear in linears.items() for key, value in linear.state_dict().items()}
    whole = {name: value.float() if value.is_floating_point() else value for name, value in other_tensors.items()}
    try:
        report = net.load_state_dict(own | whole, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights do not fit config.json: {str(error).splitlines()[-1].strip()}") from error
    if odd := [*report.missing_keys, *report.unexpected_keys]:
        raise ModelError(f"the weights do not fit config.json: {odd[0]} is in one and not in the other")
    return net.eval().requires_grad_(False)
