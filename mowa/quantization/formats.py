"""Read and write quantized linears as compressed-tensors and bitsandbytes name their tensors, without these packages.

| weights, inputs           | package            | tensors, beside `bias`                                             |
|---------------------------|--------------------|--------------------------------------------------------------------|
| int8 per row or in groups | compressed-tensors | `weight` int8 [N, K], `weight_scale` [N, G]                        |
| … and static inputs       |                    | `input_scale` [1], `input_zero_point` int8 [1]                     |
| int4 in groups            | compressed-tensors | `weight_packed` int32 [N, ⌈K/8⌉], `weight_scale`, `weight_shape`,  |
|                           |                    | `weight_zero_point` int32 [⌈N/8⌉, G] if asymmetric                 |
| nf4                       | bitsandbytes       | `weight` uint8 [NK/2, 1], `weight.absmax`, `weight.quant_map`,     |
|                           |                    | `weight.quant_state.bitsandbytes__nf4` (JSON)                      |

`quantization_config` builds the entry of that name in config.json. Inputs are quantized per tensor and asymmetrically,
as in `kernels.quant.linear`; compressed-tensors stores them as int8, so its zero points are 128 lower than ours.
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
from mowa.kernels.quant.nf4 import pack_bnb_4bit, unpack_bnb_4bit
from mowa.kernels.quant.weights import NF4_LEVELS, QuantizedWeight

COMPRESSED_TENSORS, BITSANDBYTES = "compressed-tensors", "bitsandbytes"
COMPRESSED_TENSORS_FORMATS = {8: "int-quantized", 4: "pack-quantized"}  # by bits
BNB_QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
INT8_OFFSET = 128  # our zero points are uint8, those of compressed-tensors int8

QuantizedLinears = Mapping[str, QuantizedLinear]
Tensors = Mapping[str, Tensor]


def quantization_config(
    linears: QuantizedLinears, unquantized: Iterable[str], compute_dtype: str = "float32"
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json for linears written by `pack_linear`.

    Args:
        linears: module name → linear.
        unquantized: module names of the other linears of the net.
        compute_dtype: dtype in which bitsandbytes multiplies dequantized weights.
    """
    if any(linear.quant_type == "nf4" for linear in linears.values()):
        return {
            "quant_method": BITSANDBYTES,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(unquantized),
        }
    groups: dict[str, dict[str, Any]] = {}
    for name, linear in linears.items():
        group = _config_group(linear)
        groups.setdefault(json.dumps(group), {"targets": [], **group})["targets"].append(name)
    layouts = {group["format"] for group in groups.values()}
    config: dict[str, Any] = {
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": [],
    }
    if any(linear.zero_point is not None for linear in linears.values()):
        config["dequantize"] = True  # transformers 5.23 supports zero points only where it dequantizes while loading
    return config


def _config_group(linear: QuantizedLinear) -> dict[str, Any]:
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
    """Return the tensors of one linear as they are written, on the CPU; keys begin with `name`.

    Scales are stored in float16 if that is exact, but in float32 beside zero points: transformers dequantizes such
    weights while loading, to the dtype of their scales.
    """
    if linear.quant_type == "nf4":
        state = {
            "quant_type": "nf4",
            "blocksize": linear.group_size,
            "dtype": "float32",
            "shape": [*linear.qweight.shape],
        }
        tensors = {
            "weight": pack_bnb_4bit(linear.qweight),
            "weight.absmax": linear.scale.flatten(),
            "weight.quant_map": torch.tensor(NF4_LEVELS),
            BNB_QUANT_STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        }
    else:
        tensors = {"weight_scale": _to_half_if_exact(linear.scale) if linear.zero_point is None else linear.scale}
        if linear.bits == 4:
            tensors |= {
                "weight_packed": int4_layout.pack_to_int32(linear.qweight),
                "weight_shape": torch.tensor(linear.qweight.shape),
            }
        else:
            tensors["weight"] = linear.qweight
        if linear.zero_point is not None:
            tensors["weight_zero_point"] = int4_layout.pack_to_int32(linear.zero_point, 0)
        if linear.input_qparams is not None:
            scale, zero_point = linear.input_qparams
            tensors |= {
                "input_scale": torch.tensor([scale]),
                "input_zero_point": torch.tensor([zero_point - INT8_OFFSET], dtype=torch.int8),
            }
    if linear.bias is not None:
        tensors["bias"] = linear.bias
    return {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in tensors.items()}


