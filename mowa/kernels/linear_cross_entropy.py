"""The head of a language model and its loss in one operation, without the logits of all tokens at once.

    z_n = c · tanh(s · (W h_n + b) / c)      s = scale, c = softcap; without one z_n = s · (W h_n + b)
    l_n = -Σ_v q_nv · log softmax(z_n)_v     q_n = (1 - ε) · onehot(t_n) + ε / V,  ε = label_smoothing
    dl_n/da_n = s · (softmax(z_n) - q_n) · (1 - tanh²(…)),  a_n = W h_n + b

Ignored tokens are dropped before the product; the others are processed in chunks. The logits of a chunk become its
softmax and then its gradient in one buffer. A token's gradient is linear in its upstream gradient, so the forward pass
already stores the gradient of each hidden state and the backward pass scales it: two products of the size of the head,
where recomputation takes three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mowa.errors import DataError

MIB = 2**20
# logits per chunk: about 100 tokens keep two CPU cores busy, about 300 an H100
CHUNK_BYTES = {"cpu": 128 * MIB, "cuda": 256 * MIB}
BLOCK_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}  # logits per softmax call: what a CPU's cache holds
# float16 gradients are stored scaled up, as those below 3e-8 would become 0; |W| must stay < 32
FP16_GRAD_SCALE = 1024.0


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model assigns to each target token, in the shape of the targets; 0 (False) where ignored.

    Attributes:
        log_probs: of the target, nats, float32 (float64 if hidden is); with label smoothing, minus the smoothed loss.
            Differentiable with respect to hidden, weight and bias.
        entropy: of the distribution, nats, same dtype, without gradient; None if not requested.
        is_top1: bool, whether the target has the highest logit (of equal ones, the first counts).
    """

    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor


@dataclass(frozen=True, slots=True)
class _Options:
    """Settings of the pass over the chunks. needs_grad: whether any gradient is required."""

    scale: float
    softcap: float | None
    label_smoothing: float
    chunk_bytes: int | None
    entropy: bool = False
    is_top1: bool = False
    compute_dtype: torch.dtype = torch.float32
    needs_grad: bool = False

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.promote_types(self.compute_dtype, torch.float32)

    @property
    def grad_scale(self) -> float:
        return FP16_GRAD_SCALE if self.compute_dtype == torch.float16 else 1.0

    def chunk_and_block_tokens(self, weight: Tensor) -> tuple[int, int]:
        """Return the number of tokens per chunk, and per softmax block of a chunk."""
        device_type = weight.device.type if weight.device.type in CHUNK_BYTES else "cuda"
        chunk = self.chunk_bytes or CHUNK_BYTES[device_type]
        token = max(1, len(weight)) * self.accumulate_dtype.itemsize
        return max(1, chunk // token), max(1, min(chunk, BLOCK_BYTES[device_type]) // token)


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    entropy: bool = True,
    chunk_bytes: int | None = None,
) -> TokenScores:
    """Score each target token.

    hidden, weight and bias have one float dtype, or torch.autocast casts them as for a linear. Products are computed in
    that dtype, everything after them in float32 or wider. Gradients are computed in the forward pass, so it is once
    differentiable. The gradient of a trainable weight is accumulated there too, in float32, for equal upstream
    gradients (any sum or mean over tokens); for unequal ones the backward pass computes it again from the logits on.

    Under DeepSpeed ZeRO-3 the caller gathers weight and bias around the forward and the backward pass.

    Args:
        hidden: [..., D].
        weight: [V, D].
        targets: [...] int64.
        bias: [V] or None.
        scale: factor of the logits.
        softcap: c of the soft-cap, or None.
        ignore_index: targets to skip.
        label_smoothing: ε.
        entropy: whether to return entropies.
        chunk_bytes: size of the float32 logits computed at a time; None: what keeps this kind of device busy.

    Raises:
        DataError: a target is outside the vocabulary.
        ValueError: shapes or dtypes do not fit.
    """
    options = _Options(scale, softcap, label_smoothing, chunk_bytes, entropy, is_top1=True)
    index, log_probs, nats, is_top1 = _score_targets(hidden, weight, targets, bias, ignore_index, options)
    nats = None if nats is None else _scatter(nats, index, targets)
    return TokenScores(_scatter(log_probs, index, targets), nats, _scatter(is_top1, index, targets))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return cross_entropy(softcap(scale · linear(hidden, weight, bias)), targets), as torch.nn.functional defines it.

    Arguments and errors are those of `score_tokens`. The result is a scalar, or [...] for reduction="none", in float32
    (float64 if hidden is). Where all targets are ignored, the mean is 0 instead of NaN, with zero gradients.

    Args:
        reduction: mean, sum or none.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is mean, sum or none, not {reduction}")
    options = _Options(scale, softcap, label_smoothing, chunk_bytes)
    index, log_probs, _, _ = _score_targets(hidden, weight, targets, bias, ignore_index, options)
    if reduction == "sum":
        return -log_probs.sum()
    if reduction == "mean":
        return log_probs.sum() / -max(len(log_probs), 1)
    return -_scatter(log_probs, index, targets)


