"""Compute the logits of chosen tokens of a batch in chunks, without those of the whole batch.

The blocks run once over the batch; the net's own forward pass then computes head, scale and soft-cap of each chunk from
the hidden states, so that every net's logits are its own.
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
    with document_rope(stock):
        out = decoder_of(stock)(**on_device, use_cache=False)
    states = out.last_hidden_state[chosen.to(device)]
    head = stock.get_output_embeddings()
    tokens = len(head.weight) if hasattr(head, "weight") else stock.config.get_text_config().vocab_size
    size = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * tokens))
    for part in states.split(size):
        out["last_hidden_state"] = part[None]
        with _returns(decoder_of(stock), out):
            logits = stock(input_ids=on_device["input_ids"][:, :1], use_cache=False).logits
        yield logits[0]


def decoder_of(net: Any) -> Any:
    """Return the part of a transformers causal net that computes the last hidden states."""
    return net.model if net.base_model is net else net.base_model  # Llama 4 names the prefix of another class


@contextmanager
def _returns(module: Any, out: Any) -> Iterator[None]:
    """Let `module` return `out` inside the context, whatever its inputs."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: out
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
