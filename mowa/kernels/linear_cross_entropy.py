"""The head of a language model and its loss in one operation: the logits of all tokens never exist.

    z_n = c · tanh(s · (W h_n + b) / c)      s = scale, c = softcap; without one z_n = s · (W h_n + b)
    l_n = -Σ_v q_nv · log softmax(z_n)_v     q_n = (1 - ε) · onehot(t_n) + ε / V,  ε = smoothing
    dl_n/da_n = s · (softmax(z_n) - q_n) · (1 - tanh²(…)),  a_n = W h_n + b

Tokens nothing is learnt from are left out before the product, the rest are gone through a chunk at a time. The product
of a chunk becomes its softmax and then its gradient in the one buffer it was made in. A token's gradient is linear in
its own upstream number, so the forward pass leaves the finished gradient of each hidden state behind and the backward
pass scales it: two products of the size of the head, where recomputing takes three. It knows no models and no batches.
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
CHUNK_BYTES = {"cpu": 128 * MIB, "cuda": 256 * MIB}  # logits at a time: some 100 rows fill two cores, some 300 an H100
BLOCK_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}  # of them the softmax works on so much: what a processor's cache holds
FP16_GRAD_SCALE = (
    1024.0  # unit gradients in float16 are kept so much larger, or the many below 3e-8 would be 0; |W| stays < 32
)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of each token, in the shape of the targets; 0 (False) where the target is `ignore_index`.

    log_probs: float32 (float64 if hidden is), of the target; with smoothing, minus the smoothed loss. Differentiable
    with respect to hidden, weight and bias. entropy: nats, the same dtype, without gradient; None if not asked for.
    right: bool, the target is the likeliest token (of equally likely ones, the first).
    """

    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor


@dataclass(frozen=True, slots=True)
class _How:
    """What the pass over the chunks has to know. learning: whether gradients are wanted at all."""

    scale: float
    softcap: float | None
    smoothing: float
    budget: int | None
    entropy: bool = False
    right: bool = False
    compute: torch.dtype = torch.float32
    learning: bool = False

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.compute, torch.float32)

    @property
    def lift(self) -> float:
        return FP16_GRAD_SCALE if self.compute == torch.float16 else 1.0

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """Tokens in a chunk, and in a block of it."""
        kind = weight.device.type if weight.device.type in CHUNK_BYTES else "cuda"
        chunk, row = self.budget or CHUNK_BYTES[kind], max(1, len(weight)) * self.wide.itemsize
        return max(1, chunk // row), max(1, min(chunk, BLOCK_BYTES[kind]) // row)


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
    """What the model makes of each target: hidden [..., D], weight [V, D], bias [V], targets [...] int64 → `Scores`.

    hidden, weight and bias are of one float dtype, or torch.autocast is on and casts them as it would for a linear.
    Products are made in that dtype, everything after them in float32 or wider. budget: bytes of logits at a time, as if
    in float32; by default what keeps the products of this kind of device efficient. Gradients are made in the forward
    pass: once differentiable. Where the weight learns, its gradient is made there too, in float32, for equal upstream
    numbers (any sum or mean over tokens); for others, it is made anew in the backward pass, from the logits on.

    Under DeepSpeed ZeRO-3 the caller gathers weight and bias around the forward and the backward pass.

    Raises DataError for a target beyond the vocabulary, ValueError where shapes or dtypes do not fit.
    """
    how = _How(scale, softcap, label_smoothing, chunk_bytes, entropy, right=True)
    index, log_probs, extra, right = _learnt(hidden, weight, targets, bias, ignore_index, how)
    extra = None if extra is None else _spread(extra, index, targets)
    return TokenScores(_spread(log_probs, index, targets), extra, _spread(right, index, targets))


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
    """cross_entropy(softcap(scale · linear(hidden, weight, bias)), targets), as torch's functional ones define them.

    hidden [..., D], weight [V, D], bias [V], targets [...] int64 → a number, or [...] without reduction; in float32
    (float64 if hidden is) whatever the dtype of hidden. Where no target is left the mean is 0 and not NaN, with zero
    gradients: a micro-batch of prompts alone does no harm. Everything else, errors too, is as `score` has it.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is mean, sum or none, not {reduction}")
    how = _How(scale, softcap, label_smoothing, chunk_bytes)
    index, log_probs, _, _ = _learnt(hidden, weight, targets, bias, ignore_index, how)
    if reduction == "sum":
        return -log_probs.sum()
    if reduction == "mean":
        return log_probs.sum() / -max(len(log_probs), 1)
    return -_spread(log_probs, index, targets)


def _spread(part: Tensor, index: Tensor | None, targets: Tensor) -> Tensor:
    """One number of each token in `index` → in the shape of targets, 0 where there is none."""
    whole = part if index is None else part.new_zeros(targets.numel()).index_copy(0, index, part)
    return whole.view(targets.shape)


def _learnt(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, how: _How
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Which tokens are learnt from (none said: all), and log-probabilities, entropy, hits of these alone."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = (tuple(part.shape) for part in (hidden, weight, targets))
        raise ValueError("hidden {}, weight {} and targets {} do not fit: [..., D], [V, D], [...]".format(*shapes))
    kind = weight.device.type
    casting = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    if not casting and len({hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype}) > 1:
        raise ValueError(f"hidden is {hidden.dtype}, weight or bias is not; cast one, or turn autocast on")
    compute = torch.get_autocast_dtype(kind) if casting else hidden.dtype

    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    index: Tensor | None = (wanted != ignore_index).nonzero()[:, 0]
    if index is not None and len(index) < len(wanted):
        rows, wanted = rows.index_select(0, index), wanted.index_select(0, index)
    else:
        index = None
    vocabulary = weight.shape[0]
    if len(wanted) and bool(((wanted < 0) | (wanted >= vocabulary)).any()):
        raise DataError(
            f"targets run from {int(wanted.min())} to {int(wanted.max())}, and the model's head has {vocabulary} "
            "tokens; tokenise with the model's own tokenizer, or resize the head"
        )
    how = replace(how, compute=compute, learning=torch.is_grad_enabled())
    log_probs, extra, hits = _LinearCrossEntropy.apply(rows, weight, bias, wanted, how)
    return index, log_probs, extra, hits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        to_hidden, to_weight, to_bias = (how.learning and needed for needed in ctx.needs_input_grad[:3])
        learning = to_hidden or to_weight or to_bias
        with torch.autocast(weight.device.type, enabled=False):
            found = _Found.room(len(targets), weight.device, how)
            low = weight.to(how.compute)
            back = torch.empty_like(hidden, dtype=how.compute) if to_hidden else None
            sums = _Sums.room(weight, bias, to_weight, to_bias, how)
            for part, rows, flow in _chunks(hidden, low, bias, targets, how, found, None, learning):
                if back is not None:
                    torch.mm(flow, low, out=back[part])
                sums.add(flow, rows)
        ctx.how, ctx.unit = how, sums
        ctx.save_for_backward(back, *((hidden, weight, bias, targets) if to_weight or to_bias else (None,) * 4))
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*(part for part in (found.entropy, found.right) if part is not None))
        return found.log_probs, found.entropy, found.right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        back, hidden, weight, bias, targets = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        factor = -how.scale / how.lift  # of the log-probability, the loss's is kept
        d_hidden = d_weight = d_bias = None
        with torch.autocast(upstream.device.type, enabled=False):  # whatever the caller of backward() has set
            if to_hidden:
                d_hidden = (back * (upstream * factor)[:, None]).to(ctx.dtypes[0])
            if to_weight or to_bias:
                # kept here and not with the saved tensors, so that it can be scaled where it is; a second backward
                # pass through the same graph finds it gone
                sums, ctx.unit = ctx.unit, None
                if sums is not None and _equal(upstream):
                    unit = upstream[0] if len(upstream) else upstream.new_zeros(())
                else:
                    del sums
                    unit = upstream.abs().amax()
                    share = upstream / unit.clamp_min(torch.finfo(upstream.dtype).tiny)  # float16 could not hold it
                    sums = _Sums.room(weight, bias, to_weight, to_bias, how)
                    low = weight.to(how.compute)
                    for _part, rows, flow in _chunks(hidden, low, bias, targets, how, None, share, True):
                        sums.add(flow, rows)
                d_weight = sums.scaled(sums.weight, unit * factor, ctx.dtypes[1])
                d_bias = sums.scaled(sums.bias, unit * factor, ctx.dtypes[2])
        return d_hidden, d_weight, d_bias, None, None


def _equal(upstream: Tensor) -> bool:
    """Whether all its numbers are one; where a sum was expanded, that is known without asking the device."""
    return len(upstream) < 2 or upstream.stride(0) == 0 or bool((upstream == upstream[0]).all())


@dataclass(frozen=True, slots=True)
class _Found:
    """What the forward pass finds of each token."""

    log_probs: Tensor
    entropy: Tensor | None
    right: Tensor | None

    @classmethod
    def room(cls, count: int, device: torch.device, how: _How) -> _Found:
        log_probs = torch.empty(count, dtype=how.wide, device=device)
        entropy = torch.empty_like(log_probs) if how.entropy else None
        return cls(log_probs, entropy, torch.empty_like(log_probs, dtype=torch.bool) if how.right else None)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Gradients of weight [V, D] and bias [V], summed over tokens in float32 or wider; None where none is wanted."""

    weight: Tensor | None
    bias: Tensor | None
    block: int

    @classmethod
    def room(cls, weight: Tensor, bias: Tensor | None, to_weight: bool, to_bias: bool, how: _How) -> _Sums:
        return cls(
            torch.zeros_like(weight, dtype=how.wide) if to_weight else None,
            torch.zeros_like(bias, dtype=how.wide) if bias is not None and to_bias else None,
            max(1, how.sizes(weight)[1] * weight.shape[0] // weight.shape[1]),
        )

    def add(self, flow: Tensor, rows: Tensor) -> None:
        """flow [C, V], rows [C, D]."""
        if self.bias is not None:
            self.bias.add_(flow.sum(0, dtype=self.bias.dtype))
        if self.weight is None:
            return
        if flow.dtype == self.weight.dtype:
            self.weight.addmm_(flow.t(), rows)
            return
        # a product rounded before it is added would be rounded once a chunk: made wide, so many tokens at a time
        for some, out in zip(flow.split(self.block, 1), self.weight.split(self.block), strict=True):
            if flow.is_cuda:
                out.add_(torch.mm(some.t(), rows, out_dtype=self.weight.dtype))
            else:
                out.addmm_(some.t().to(self.weight.dtype), rows.to(self.weight.dtype))

    @staticmethod
    def scaled(total: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        return None if total is None else total.mul_(factor).to(dtype)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    how: _How,
    found: _Found | None,
    upstream: Tensor | None,
    learning: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which tokens, their hidden states, and (while learning) the gradient of their loss before `scale`, [C, V].

    Times `upstream` [M] if there is one, and `how.lift`. It is overwritten by the next. What is found goes to `found`.
    """
    count, (most, block) = len(targets), how.sizes(weight)
    rows = -(-count // max(1, -(-count // most)))  # chunks of one size, not a small one last
    buffer = torch.empty(rows, len(weight), dtype=how.compute, device=weight.device)
    scratch = torch.empty(min(block, rows), len(weight), dtype=how.wide, device=weight.device)
    for start in range(0, count, rows or 1):
        part = slice(start, min(start + rows, count))
        states = hidden[part].to(how.compute)
        logits = buffer[: len(states)]
        if bias is None:
            logits.addmm_(states, weight.t(), beta=0, alpha=how.scale)
        else:
            torch.addmm(bias.to(how.compute), states, weight.t(), beta=how.scale, alpha=how.scale, out=logits)
        for first in range(start, part.stop, len(scratch)):
            some = slice(first, min(first + len(scratch), part.stop))
            share = None if upstream is None else upstream[some, None]
            inner = logits[some.start - start : some.stop - start]
            _settle(inner, targets[some, None], how, scratch[: len(inner)], found, some, share, learning)
        yield part, states, logits


def _settle(
    logits: Tensor,
    targets: Tensor,
    how: _How,
    logs: Tensor,
    found: _Found | None,
    where: slice,
    upstream: Tensor | None,
    learning: bool,
) -> None:
    """logits [R, V] → the gradient of the loss, in place; targets and upstream [R, 1]; logs [R, V] is room to work."""
    wide = logits.to(how.wide)
    if how.softcap is not None:
        wide.div_(how.softcap).tanh_()
    torch.log_softmax(wide if how.softcap is None else wide * how.softcap, -1, out=logs)
    if found is not None:
        said = logs.gather(1, targets)[:, 0]
        found.log_probs[where] = torch.lerp(said, logs.mean(-1), how.smoothing) if how.smoothing else said
        if found.right is not None:
            torch.eq(logs.argmax(-1), targets[:, 0], out=found.right[where])
    entropy = None if found is None else found.entropy
    if entropy is None and not learning:
        return
    probs = torch.exp(logs, out=wide) if how.softcap is None else logs.exp()
    if entropy is not None:
        logs.clamp_(min=torch.finfo(how.wide).min)  # a bias of -inf: 0 · -inf is meant to be 0
        entropy[where] = torch.bmm(probs[:, None], logs[:, :, None]).view(-1).neg_()
    if not learning:
        return
    probs.scatter_add_(1, targets, probs.new_full((), how.smoothing - 1).expand_as(targets))
    if how.smoothing:
        probs.sub_(how.smoothing / logits.shape[1])
    if how.softcap is not None:
        probs.mul_(wide.square_().neg_().add_(1))
    if upstream is not None:
        probs.mul_(upstream)
    if how.lift != 1:
        probs.mul_(how.lift)
    if probs is not logits:
        logits.copy_(probs)