def _to_half_if_exact(scale: Tensor) -> Tensor:
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale


def unsupported_reason(config: Mapping[str, Any]) -> str:
    """Return why weights with this `quantization_config` cannot be read, or an empty string where they can."""
    method = config.get("quant_method")
    if method == BITSANDBYTES:
        nf4 = config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4"
        uint8 = config.get("bnb_4bit_quant_storage", "uint8") == "uint8"
        if nf4 and uint8 and not config.get("bnb_4bit_use_double_quant"):
            return ""
        return f"of {method} only nf4 without double quantization is supported"
    if method != COMPRESSED_TENSORS:
        return f"quantization method {method} is not supported"
    groups = (config.get("config_groups") or {}).values()
    unsupported = (
        config.get("quantization_status") != "compressed"
        or config.get("kv_cache_scheme")
        or config.get("transform_config")
    )
    if unsupported or not groups or not all(isinstance(group, dict) and _is_supported(group) for group in groups):
        return f"of {method} only int8 and int4 weights with unquantized or per-tensor int8 inputs are supported"
    return ""


def _is_supported(group: Mapping[str, Any]) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    return (
        weights.get("type") == "int"
        and weights.get("num_bits") in COMPRESSED_TENSORS_FORMATS
        and group.get("format") in (None, COMPRESSED_TENSORS_FORMATS[weights["num_bits"]])
        and weights.get("strategy") in ("channel", "group")
        and (bool(weights.get("symmetric")) or weights["num_bits"] == 4)
        and not weights.get("dynamic")
        and weights.get("actorder") in (None, "weight", "static")  # others permute the columns
        and not group.get("output_activations")
        and (not inputs or [inputs.get(key) for key in ("num_bits", "type", "strategy")] == [8, "int", "tensor"])
        and not (inputs and inputs.get("symmetric"))
    )


def unpack_linears(
    config: Mapping[str, Any], state_dict: Tensors
) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """Return the quantized linears in `state_dict` by module name, and its other tensors.

    Args:
        config: `quantization_config`, one that `unsupported_reason` accepts.
        state_dict: the tensors of the file.

    Raises:
        ModelError: the tensors of a linear are incomplete or do not fit each other.
    """
    rest, linears = dict(state_dict), {}
    nf4 = config["quant_method"] == BITSANDBYTES
    suffix = f".{BNB_QUANT_STATE}" if nf4 else ".weight_scale"
    for name in sorted(key.removesuffix(suffix) for key in state_dict if key.endswith(suffix)):
        tensors = {key.removeprefix(f"{name}."): rest.pop(key) for key in state_dict if key.startswith(f"{name}.")}
        try:
            linears[name] = _unpack_nf4(tensors) if nf4 else _unpack_int(tensors, _find_config_group(config, name))
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"the quantized weights of {name} are damaged: {error or type(error).__name__}") from error
    return linears, rest


def _find_config_group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    groups = list(config["config_groups"].values())
    found = [group for group in groups if name in group["targets"]] or (groups if len(groups) == 1 else [])
    if not found:
        raise ValueError("no config group of config.json targets it")
    return cast(Mapping[str, Any], found[0])


