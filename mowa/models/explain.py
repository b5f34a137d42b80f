"""Which layer of a model would be computed how, and why: from its config alone, by the kernels' own rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch

from mowa.errors import ModelError
from mowa.families.registry import get_family
from mowa.kernels.attention.rules import AttentionSpec, available_packages, select_backend
from mowa.types import Family

TORCH_CUDA_FEATURES = frozenset({"varlen", "varlen_window", "triton"})  # what torch for CUDA brings
LAYER_TYPE_LABELS = {
    "full_attention": "full attention",
    "sliding_attention": "sliding window",
    "chunked_attention": "attention in chunks",
}


@dataclass(frozen=True, slots=True)
class LayerExplanation:
    """One kind of layer, how many there are, what computes it, and why: the refusals of every better way among that."""

    layer_type: str
    count: int
    implementation: str
    reason: str

    def __iter__(self) -> Iterator[Any]:
        return iter(astuple(self))


def default_device() -> str:
    """The device that a model would be on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def explain_layers(
    config: Any, *, length: int, device: str, dtype: str, packed: bool = False
) -> list[LayerExplanation]:
    """A row for every kind of attention in a net of that transformers config, in training with so many tokens in a row.

    device: cpu, cuda (this machine's; of another, by capability: cuda:9.0). dtype: of the activations, as torch has it.
    Raises ModelError for a device or a dtype that is none.
    """
    kind, capability = _device(device)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"{dtype!r} is no dtype: bfloat16, float16 and float32 are")
    family = get_family(config.model_type)
    text = config.get_text_config()
    if why := family.unsupported.get("attention"):
        return [LayerExplanation("attention", text.num_hidden_layers, "transformers", why)]
    rows = []
    for layer, count in _layers(text).items():
        facts = _facts(family, text, layer, length, kind, capability, dtype, packed)
        if layer == "chunked_attention":
            rows.append(
                LayerExplanation(
                    LAYER_TYPE_LABELS[layer], count, "sdpa", "a mask of all tokens against all, made by transformers"
                )
            )
            continue
        choice = select_backend(facts)
        refusals = "; ".join(f"{name}: {why}" for name, why in choice.rejected)
        window = f" of {text.sliding_window}" if layer == "sliding_attention" else ""
        reason = choice.reason + (f" ({refusals})" if refusals else "")
        rows.append(
            LayerExplanation(
                LAYER_TYPE_LABELS.get(layer, layer) + window + _shape(facts), count, choice.backend, reason
            )
        )
    return rows


def _device(device: str) -> tuple[str, tuple[int, int]]:
    kind, _, rest = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ModelError(f"{device!r} is no device: cpu and cuda are, or cuda:8.0 for one of that capability")
    if kind == "cpu":
        return kind, (0, 0)
    major, dot, minor = rest.partition(".")
    if dot and major.isdigit() and minor.isdigit():
        return kind, (int(major), int(minor))
    if not torch.cuda.is_available():
        raise ModelError("there is no CUDA device here: say of which capability, as in cuda:8.0 or cuda:9.0")
    return kind, torch.cuda.get_device_capability(int(rest or 0))


def _layers(text: Any) -> Counter[str]:
    """How many layers of each kind, in their order."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return Counter(kinds)
    window = getattr(text, "sliding_window", None)
    sliding = window is not None and getattr(text, "use_sliding_window", True)
    return Counter({"sliding_attention" if sliding else "full_attention": text.num_hidden_layers})


def _facts(
    family: Family,
    text: Any,
    layer: str,
    length: int,
    device: str,
    capability: tuple[int, int],
    dtype: str,
    packed: bool,
) -> AttentionSpec:
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    values = width
    if getattr(text, "kv_lora_rank", None) and getattr(text, "qk_nope_head_dim", None):
        width, values = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    window = text.sliding_window if layer == "sliding_attention" else None
    return AttentionSpec(
        device=device,
        dtype=dtype,
        head_dim=width,
        v_head_dim=values,
        q_len=length,
        kv_len=length,
        documents=packed,
        windowed=window is not None and window < length,
        causal=family.task not in ("ctc", "embedding"),
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        sinks=text.model_type == "gpt_oss",
        dropout=bool(getattr(text, "attention_dropout", 0.0)),
        requires_grad=True,
        capability=capability,
        packages=available_packages() | TORCH_CUDA_FEATURES if device == "cuda" else available_packages(),
    )


def _shape(facts: AttentionSpec) -> str:
    """What of a layer is out of the ordinary, in words."""
    words = [
        f"heads of {facts.head_dim}" + (f" and {facts.v_head_dim}" if facts.head_dim != facts.v_head_dim else ""),
        "soft-cap" if facts.softcap else "",
        "sinks" if facts.sinks else "",
    ]
    return f", {', '.join(word for word in words if word)}"
