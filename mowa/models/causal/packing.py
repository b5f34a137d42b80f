"""Test whether a causal net separates the documents of a packed sequence, where no registry entry says so."""

from __future__ import annotations

from typing import Any

import torch

_LENGTHS = (6, 10)  # tokens of the two documents


@torch.no_grad()
def is_supported(net: Any) -> bool:
    """Return whether the second of two packed documents has the logits that it has alone.

    The documents are separated by positions that restart at 0. Nets with a recurrent
    state, or without positions, differ.
    """
    first, second = _LENGTHS
    ids = torch.arange(first + second, device=net.device)[None] * 7 % min(97, net.config.get_text_config().vocab_size)
    positions = torch.cat([torch.arange(length, device=net.device) for length in _LENGTHS])[None]
    training = net.training
    net.eval()
    try:
        packed = net(input_ids=ids, position_ids=positions, use_cache=False).logits[:, first:].float()
        alone = net(input_ids=ids[:, first:], position_ids=positions[:, first:], use_cache=False).logits.float()
    except (TypeError, ValueError):  # it takes no positions
        return False
    finally:
        net.train(training)
    tolerance = 64 * torch.finfo(net.dtype).eps * float(alone.abs().max().clamp(min=1))
    return bool((packed - alone).abs().max() <= tolerance)
