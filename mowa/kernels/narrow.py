"""Matrices of weights in few bits: made, made wide again, and a linear layer over them.

    int, group g of a row:  ŵ = s (q - z),  q in -2^(b-1) … 2^(b-1) - 1;  z = 0 where symmetric
    nf4, block of a row:    ŵ = s L[q],     s = max |w|, L the 16 quantiles of a normal distribution (QLoRA,
                                            arXiv:2305.14314, appendix E)

Inputs in eight bits, by a step t and a zero z, are what ONNX's QuantizeLinear makes of them:

    x̂ = t (clip(round(x / t) + z, 0, 255) - z),  t = (max(x, 0) - min(x, 0)) / 255,  z = round(-min(x, 0) / t)

It knows tensors; it refuses to know models, files and which layers may be narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

QuantType = Literal["int", "nf4"]
Activations = Literal["wide", "dynamic", "static"]
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
MIN_QUANT_NUMEL = 16_384  # weights: what has fewer stays in float16
FP16_TINY = 2.0**-24
FP32_TINY = torch.finfo(torch.float32).tiny
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the range: what is cut off may be worth the finer steps


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """W [N, K] in few bits: `codes` int8 [N, K], `scales` float32 [N, G], `zeros` int8 [N, G] or None (all 0).

    `group` columns share a scale; the last group of a row may be shorter. nf4: codes are 0 … 15, without zeros.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    quant_type: QuantType = "int"

    def dequantize(self) -> Tensor:
        """Ŵ float32 [N, K]."""
        codes = self.qweight.float()
        if self.quant_type == "nf4":
            codes = torch.tensor(NF4_LEVELS, device=self.qweight.device)[self.qweight.long()]
        if self.zero_point is not None:
            codes = codes - self._spread(self.zero_point.float())
        return codes * self._spread(self.scale)

    def _spread(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group_size, 1)[:, : self.qweight.shape[1]]


def choose_qparams(
    weight: Tensor, bits: int, *, symmetric: bool = True, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales [N, 1] and zeros [N, 1] (None: symmetric) of one group of columns, [N, g].

    Scales are numbers that float16 has, as files keep them. It is the grid, of some, whose squared error, weighted by
    `importance` [g], is least; so weights that lie on a grid, as training with rounded weights leaves them, get that
    very grid. Below eight bits ranges are cut off too.
    """
    best, scales, zeros = weight.new_full((len(weight), 1), torch.inf), weight[:, :1], weight[:, :1]
    for step, zero in _grids(weight, bits, symmetric):
        step = step.half().float().clamp(min=FP16_TINY)
        wrong = (quantize_dequantize(weight, step, None if symmetric else zero, bits)[1] - weight).square()
        wrong = (wrong if importance is None else wrong * importance).sum(1, keepdim=True)
        better = wrong < best
        best, scales, zeros = best.where(~better, wrong), scales.where(~better, step), zeros.where(~better, zero)
    return scales, None if symmetric else zeros


def _grids(weight: Tensor, bits: int, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    top = 2 ** (bits - 1) - 1
    least, most = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if symmetric:
        farthest = torch.maximum(-least, most)
        for levels in (top, top + 1):
            yield (farthest / levels).clamp(min=FP32_TINY), torch.zeros_like(farthest)
        for share in CLIP_RATIOS[1:] if bits < 8 else ():
            yield (farthest * share / top).clamp(min=FP32_TINY), torch.zeros_like(farthest)
        return
    for share in CLIP_RATIOS if bits < 8 else CLIP_RATIOS[:1]:
        low, high = (least * share).clamp(max=0), (most * share).clamp(min=0)
        step = ((high - low) / (2 * top + 1)).clamp(min=FP32_TINY)
        yield step, (-top - 1 - low / step).round().clamp(-top - 1, top)


def quantize_dequantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and what they stand for, of weights [N, g] on a grid."""
    top = 2 ** (bits - 1) - 1
    shift = 0 if zero_point is None else zero_point
    codes = (weight / scale + shift).round().clamp(-top - 1, top)
    return codes, (codes - shift) * scale


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int = 0,
    *,
    symmetric: bool = True,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """W [N, K] in integers; `group` columns share a scale, 0: the whole row. `importance` [K]: inputs' mean square."""
    weight, columns = weight.float(), weight.shape[1]
    group_size = group_size or columns
    codes, scales, zeros = [], [], []
    for first in range(0, columns, group_size):
        part = weight[:, first : first + group_size]
        weighs = None if importance is None else importance[first : first + group_size]
        step, zero = choose_qparams(part, bits, symmetric=symmetric, importance=weighs)
        codes.append(quantize_dequantize(part, step, zero, bits)[0])
        scales.append(step)
        zeros.append(zero)
    return QuantizedWeight(
        torch.cat(codes, 1).to(torch.int8),
        torch.cat(scales, 1),
        None if symmetric else _joined(zeros),
        bits,
        group_size,
    )


def quantize_nf4(weight: Tensor, group_size: int = 64) -> QuantizedWeight:
    """W [N, K] in nf4; K must be a multiple of `group`, as bitsandbytes lays blocks one after another."""
    blocks = weight.float().reshape(len(weight), -1, group_size)
    scales = blocks.abs().amax(-1).half().float().clamp(min=FP16_TINY)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales[..., None], between)
    return QuantizedWeight(codes.reshape(weight.shape).to(torch.int8), scales, None, 4, group_size, "nf4")


