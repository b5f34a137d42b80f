"""Select an attention backend by a rule over `AttentionSpec`, used by `attend` and by `mowa explain` alike.

Backends are not tried and caught: each one that is not used is listed with the reason. This module uses no tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from inspect import signature

HALF_DTYPES = ("float16", "bfloat16")
MAX_HEAD_DIM = 256  # of FlashAttention


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The facts on which the choice of backend depends.

    Attributes:
        device: cpu, cuda, …
        dtype: of q, k and v, as torch names it.
        head_dim: of queries and keys.
        v_head_dim: of values.
        q_len: number of queries.
        kv_len: number of keys.
        documents: rows are packed.
        windowed: a window hides some keys.
        causal: no query sees later keys.
        has_dense_mask: there is a dense mask, or padding inside a cache.
        softcap: scores are soft-capped.
        sinks: heads have sink logits.
        dropout: weights are dropped.
        requires_grad: gradients are wanted.
        capability: CUDA compute capability.
        packages: those of `available_packages` that are installed.
    """

    device: str
    dtype: str
    head_dim: int
    v_head_dim: int
    q_len: int
    kv_len: int
    documents: bool = False
    windowed: bool = False
    causal: bool = False
    has_dense_mask: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    requires_grad: bool = False
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()

    @property
    def full_or_causal(self) -> bool:
        """Whether every query of a row sees all of it, or all before it: one call of torch's sdpa can do that."""
        return not (self.documents or self.windowed or self.softcap or self.sinks)


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The selected backend, what it does, and why each better one was rejected."""

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...]


def _flash(spec: AttentionSpec) -> str:
    """What no FlashAttention supports."""
    if spec.device != "cuda":
        return "requires a CUDA device"
    if spec.dtype not in HALF_DTYPES:
        return f"requires float16 or bfloat16, not {spec.dtype}"
    if max(spec.head_dim, spec.v_head_dim) > MAX_HEAD_DIM:
        return f"head size above {MAX_HEAD_DIM}"
    if spec.head_dim != spec.v_head_dim:
        return "keys and values have different head sizes"
    if spec.has_dense_mask:
        return "dense mask, or padding in a cache"
    if spec.sinks:
        return "no attention sinks"
    if spec.q_len != spec.kv_len:
        return "different numbers of queries and keys"
    return ""


def _flash3(spec: AttentionSpec) -> str:
    if reason := _flash(spec):
        return reason
    if spec.capability[0] != 9:
        return "requires compute capability 9.x"
    if spec.dropout:
        return "no dropout"
    if spec.softcap and spec.requires_grad:
        return "no gradient of the soft-cap"
    return "" if "flash_attn_interface" in spec.packages else "flash_attn_interface is not installed"


def _flash2(spec: AttentionSpec) -> str:
    if reason := _flash(spec):
        return reason
    if spec.capability < (8, 0):
        return "requires compute capability 8.0 or later"
    if spec.full_or_causal:
        return "sdpa does the same for whole rows"
    if spec.softcap and spec.dropout:
        return "no dropout together with a soft-cap"
    return "" if "flash_attn" in spec.packages else "flash_attn is not installed"


def _varlen(spec: AttentionSpec) -> str:
    if reason := _flash(spec):
        return reason
    if spec.capability < (8, 0):
        return "requires compute capability 8.0 or later"
    if spec.full_or_causal:
        return "sdpa does the same for whole rows"
    if spec.dropout:
        return "no dropout"
    if spec.softcap:
        return "no soft-cap"
    if "varlen" not in spec.packages:
        return "not in this version of torch"
    return "no windows in this version of torch" if spec.windowed and "varlen_window" not in spec.packages else ""


def _flex(spec: AttentionSpec) -> str:
    if spec.device != "cuda":
        return "requires a CUDA device"
    if spec.full_or_causal:
        return "sdpa is faster for whole rows"
    if spec.has_dense_mask:
        return "dense mask, or padding in a cache"
    if spec.q_len != spec.kv_len:
        return "different numbers of queries and keys"
    if spec.dropout:
        return "no dropout"
    if spec.dtype == "float64":
        return "no float64"
    if min(spec.head_dim, spec.v_head_dim) < 16:
        return "head size below 16"
    if spec.capability < (8, 0):
        return "requires compute capability 8.0 or later"
    return "" if "triton" in spec.packages else "Triton is not installed"


def _sdpa(spec: AttentionSpec) -> str:
    if spec.softcap:
        return "no soft-cap"
    if spec.sinks:
        return "no attention sinks"
    if spec.documents:
        return "would need a dense [T, T] mask"
    if spec.dropout and spec.device == "cpu":
        return "its dropout is slow on CPUs"
    if spec.windowed and spec.q_len > 1 and not spec.has_dense_mask:
        return "would need a dense [T, T] mask"
    return ""


def _documents(spec: AttentionSpec) -> str:
    if not spec.documents:
        return "the rows are not packed"
    if spec.dropout and spec.device == "cpu":
        return "its dropout is slow on CPUs"
    return "no soft-cap or sinks in sdpa" if spec.softcap or spec.sinks else ""


def _blocks(spec: AttentionSpec) -> str:
    return "no dropout" if spec.dropout else ""


# Name, reason against it (empty: usable), description; the first usable one is selected.
BACKENDS: tuple[tuple[str, Callable[[AttentionSpec], str], str], ...] = (
    ("flash3", _flash3, "FlashAttention 3"),
    ("flash2", _flash2, "FlashAttention 2"),
    ("flash_varlen", _varlen, "torch's variable-length FlashAttention"),
    ("flex", _flex, "compiled FlexAttention, skipping blocks that no query sees"),
    ("sdpa", _sdpa, "torch's scaled_dot_product_attention, in one call"),
    ("documents", _documents, "sdpa on each document separately, without a dense mask"),
    ("blocks", _blocks, "blocks of queries against the keys they see; scores are recomputed in the backward pass"),
    ("weights", lambda spec: "", "explicit attention weights with dropout, per document"),
)


@lru_cache(maxsize=4096)
def select_backend(spec: AttentionSpec) -> BackendChoice:
    """Return the first of `BACKENDS` that supports the case."""
    rejected: list[tuple[str, str]] = []
    for backend, reason_against, description in BACKENDS:
        if not (reason := reason_against(spec)):
            return BackendChoice(backend, description, tuple(rejected))
        rejected.append((backend, reason))
    raise AssertionError("the last backend supports everything")


@cache
def available_packages() -> frozenset[str]:
    """Return which optional backends are installed: flash_attn, flash_attn_interface, triton, varlen, varlen_window."""
    found = {name for name in ("flash_attn", "flash_attn_interface", "triton") if find_spec(name)}
    if find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        found.add("varlen")
        if "window_size" in signature(varlen_attn).parameters:
            found.add("varlen_window")
    return frozenset(found)
