"""List the linear layers that schemes quantize, quantize one of them, and estimate a model's size on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mowa.kernels.quant import weights
from mowa.kernels.quant.gptq import quantize_gptq
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.nf4 import quantize_nf4
from mowa.kernels.quant.weights import QuantizedWeight
from mowa.quantization.schemes import non_block_dtype, non_block_group_size
from mowa.types import AnyModel, Scheme

QKV_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # linears with the same input
BYTES_PER_ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears of one block that have the same input, and always get the same scheme."""

    block_index: int
    module_names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.module_names[0] if len(self.module_names) == 1 else self.module_names[0].rpartition(".")[0] + ".qkv"


def block_names(model: AnyModel) -> list[str]:
    """Return the module names of the model's blocks, in order."""
    return [name for name, module in model.net.named_modules() if type(module).__name__ in model.family.blocks]


def linear_groups(model: AnyModel) -> list[LinearGroup]:
    """Return the linears in the blocks that schemes quantize, in the order of the forward pass."""
    found: dict[tuple[int, str], list[str]] = {}
    for index, path in enumerate(block_names(model)):
        for name, module in model.net.get_submodule(path).named_modules():
            linear = model.family.find_linear(name)
            if linear and isinstance(module, nn.Linear):
                key = "q_proj" if linear in QKV_PROJECTIONS else linear
                found.setdefault((index, key), []).append(f"{path}.{name}")
    return [LinearGroup(index, tuple(sorted(paths))) for (index, _), paths in found.items()]


def quantize_linear(
    linear: Any,
    scheme: Scheme,
    hessian: Tensor | None = None,
    input_qparams: tuple[float, int] | None = None,
) -> QuantizedLinear:
    """Quantize one linear.

    Args:
        linear: an nn.Linear with weight [N, K].
        scheme: int8, int4 or nf4 weights.
        hessian: float32 [K, K], Σ x xᵀ over the linear's inputs; used where `scheme.gptq`.
        input_qparams: scale and zero point of the inputs, for static activations.
    """
    weight, bits = linear.weight.detach(), 4 if scheme.weights == "int4" else 8
    quantized: QuantizedWeight
    if scheme.weights == "nf4":
        quantized = quantize_nf4(weight, scheme.group_size)
    elif scheme.gptq and hessian is not None:
        quantized = quantize_gptq(weight, hessian, bits, scheme.group_size, symmetric=scheme.symmetric)
    else:
        quantized = weights.quantize(weight, bits, scheme.group_size, symmetric=scheme.symmetric)
    return QuantizedLinear(quantized, linear.bias, scheme.activations, input_qparams)  # type: ignore[arg-type]


def estimate_tensor_bytes(model: AnyModel) -> Iterator[tuple[str, int]]:
    """Yield each tensor of the model with its estimated size on disk in bytes, scales and zero points included.

    An export may be somewhat larger (its graph) or smaller (tensors folded into one).
    """
    net, scheme = model.net, model.scheme
    for name, module in net.named_modules():
        if isinstance(module, QuantizedLinear):
            scales = module.scale.numel() * (2 if module.group_size < module.in_features else 4)
            zeros = 0 if module.zero_point is None else module.zero_point.numel() * module.bits // 8
            bias = 0 if module.bias is None else module.bias.numel() * 4
            yield name, module.qweight.numel() * module.bits // 8 + scales + zeros + bias
    for name, weight in net.named_parameters():
        dtype = non_block_dtype(model.family, name, net.base_model_prefix)
        if scheme.weights in ("float32", "float16", "bfloat16"):
            dtype = scheme.weights
        elif weight.ndim < 2:
            dtype = "float32"
        elif dtype == "int8" and not non_block_group_size(weight):
            dtype = "float16"
        groups = -(-weight[0].numel() // non_block_group_size(weight)) if dtype == "int8" else 0
        yield name, 2 * len(weight) * groups + weight.numel() * BYTES_PER_ELEMENT[dtype]


def estimate_size_bytes(model: AnyModel) -> int:
    """Return the sum of `estimate_tensor_bytes`."""
    return sum(count for _, count in estimate_tensor_bytes(model))
