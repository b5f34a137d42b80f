"""By which way attention is computed: a rule over facts, the same for `attend` and for whoever asks why.

Nothing is tried and caught; what a way does not take is said in words. No tensors here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from inspect import signature

HALF_DTYPES = ("float16", "bfloat16")
MAX_HEAD_DIM = 256  # what FlashAttention takes for a head


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What the rule looks at. width and value_width: of a head; packages: what of `has()` is there."""

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
        """Whether every query of a row sees all of it, or all before it: what one call of torch's own can do."""
        return not (self.documents or self.windowed or self.softcap or self.sinks)


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """A way of computing attention, why, and why none of the better ones."""

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...]


def _flash(facts: AttentionSpec) -> str:
    """What no FlashAttention does."""
    if facts.device != "cuda":
        return "for CUDA devices only"
    if facts.dtype not in HALF_DTYPES:
        return f"half precision only, not {facts.dtype}"
    if max(facts.head_dim, facts.v_head_dim) > MAX_HEAD_DIM:
        return f"heads are wider than {MAX_HEAD_DIM}"
    if facts.head_dim != facts.v_head_dim:
        return "values are not as wide as keys"
    if facts.has_dense_mask:
        return "a mask of its own, or padding that a cache holds"
    if facts.sinks:
        return "attention sinks"
    if facts.q_len != facts.kv_len:
        return "queries and keys differ in number"
    return ""


def _flash3(facts: AttentionSpec) -> str:
    if why := _flash(facts):
        return why
    if facts.capability[0] != 9:
        return "for capability 9 only"
    if facts.dropout:
        return "it has no dropout"
    if facts.softcap and facts.requires_grad:
        return "its soft-cap has no gradient"
    return "" if "flash_attn_interface" in facts.packages else "flash_attn_interface is not installed"


def _flash2(facts: AttentionSpec) -> str:
    if why := _flash(facts):
        return why
    if facts.capability < (8, 0):
        return "for capability 8 and later"
    if facts.full_or_causal:
        return "torch has the same for whole rows"
    if facts.softcap and facts.dropout:
        return "no dropout beside a soft-cap"
    return "" if "flash_attn" in facts.packages else "flash_attn is not installed"


def _varlen(facts: AttentionSpec) -> str:
    if why := _flash(facts):
        return why
    if facts.capability < (8, 0):
        return "for capability 8 and later"
    if facts.full_or_causal:
        return "torch has the same for whole rows"
    if facts.dropout:
        return "it has no dropout"
    if facts.softcap:
        return "it has no soft-cap"
    if "varlen" not in facts.packages:
        return "this torch has none"
    return "this torch's knows no windows" if facts.windowed and "varlen_window" not in facts.packages else ""


def _flex(facts: AttentionSpec) -> str:
    if facts.device != "cuda":
        return "for CUDA devices only"
    if facts.full_or_causal:
        return "torch's own does whole rows faster"
    if facts.has_dense_mask:
        return "a mask of its own, or padding that a cache holds"
    if facts.q_len != facts.kv_len:
        return "queries and keys differ in number"
    if facts.dropout:
        return "it has no dropout"
    if facts.dtype == "float64":
        return "not in float64"
    if min(facts.head_dim, facts.v_head_dim) < 16:
        return "heads are narrower than 16"
    if facts.capability < (8, 0):
        return "for capability 8 and later"
    return "" if "triton" in facts.packages else "Triton is not installed"


def _sdpa(facts: AttentionSpec) -> str:
    if facts.softcap:
        return "it has no soft-cap"
    if facts.sinks:
        return "it has no sinks"
    if facts.documents:
        return "it would need a mask of all tokens against all"
    if facts.dropout and facts.device == "cpu":
        return "its dropout is slow on a processor"
    if facts.windowed and facts.q_len > 1 and not facts.has_dense_mask:
        return "it would need a mask of all tokens against all"
    return ""


def _documents(facts: AttentionSpec) -> str:
    if not facts.documents:
        return "there are no documents to take one by one"
    if facts.dropout and facts.device == "cpu":
        return "its dropout is slow on a processor"
    return "softcap or sinks, which torch's own has not" if facts.softcap or facts.sinks else ""


def _blocks(facts: AttentionSpec) -> str:
    return "weights are needed to drop some" if facts.dropout else ""


# The rule: the first that refuses nothing. A Triton kernel of our own belongs before "flex".
BACKENDS: tuple[tuple[str, Callable[[AttentionSpec], str], str], ...] = (
    ("flash3", _flash3, "FlashAttention 3 in one launch"),
    ("flash2", _flash2, "FlashAttention 2 in one launch"),
    ("flash_varlen", _varlen, "torch's FlashAttention over rows of any lengths, in one launch"),
    ("flex", _flex, "FlexAttention, compiled for this pattern; blocks that nobody sees are left out"),
    ("sdpa", _sdpa, "torch's own, in one call"),
    ("documents", _documents, "torch's own on each document by itself, no mask of all against all"),
    ("blocks", _blocks, "a block of queries at a time against the keys it sees; scores are made again going back"),
    ("weights", lambda facts: "", "each document's weights written out, some dropped"),
)


@lru_cache(maxsize=4096)
def select_backend(spec: AttentionSpec) -> BackendChoice:
    """The way for these facts; total, and the same for the same facts."""
    refused: list[tuple[str, str]] = []
    for name, refuses, reason in BACKENDS:
        if not (why := refuses(spec)):
            return BackendChoice(name, reason, tuple(refused))
        refused.append((name, why))
    raise AssertionError("the last rule takes everything")


@cache
def available_packages() -> frozenset[str]:
    """Which of the optional ways this Python brings: names as `Facts.packages` has them."""
    found = {name for name in ("flash_attn", "flash_attn_interface", "triton") if find_spec(name)}
    if find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        found.add("varlen")
        if "window_size" in signature(varlen_attn).parameters:
            found.add("varlen_window")
    return frozenset(found)
