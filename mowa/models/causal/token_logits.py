"""Compute the logits of chosen tokens of a batch in chunks, without those of the whole batch.

The blocks run once over the batch; the net's own forward pass then computes head, scale and soft-cap of each chunk from
the hidden states, so that every net's logits are its own. A net that does not call its `base_model` computes all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mowa.models.causal.document_rope import document_rope

MIB = 2**20
CHUNK_BYTES = {"cpu": 32 * MIB, "cuda": 256 * MIB}  # of the logits in float32


@torch.inference_mode()
def iter_token_logits(net: Any, inputs: Mapping[str, Tensor], chosen: Tensor) -> Iterator[Tensor]:
    """Yield the logits [n, V] of the chosen positions, in order, at most `CHUNK_BYTES` (as float32) at a time.

    Args:
        net: a transformers causal net, or a PeftModel around one.
        inputs: input_ids int64 [B, N], with attention_mask where rows are padded or position_ids where they are packed.
        chosen: positions whose next token is predicted, bool [B, N].
    """
    stock = net.get_base_model() if hasattr(net, "get_base_model") else net
    device = next(net.parameters()).device
    on_device = {name: value.to(device) for name, value in inputs.items()}
    decoder = decoder_of(stock)
    with document_rope(stock):
        out = decoder(**on_device, use_cache=False)
    states = getattr(out, "last_hidden_state", out.get("logits"))[chosen.to(device)]
    head = stock.get_output_embeddings()
    tokens = len(head.weight) if hasattr(head, "weight") else stock.config.get_text_config().vocab_size
    size = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * tokens))
    if decoder is stock:
        yield from states.split(size)
        return
    for part in states.split(size):
        out["last_hidden_state"] = part[None]
        with _returns(decoder, out) as calls:
            logits = stock(input_ids=on_device["input_ids"][:, :1], use_cache=False).logits
        if not calls:  # OPT calls a module inside its base model: the logits are of other tokens
            with document_rope(stock):
                logits = stock(**on_device, use_cache=False).logits[chosen.to(device)]
            yield from logits.split(size)
            return
        yield logits[0]


def decoder_of(net: Any) -> Any:
    """Return the part of a transformers causal net that computes the last hidden states, or the net if it has none."""
    if net.base_model is net:  # Llama 4 names the prefix of another class
        return getattr(net, "model", net)
    return net.base_model


@contextmanager
def _returns(module: Any, out: Any) -> Iterator[list[Any]]:
    """Let `module` return `out` inside the context, whatever its inputs; yield a list of its calls."""
    before = vars(module).get("forward")
    calls: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return out

    module.forward = forward
    try:
        yield calls
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