def _scatter(values: Tensor, index: Tensor | None, targets: Tensor) -> Tensor:
    """Values of the tokens in `index` → in the shape of targets, 0 elsewhere."""
    full = values if index is None else values.new_zeros(targets.numel()).index_copy(0, index, values)
    return full.view(targets.shape)


def _score_targets(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, options: _Options
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Return the indices of the tokens not ignored (None: all), their log-probabilities, entropies and top-1 hits."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = (tuple(part.shape) for part in (hidden, weight, targets))
        raise ValueError(
            "shapes do not fit: hidden {}, weight {}, targets {}; expected [..., D], [V, D], [...]".format(*shapes)
        )
    device_type = weight.device.type
    casting = torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64
    if not casting and len({hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype}) > 1:
        raise ValueError(f"hidden is {hidden.dtype}, weight or bias is not; cast one, or use autocast")
    compute = torch.get_autocast_dtype(device_type) if casting else hidden.dtype

    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    index: Tensor | None = (wanted != ignore_index).nonzero()[:, 0]
    if index is not None and len(index) < len(wanted):
        rows, wanted = rows.index_select(0, index), wanted.index_select(0, index)
    else:
        index = None
    vocabulary = weight.shape[0]
    if len(wanted) and bool(((wanted < 0) | (wanted >= vocabulary)).any()):
        raise DataError(
            f"target ids range from {int(wanted.min())} to {int(wanted.max())}, but the head has {vocabulary} tokens; "
            "use the model's own tokenizer, or resize the head"
        )
    options = replace(options, compute_dtype=compute, needs_grad=torch.is_grad_enabled())
    log_probs, nats, is_top1 = _LinearCrossEntropy.apply(rows, weight, bias, wanted, options)
    return index, log_probs, nats, is_top1


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        to_hidden, to_weight, to_bias = (options.needs_grad and needed for needed in ctx.needs_input_grad[:3])
        needs_grad = to_hidden or to_weight or to_bias
        with torch.autocast(weight.device.type, enabled=False):
            stats = _TokenStats.allocate(len(targets), weight.device, options)
            low = weight.to(options.compute_dtype)
            d_hidden = torch.empty_like(hidden, dtype=options.compute_dtype) if to_hidden else None
            sums = _WeightGradients.allocate(weight, bias, to_weight, to_bias, options)
            for part, rows, d_logits in _chunks(hidden, low, bias, targets, options, stats, None, needs_grad):
                if d_hidden is not None:
                    torch.mm(d_logits, low, out=d_hidden[part])
                sums.add(d_logits, rows)
        ctx.options, ctx.sums = options, sums
        ctx.save_for_backward(d_hidden, *((hidden, weight, bias, targets) if to_weight or to_bias else (None,) * 4))
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*(part for part in (stats.entropy, stats.is_top1) if part is not None))
        return stats.log_probs, stats.entropy, stats.is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        unit_d_hidden, hidden, weight, bias, targets = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        # the gradient of the loss was saved; upstream is that of the log-probability
        factor = -options.scale / options.grad_scale
        d_hidden = d_weight = d_bias = None
        with torch.autocast(upstream.device.type, enabled=False):  # regardless of backward()'s caller
            if to_hidden:
                d_hidden = (unit_d_hidden * (upstream * factor)[:, None]).to(ctx.dtypes[0])
            if to_weight or to_bias:
                # not among the saved tensors, so that it can be scaled in place; a second backward pass recomputes it
                sums, ctx.sums = ctx.sums, None
                if sums is not None and _all_equal(upstream):
                    unit = upstream[0] if len(upstream) else upstream.new_zeros(())
                else:
                    del sums
                    unit = upstream.abs().amax()
                    # at most 1, within the range of float16
                    relative = upstream / unit.clamp_min(torch.finfo(upstream.dtype).tiny)
                    sums = _WeightGradients.allocate(weight, bias, to_weight, to_bias, options)
                    low = weight.to(options.compute_dtype)
                    for _part, rows, d_logits in _chunks(hidden, low, bias, targets, options, None, relative, True):
                        sums.add(d_logits, rows)
                d_weight = sums.scaled(sums.weight, unit * factor, ctx.dtypes[1])
                d_bias = sums.scaled(sums.bias, unit * factor, ctx.dtypes[2])
        return d_hidden, d_weight, d_bias, None, None


