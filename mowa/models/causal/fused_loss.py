"""Compute the loss of a causal net from its last hidden states, without the logits of the whole sequence.

Only tokens with a label are scored (`kernels.linear_cross_entropy`). Generation, logits and inference use the net's own
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mowa.kernels.linear_cross_entropy import score_tokens
from mowa.models.causal.token_logits import decoder_of
from mowa.types import IGNORE_INDEX


@dataclass
class FusedLossOutput(ModelOutput):
    """Output of a net with a fused loss, with the field names of TRL (`trl.trainer.utils.FusedCausalLMOutput`).

    Per-token fields are [B, T-1], 0 where there is no label. logits is always None.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None


def unsupported_reason(net: nn.Module) -> str:
    """Return why the loss of `net` cannot be fused, or an empty string where it can."""
    stock: Any = net
    head = stock.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    if head is None:
        return "it has no language-model head"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not nn.Linear"
    return ""


def fuse_loss(net: Any) -> Callable[[], None]:
    """Let `net`, a transformers causal net, compute its loss without logits, and return a function that undoes it.

    A call with labels returns a `FusedLossOutput` in training mode, or with `fused_lm_head=True`, as TRL's trainers
    pass it.
    """
    head = net.get_output_embeddings()
    before = {module: vars(module).get("forward") for module in (net, head)}
    head.forward = partial(_head_forward, head, head.forward)
    net.forward = partial(_net_forward, net, net.forward)

    def undo() -> None:
        for module, original in before.items():
            if original is None:
                del module.forward
            else:
                module.forward = original

    return undo


def _head_forward(
    head: nn.Linear, stock: Callable[..., Tensor], hidden: Tensor, targets: Tensor | None = None, **options: Any
) -> Any:
    """The head's own forward, or with targets their scores; inside its call, ZeRO-3 has gathered the weights."""
    if targets is None:
        return stock(hidden)
    scores = score_tokens(hidden, head.weight, targets, bias=head.bias, **options)
    return scores.log_probs, scores.entropy, scores.is_top1  # a tuple, as DeepSpeed inspects the outputs of modules


def _net_forward(
    net: Any,
    stock: Callable[..., Any],
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    fused_lm_head: bool = False,
    num_items_in_batch: Any = None,
    **inputs: Any,
) -> Any:
    if (labels is None and shift_labels is None) or not (net.training or fused_lm_head):
        optional = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return stock(*args, **inputs, **{name: value for name, value in optional.items() if value is not None})
    config = net.config.get_text_config()
    routed = bool(inputs.get("output_router_logits", getattr(config, "output_router_logits", False)))
    if routed:
        inputs["output_router_logits"] = True
    out = decoder_of(net)(*args, **(inputs | {"use_cache": False}))
    hidden = out.last_hidden_state
    if shift_labels is None:
        hidden, targets = hidden[:, :-1], labels[:, 1:]  # type: ignore[index]
    else:
        targets = shift_labels
    log_probs, entropy, is_top1 = net.get_output_embeddings()(hidden, targets=targets, **_logit_options(config))
    label_mask = targets != IGNORE_INDEX
    count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -log_probs.sum() / count
    aux_loss = None
    if routed:
        aux_loss = _load_balancing_loss(out.router_logits, config, inputs.get("attention_mask"))
        loss = loss + config.router_aux_loss_coef * aux_loss
    return FusedLossOutput(loss, log_probs, entropy, is_top1, label_mask, aux_loss)


def _logit_options(config: Any) -> dict[str, Any]:
    """Scale and soft-cap of the logits, from the config: Gemma 2's cap, Granite's divisor, Cohere's scale."""
    options: dict[str, Any] = {}
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        options["softcap"] = float(cap)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        options["scale"] = 1 / float(divisor)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        options["scale"] = float(scale)
    return options


def _load_balancing_loss(router_logits: Any, config: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts (arXiv:2101.03961), by transformers' own function."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    loss = load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)
    return torch.as_tensor(loss)
