"""The loss of a causal net straight from its last features: the logits of a whole sequence are never there.

Only tokens that are learnt are scored (`kernels.linear_cross_entropy`). The net's own forward is asked for everything
else: generation, logits, models that put more into their loss than the next token.
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
from mowa.types import IGNORE_INDEX


@dataclass
class FusedLossOutput(ModelOutput):
    """What a net with a fused head says of labels. Per-token fields are [B, T-1], 0 where nothing is learnt.

    The names are those that TRL's trainers ask for (`trl.trainer.utils.FusedCausalLMOutput`).
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None


def unsupported_reason(net: nn.Module) -> str:
    """Why the head of `net` cannot be fused; empty where it can."""
    stock: Any = net
    head = stock.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    if head is None:
        return "it has no head over a vocabulary"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, with weights of its own to ask"
    return ""


def fuse_loss(net: Any) -> Callable[[], None]:
    """Let `net` (a transformers causal net) score labels without logits, while it trains. → what undoes it.

    In training, or when asked by `fused_lm_head=True` as TRL's trainers do, a call with labels gives `Scored`.
    """
    head = net.get_output_embeddings()
    before = {module: vars(module).get("forward") for module in (net, head)}
    head.forward = partial(_scores, head, head.forward)
    net.forward = partial(_forward, net, net.forward)

    def undo() -> None:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own

    return undo


def _scores(
    head: nn.Linear, stock: Callable[..., Tensor], hidden: Tensor, targets: Tensor | None = None, **how: Any
) -> Any:
    """The head's own forward, or with targets their scores: in the module's call, as ZeRO-3 has its weights then."""
    if targets is None:
        return stock(hidden)
    found = score_tokens(hidden, head.weight, targets, bias=head.bias, **how)
    return found.log_probs, found.entropy, found.is_top1  # a tuple: DeepSpeed looks through what modules give


def _forward(
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
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return stock(*args, **inputs, **{name: value for name, value in given.items() if value is not None})
    config = net.config.get_text_config()
    routed = bool(inputs.get("output_router_logits", getattr(config, "output_router_logits", False)))
    if routed:
        inputs["output_router_logits"] = True
    out = net.base_model(*args, **(inputs | {"use_cache": False}))
    hidden = out.last_hidden_state
    if shift_labels is None:
        hidden, targets = hidden[:, :-1], labels[:, 1:]  # type: ignore[index]
    else:
        targets = shift_labels
    log_probs, entropy, right = net.get_output_embeddings()(hidden, targets=targets, **_shape(config))
    learnt = targets != IGNORE_INDEX
    count = learnt.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -log_probs.sum() / count
    balance = None
    if routed:
        balance = _balance(out.router_logits, config, inputs.get("attention_mask"))
        loss = loss + config.router_aux_loss_coef * balance
    return FusedLossOutput(loss, log_probs, entropy, right, learnt, balance)


def _shape(config: Any) -> dict[str, Any]:
    """What a family does to its logits, as its config has it: Gemma 2's soft-cap, Granite's divisor, Cohere's scale."""
    how: dict[str, Any] = {}
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        how["softcap"] = float(cap)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        how["scale"] = 1 / float(divisor)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        how["scale"] = float(scale)
    return how


def _balance(routed: Any, config: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts (arXiv:2101.03961), by transformers' own function."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    found = load_balancing_loss_func(routed, experts, config.num_experts_per_tok, attention_mask)
    return torch.as_tensor(found)
