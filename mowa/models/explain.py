"""Explain what computes each part of a model, and why, from its config alone: attention by kind of layer, and the rest.

Weights are not needed: `build_on_meta` makes a net without any.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from mowa.errors import ModelError
from mowa.kernels.attention.rules import AttentionSpec, available_packages, select_backend
from mowa.models.causal import accelerate, fused_loss, fused_modules
from mowa.models.ctc_encoder import chunk_mask, cpu_plan, packing
from mowa.types import Family

TORCH_CUDA_FEATURES = frozenset({"varlen", "varlen_window", "triton"})  # part of torch for CUDA
LAYER_TYPE_LABELS = {
    "full_attention": "full attention",
    "sliding_attention": "sliding window",
    "chunked_attention": "chunked attention",
}
OP_LABELS = {
    "rms_norm": "RMS norm",
    "rms_norm_plus_one": "RMS norm, 1 + weight",
    "swiglu": "MLP, SwiGLU",
    "geglu": "MLP, GEGLU",
}
STOCK, OURS = "transformers", "mowa"


@dataclass(frozen=True, slots=True)
class LayerExplanation:
    """One kind of layer: how many there are, what computes it, and why, including why faster backends are not used."""

    layer_type: str
    count: int
    implementation: str
    reason: str

    def __iter__(self) -> Iterator[Any]:
        return iter(astuple(self))


def default_device() -> str:
    """Return cuda if there is a CUDA device, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def explain_layers(
    config: Any, family: Family, *, length: int, device: str, dtype: str, packed: bool = False
) -> list[LayerExplanation]:
    """Explain every kind of attention layer of a net, in training.

    Args:
        config: a transformers config.
        family: its family.
        length: tokens or frames per row.
        device: cpu, cuda (of this machine), or a compute capability such as cuda:9.0.
        dtype: of the activations, as torch names it.
        packed: rows are packed.

    Raises:
        ModelError: unknown device or dtype.
    """
    device_type, capability = _parse_device(device)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"unknown dtype {dtype!r}; choose from bfloat16, float16, float32")
    text = config.get_text_config()
    if reason := family.unsupported.get("attention"):
        return [LayerExplanation("attention", text.num_hidden_layers, "transformers", reason)]
    rows = []
    for layer, count in _layers(text).items():
        spec = _attention_spec(family, text, layer, length, device_type, capability, dtype, packed)
        if layer == "chunked_attention":
            rows.append(LayerExplanation(LAYER_TYPE_LABELS[layer], count, "sdpa", "dense mask from transformers"))
            continue
        choice = select_backend(spec)
        rejected = "; ".join(f"{name}: {reason}" for name, reason in choice.rejected)
        window = f" of {text.sliding_window}" if layer == "sliding_attention" else ""
        reason = choice.reason + (f" ({rejected})" if rejected else "")
        rows.append(
            LayerExplanation(
                LAYER_TYPE_LABELS.get(layer, layer) + window + _describe_heads(spec), count, choice.backend, reason
            )
        )
    return rows


def build_on_meta(config: Any, family: Family) -> Any:
    """Return the net of a speech or language model's config on the meta device, which holds no weights."""
    from transformers import AutoModelForCausalLM, AutoModelForCTC

    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    auto_class: Any = AutoModelForCausalLM if family.task == "causal" else AutoModelForCTC
    with torch.device("meta"):
        return auto_class.from_config(config)


def explain_modules(net: Any, family: Family, *, device: str, dtype: str) -> list[LayerExplanation]:
    """Explain all but attention: norms, MLPs, loss and LoRA, or for speech inference on CPUs, packing and chunks.

    Args:
        net: a speech or language model, which may be on the meta device.
        family: its family.
        device, dtype: as in `explain_layers`.
    """
    device_type = _parse_device(device)[0]
    return list(_causal_parts(net, family, device_type) if family.task == "causal" else _ctc_parts(net, device, dtype))


