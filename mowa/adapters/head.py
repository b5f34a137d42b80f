"""The CTC head of a net, for another vocabulary: rows of tokens that it had are kept, the others begin small."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mowa.types import Family, Vocabulary

INIT_STD = 0.02  # deviation of a new row, as transformers begins a linear layer of such nets


@torch.no_grad()
def resize_head(net: Any, family: Family, old: Vocabulary | None, new: Vocabulary) -> bool:
    """Give `net` (in place) a head whose output i says `new.tokens[i]`. → whether it is a new one.

    The blank and the delimiter are carried over whatever they are called. `old` None: the net has no head yet, or one
    that means nothing.
    """
    if old == new:
        return False
    before = getattr(net, family.head, None) if old is not None else None
    width = net.config.hidden_size if before is None else before.in_features
    weight, bias = torch.empty(len(new), width).normal_(std=INIT_STD), torch.zeros(len(new))
    if before is not None and old is not None:
        rows = {token: index for index, token in enumerate(old.tokens)}
        kept = {i: rows[token] for i, token in enumerate(new.tokens) if token in rows and i not in new.specials}
        kept[new.blank] = old.blank
        if new.delimiter is not None and old.delimiter is not None:
            kept[new.delimiter] = old.delimiter
        for row, was in kept.items():
            weight[row], bias[row] = before.weight[was].float(), before.bias[was].float()
    like = next(net.parameters())
    head = nn.Linear(width, len(new))
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    setattr(net, family.head, head.to(like.device, like.dtype))
    config = net.config
    config.vocab_size, config.pad_token_id = len(new), new.blank
    named = {token: index for index, token in enumerate(new.tokens)}
    config.bos_token_id, config.eos_token_id = named.get("<s>"), named.get("</s>")
    return old is None or not set(old.tokens) <= set(new.tokens)