def _unpack_int(tensors: dict[str, Tensor], group: Mapping[str, Any]) -> QuantizedLinear:
    weights, inputs = group["weights"], group.get("input_activations")
    scale = tensors["weight_scale"].float()
    zero_point = tensors.get("weight_zero_point")
    if weights["num_bits"] == 4:
        rows, columns = tensors["weight_shape"].tolist()
        qweight = int4_layout.unpack_from_int32(tensors["weight_packed"], columns)
        zero_point = None if zero_point is None else int4_layout.unpack_from_int32(zero_point, rows, 0)
    else:
        qweight = tensors["weight"]
    if qweight.dtype is not torch.int8 or qweight.ndim != 2 or len(qweight) != len(scale):
        raise ValueError(f"weight is {list(qweight.shape)} {qweight.dtype}, its scales are {list(scale.shape)}")
    group_size = weights["group_size"] if weights["strategy"] == "group" else qweight.shape[1]
    if scale.shape[1] != -(-qweight.shape[1] // group_size):
        raise ValueError(
            f"{scale.shape[1]} scales per row do not fit {qweight.shape[1]} columns in groups of {group_size}"
        )
    if weights["symmetric"] != (zero_point is None):
        raise ValueError("zero points are present or missing against what config.json says")
    quantized = QuantizedWeight(qweight, scale, zero_point, weights["num_bits"], group_size)
    activations: Activations = "none" if not inputs else "dynamic" if inputs.get("dynamic") else "static"
    input_qparams = None
    if activations == "static":
        input_qparams = float(tensors["input_scale"]), int(tensors["input_zero_point"]) + INT8_OFFSET
    return QuantizedLinear(quantized, tensors.get("bias"), activations, input_qparams)


def _unpack_nf4(tensors: dict[str, Tensor]) -> QuantizedLinear:
    state = json.loads(bytes(tensors[BNB_QUANT_STATE].tolist()))
    rows, columns = state["shape"]
    group_size = state["blocksize"]
    if columns % group_size:
        raise ValueError(f"{columns} columns are not a multiple of the block size {group_size}")
    if not torch.equal(tensors["weight.quant_map"], torch.tensor(NF4_LEVELS)):
        raise ValueError("its quantization levels are not those of nf4")
    qweight = unpack_bnb_4bit(tensors["weight"], (rows, columns))
    scale = tensors["weight.absmax"].float().view(rows, -1)
    return QuantizedLinear(QuantizedWeight(qweight, scale, None, 4, group_size, "nf4"), tensors.get("bias"))


def assign_weights(net: Any, linears: QuantizedLinears, other_tensors: Tensors) -> Any:
    """Put `linears` and `other_tensors` (cast to float32) into `net`, and return it in eval mode without gradients.

    Tied parameters stay tied, and buffers that no file holds, such as rotary frequencies, are computed.

    Args:
        net: a transformers net on the meta device; changed in place.
        linears: module name → linear.
        other_tensors: all other tensors of its state dict, with at least one of those that are tied.

    Raises:
        ModelError: a tensor is missing, unexpected or of the wrong shape.
    """
    for name, linear in linears.items():
        try:
            original = net.get_submodule(name)
        except AttributeError:
            original = None
        shape = tuple(linear.qweight.shape)
        if not isinstance(original, nn.Linear) or (original.out_features, original.in_features) != shape:
            raise ModelError(f"the weights do not fit config.json: unexpected linear {name} {list(shape)}")
        net.set_submodule(name, linear)
    quantized = {
        f"{name}.{key}": value for name, linear in linears.items() for key, value in linear.state_dict().items()
    }
    others = {name: value.float() if value.is_floating_point() else value for name, value in other_tensors.items()}
    tied = _tied_names(net)
    try:
        report = net.load_state_dict(quantized | others, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights do not fit config.json: {str(error).splitlines()[-1].strip()}") from error
    missing = set(report.missing_keys)
    for names in tied:
        if present := [name for name in names if name not in missing]:
            for name in names:
                module, _, leaf = name.rpartition(".")
                net.get_submodule(module)._parameters[leaf] = net.get_parameter(present[0])
            missing.difference_update(names)
    if missing:
        raise ModelError(f"the weights do not fit config.json: {min(missing)} is missing")
    if report.unexpected_keys:
        raise ModelError(f"the weights do not fit config.json: {report.unexpected_keys[0]} is unexpected")
    compute_buffers(net)
    return net.eval().requires_grad_(False)


def _tied_names(net: Any) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def compute_buffers(net: Any) -> None:
    """Compute the buffers that are still on the meta device with transformers' own `_init_weights`, on the CPU."""
    for parameter in net.parameters():
        parameter._is_hf_initialized = True  # so that weights are kept
    for module in net.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if empty:
            net._init_weights(module)