def _causal_parts(net: Any, family: Family, device_type: str) -> Iterator[LayerExplanation]:
    classes = Counter(type(module).__name__ for module in net.modules())
    for op, names in family.fused_modules.items():
        if count := sum(classes[name] for name in names):
            yield _fused_part(OP_LABELS[op], op, count, device_type)
    for op in OP_LABELS.keys() & family.unsupported.keys():
        yield LayerExplanation(OP_LABELS[op], 0, STOCK, family.unsupported[op])
    experts = sum(any(weight.ndim == 3 for weight in module.parameters(recurse=False)) for module in net.modules())
    if experts:
        yield LayerExplanation("experts", experts, STOCK, family.unsupported.get("experts", ""))
    rotary = sum("RotaryEmbedding" in name for name in classes.elements())
    if rotary:
        reason = "the function that applies them is shared by all nets of the family, so it is not replaced"
        yield LayerExplanation("rotary embeddings", rotary, STOCK, reason)
    linears = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    count = sum(bool(family.find_linear(name)) for name in linears)
    yield _fused_part("linears with LoRA", "lora_linear", count, device_type)
    if reason := family.unsupported.get("fused_loss") or fused_loss.unsupported_reason(net):
        yield LayerExplanation("loss", 1, STOCK, reason)
    else:
        yield LayerExplanation("loss", 1, OURS, accelerate.FUSED_LOSS_DESCRIPTION)


def _fused_part(label: str, op: str, count: int, device_type: str) -> LayerExplanation:
    if reason := fused_modules.not_faster_reason(op, device_type):
        return LayerExplanation(label, count, STOCK, reason)
    return LayerExplanation(label, count, OURS, accelerate.DESCRIPTIONS[op])


def _ctc_parts(net: Any, device: str, dtype: str) -> Iterator[LayerExplanation]:
    compute_dtype: Any = "float32" if dtype == "float16" else dtype
    reason = "it is for inference on CPUs" if device != "cpu" else cpu_plan.unsupported_reason(net, compute_dtype)
    plan = f"in {compute_dtype}: convolutions as products, q, k and v in one, weights prepacked, nothing padded"
    yield LayerExplanation("inference", 1, STOCK if reason else "CPU plan", reason or plan)
    reason = packing.unsupported_reason(net)
    packed = "recordings are concatenated and attend to themselves only"
    yield LayerExplanation("training batches", 1, "padded" if reason else "packed", reason or packed)
    reason = chunk_mask.unsupported_reason(net)
    chunked = "can be trained with a chunk mask (streaming), and then keeps keys and values"
    yield LayerExplanation("live speech", 1, "sliding window" if reason else "chunked", reason or chunked)


def _parse_device(device: str) -> tuple[str, tuple[int, int]]:
    kind, _, rest = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ModelError(f"unknown device {device!r}; use cpu, cuda, or cuda:9.0 for a compute capability")
    if kind == "cpu":
        return kind, (0, 0)
    major, dot, minor = rest.partition(".")
    if dot and major.isdigit() and minor.isdigit():
        return kind, (int(major), int(minor))
    if not torch.cuda.is_available():
        raise ModelError("no CUDA device found; name a compute capability instead, such as cuda:8.0 or cuda:9.0")
    return kind, torch.cuda.get_device_capability(int(rest or 0))


def _layers(text: Any) -> Counter[str]:
    """The number of layers of each kind, in the order of the config."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return Counter(kinds)
    window = getattr(text, "sliding_window", None)
    sliding = window is not None and getattr(text, "use_sliding_window", True)
    return Counter({"sliding_attention" if sliding else "full_attention": text.num_hidden_layers})


def _attention_spec(
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


def _describe_heads(spec: AttentionSpec) -> str:
    """Sizes and special features of the heads, in words."""
    words = [
        f"head size {spec.head_dim}" + (f" and {spec.v_head_dim}" if spec.head_dim != spec.v_head_dim else ""),
        "soft-cap" if spec.softcap else "",
        "sinks" if spec.sinks else "",
    ]
    return f", {', '.join(word for word in words if word)}"
