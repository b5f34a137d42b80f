"""Replace the CTC head of a net for another vocabulary, keeping the weights of tokens that both have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mowa.types import Family, Vocabulary

INIT_STD = 0.02  # standard deviation of new weights, as transformers initializes these models


@torch.no_grad()
def resize_head(net: Any, family: Family, old: Vocabulary | None, new: Vocabulary) -> bool:
    """Replace the head of `net`, in place, by one for the vocabulary `new`.

    Weights of tokens in both vocabularies are copied, and those of blank and delimiter even if their names differ; the
    others are drawn from N(0, INIT_STD²), with bias 0. `old` is None if the net has no head, or none worth keeping.

    Returns True if the head should be trained as a new one: there was none, or tokens of it were dropped.
    """
    if old == new:
        return False
    previous = getattr(net, family.head, None) if old is not None else None
    in_features = net.config.hidden_size if previous is None else previous.in_features
    weight, bias = torch.empty(len(new), in_features).normal_(std=INIT_STD), torch.zeros(len(new))
    if previous is not None and old is not None:
        old_ids = {token: index for index, token in enumerate(old.tokens)}
        kept = {i: old_ids[token] for i, token in enumerate(new.tokens) if token in old_ids and i not in new.specials}
        kept[new.blank] = old.blank
        if new.delimiter is not None and old.delimiter is not None:
            kept[new.delimiter] = old.delimiter
        for new_id, old_id in kept.items():
            weight[new_id], bias[new_id] = previous.weight[old_id].float(), previous.bias[old_id].float()
    like = next(net.parameters())
    head = nn.Linear(in_features, len(new))
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    setattr(net, family.head, head.to(like.device, like.dtype))
    config = net.config
    config.vocab_size, config.pad_token_id = len(new), new.blank
    new_ids = {token: index for index, token in enumerate(new.tokens)}
    config.bos_token_id, config.eos_token_id = new_ids.get("<s>"), new_ids.get("</s>")
    return old is None or not set(old.tokens) <= set(new.tokens)