def _all_equal(upstream: Tensor) -> bool:
    """Whether all elements are equal; for an expanded scalar this needs no synchronization with the device."""
    return len(upstream) < 2 or upstream.stride(0) == 0 or bool((upstream == upstream[0]).all())


@dataclass(frozen=True, slots=True)
class _TokenStats:
    """What the forward pass computes for each token."""

    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None

    @classmethod
    def allocate(cls, count: int, device: torch.device, options: _Options) -> _TokenStats:
        log_probs = torch.empty(count, dtype=options.accumulate_dtype, device=device)
        entropy = torch.empty_like(log_probs) if options.entropy else None
        return cls(log_probs, entropy, torch.empty_like(log_probs, dtype=torch.bool) if options.is_top1 else None)


@dataclass(frozen=True, slots=True)
class _WeightGradients:
    """Gradients of weight [V, D] and bias [V], summed over tokens in float32 or wider; None where not required."""

    weight: Tensor | None
    bias: Tensor | None
    block: int

    @classmethod
    def allocate(
        cls, weight: Tensor, bias: Tensor | None, to_weight: bool, to_bias: bool, options: _Options
    ) -> _WeightGradients:
        return cls(
            torch.zeros_like(weight, dtype=options.accumulate_dtype) if to_weight else None,
            torch.zeros_like(bias, dtype=options.accumulate_dtype) if bias is not None and to_bias else None,
            max(1, options.chunk_and_block_tokens(weight)[1] * weight.shape[0] // weight.shape[1]),
        )

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        """Add the gradients of one chunk: d_logits [C, V], hidden [C, D]."""
        if self.bias is not None:
            self.bias.add_(d_logits.sum(0, dtype=self.bias.dtype))
        if self.weight is None:
            return
        if d_logits.dtype == self.weight.dtype:
            self.weight.addmm_(d_logits.t(), hidden)
            return
        # multiply in float32, one block of the vocabulary at a time: low precision would round once per chunk
        for some, out in zip(d_logits.split(self.block, 1), self.weight.split(self.block), strict=True):
            if d_logits.is_cuda:
                out.add_(torch.mm(some.t(), hidden, out_dtype=self.weight.dtype))
            else:
                out.addmm_(some.t().to(self.weight.dtype), hidden.to(self.weight.dtype))

    @staticmethod
    def scaled(total: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        return None if total is None else total.mul_(factor).to(dtype)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: _Options,
    stats: _TokenStats | None,
    upstream: Tensor | None,
    needs_grad: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each chunk's slice of tokens, hidden states [C, D] and, if needed, d loss / d logits before `scale` [C, V].

    The gradient is multiplied by `upstream` [M], if given, and by `options.grad_scale`; the next chunk overwrites it.
    The token statistics are written to `stats`.
    """
    count, (chunk, block) = len(targets), options.chunk_and_block_tokens(weight)
    rows = -(-count // max(1, -(-count // chunk)))  # equal chunks instead of a small last one
    buffer = torch.empty(rows, len(weight), dtype=options.compute_dtype, device=weight.device)
    scratch = torch.empty(min(block, rows), len(weight), dtype=options.accumulate_dtype, device=weight.device)
    for start in range(0, count, rows or 1):
        part = slice(start, min(start + rows, count))
        states = hidden[part].to(options.compute_dtype)
        logits = buffer[: len(states)]
        if bias is None:
            logits.addmm_(states, weight.t(), beta=0, alpha=options.scale)
        else:
            torch.addmm(
                bias.to(options.compute_dtype), states, weight.t(), beta=options.scale, alpha=options.scale, out=logits
            )
        for first in range(start, part.stop, len(scratch)):
            some = slice(first, min(first + len(scratch), part.stop))
            weights = None if upstream is None else upstream[some, None]
            inner = logits[some.start - start : some.stop - start]
            _softmax_and_gradient(
                inner, targets[some, None], options, scratch[: len(inner)], stats, some, weights, needs_grad
            )
        yield part, states, logits


def _softmax_and_gradient(
    logits: Tensor,
    targets: Tensor,
    options: _Options,
    log_probs: Tensor,
    stats: _TokenStats | None,
    where: slice,
    upstream: Tensor | None,
    needs_grad: bool,
) -> None:
    """Turn logits [R, V] into the gradient of the loss, in place, and write statistics to `stats`.

    targets and upstream are [R, 1]; log_probs [R, V] is scratch memory.
    """
    wide = logits.to(options.accumulate_dtype)
    if options.softcap is not None:
        wide.div_(options.softcap).tanh_()
    torch.log_softmax(wide if options.softcap is None else wide * options.softcap, -1, out=log_probs)
    if stats is not None:
        chosen = log_probs.gather(1, targets)[:, 0]
        smoothing = options.label_smoothing
        stats.log_probs[where] = torch.lerp(chosen, log_probs.mean(-1), smoothing) if smoothing else chosen
        if stats.is_top1 is not None:
            torch.eq(log_probs.argmax(-1), targets[:, 0], out=stats.is_top1[where])
    entropy = None if stats is None else stats.entropy
    if entropy is None and not needs_grad:
        return
    probs = torch.exp(log_probs, out=wide) if options.softcap is None else log_probs.exp()
    if entropy is not None:
        log_probs.clamp_(min=torch.finfo(options.accumulate_dtype).min)  # with a bias of -inf, 0 · -inf must be 0
        entropy[where] = torch.bmm(probs[:, None], log_probs[:, :, None]).view(-1).neg_()
    if not needs_grad:
        return
    probs.scatter_add_(1, targets, probs.new_full((), options.label_smoothing - 1).expand_as(targets))
    if options.label_smoothing:
        probs.sub_(options.label_smoothing / logits.shape[1])
    if options.softcap is not None:
        probs.mul_(wide.square_().neg_().add_(1))
    if upstream is not None:
        probs.mul_(upstream)
    if options.grad_scale != 1:
        probs.mul_(options.grad_scale)
    if probs is not logits:
        logits.copy_(probs)