def non_block_group_size(weight: Tensor) -> int:
    """How many columns share a scale where weights beside the blocks are kept in int8; 0: too few for it.

    What is before the blocks passes its errors through all of them: by row, int8 there was seen to do ten times what
    int8 in all blocks does.
    """
    return 32 if weight[0].numel() >= 32 and weight.numel() >= MIN_QUANT_NUMEL else 0


def quantize_gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int = 0, *, symmetric: bool = True, damping: float = 0.01
) -> QuantizedWeight:
    """W [N, K] in integers, column after column, each error made good by the columns that are still wide.

    hessian float32 [K, K] = Σ x xᵀ over inputs x. GPTQ (arXiv:2210.17323): with U the upper Cholesky factor of the
    damped hessian's inverse, column k rounded to ŵ leaves e = (w - ŵ) / U[k, k], and w[j] -= e U[k, j] for j > k. What
    no input ever reached is rounded plainly.
    """
    weight, columns = weight.float().clone(), weight.shape[1]
    group_size = group_size or columns
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    importance = diagonal.float() / max(float(diagonal.mean()), FP32_TINY)
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    codes = torch.empty_like(weight)
    scales: list[Tensor] = []
    zeros: list[Tensor | None] = []
    step: Tensor = weight.new_ones(len(weight), 1)
    zero: Tensor | None = None
    block = min(group_size, 128)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = weight.new_zeros(len(weight), last - first)
        for k in range(first, last):
            if k % group_size == 0:
                part = weight[:, k : k + group_size]
                step, zero = choose_qparams(part, bits, symmetric=symmetric, importance=importance[k : k + group_size])
                scales.append(step)
                zeros.append(zero)
            codes[:, k : k + 1], made = quantize_dequantize(weight[:, k : k + 1], step, zero, bits)
            error = (weight[:, k] - made[:, 0]) / upper[k, k]
            weight[:, k:last] -= error[:, None] * upper[k, k:last]
            errors[:, k - first] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return QuantizedWeight(
        codes.to(torch.int8), torch.cat(scales, 1), None if symmetric else _joined(zeros), bits, group_size
    )


def _joined(zeros: list[Tensor | None]) -> Tensor:
    return torch.cat([zero for zero in zeros if zero is not None], 1).to(torch.int8)


def choose_input_qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    """t and z of inputs, scalars, as ONNX's DynamicQuantizeLinear finds them."""
    low, high = torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (-low / step).round().clamp(0, 255)


class QuantizedLinear(nn.Module):
    """y = x̂ Ŵᵀ + b. Called with x [..., K] → [..., N] in x.dtype; this is the reference, engines have their own way.

    `activations`: wide (x̂ = x), dynamic (by the range of each x as it comes), static (by `step` and `zero`, seen
    before). `weight` is Ŵ, made anew whenever it is asked for.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None,
        activations: Activations = "wide",
        input_qparams: tuple[float, int] | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.group_size, self.quant_type, self.activations = (
            quantized.bits,
            quantized.group_size,
            quantized.quant_type,
            activations,
        )
        self.out_features, self.in_features = quantized.qweight.shape
        for name, value in (("codes", quantized.qweight), ("scales", quantized.scale), ("zeros", quantized.zero_point)):
            self.register_buffer(name, value)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("step", None if input_qparams is None else torch.tensor(input_qparams[0]))
        self.register_buffer("zero", None if input_qparams is None else torch.tensor(float(input_qparams[1])))

    @property
    def quantized_weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.qweight, self.scale, self.zero_point, self.bits, self.group_size, self.quant_type)

    @property
    def weight(self) -> Tensor:
        return self.quantized_weight.dequantize()

    @property
    def input_qparams(self) -> tuple[float, int] | None:
        return (
            None
            if self.input_scale is None or self.input_zero_point is None
            else (float(self.input_scale), int(self.input_zero_point))
        )

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.float()
        if self.activations != "wide":
            step, zero = (
                choose_input_qparams(inputs)
                if self.input_scale is None or self.input_zero_point is None
                else (self.input_scale, self.input_zero_point)
            )
            inputs = ((inputs / step).round() + zero).clamp(0, 255).sub(zero) * step
        return functional.linear(inputs, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        group = "row" if self.group_size >= self.in_features else str(self.group_size)
        form = "nf4" if self.quant_type == "nf4" else f"int{self.bits}"
        return f"{self.in_features}, {self.out_features}, {form} by {group}, x {self.activations}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Scales stay float32 whatever the net is converted to: only the device may change."""
        for name, value in list(self._buffers.items()):
            if value is not None:
                moved = fn(value)
                self._buffers[name] = value.to(moved.device) if moved.dtype != value.dtype else moved
        return self
