"""Tiny random language models with a tokenizer, whose rows are multiples of the group sizes."""

import contextlib
import io
import warnings

import torch
from transformers import AutoModelForCausalLM

from mowa.kernels.quant.linear import QuantizedLinear
from tests.data.chat.tokenizers import tokenizer as make_tokenizer
from tests.families.tiny import tiny

DIVISIBLE = {"hidden_size": 64, "intermediate_size": 128}


def tiny_causal(folder, family="llama", dtype=torch.float32, **changes):
    """Save a random net of `family` and a tokenizer with a chat template into `folder`, and return the folder."""
    tokenizer = make_tokenizer("chatml")
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    net = tiny(family, **DIVISIBLE | ids | {"vocab_size": len(tokenizer)} | changes)
    net.generation_config.update(eos_token_id=tokenizer.eos_token_id, max_new_tokens=7)
    net.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_ids(count=40):
    """Return input_ids, int64 [1, count]."""
    return torch.arange(5, 5 + count)[None] * 7 % 300


def logits(net, ids=None):
    """Return logits, float32 [T, V]."""
    with torch.inference_mode():
        return net(token_ids() if ids is None else ids).logits[0].float()


def load_in_transformers(folder, **options):
    """Load a checkpoint as a user does, without the output of three packages, and run it once."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        net, loading_info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        assert not any(loading_info.values()), loading_info
        logits(net.eval())
    return net


def is_tied(net):
    """Whether head and embeddings are one parameter."""
    return net.get_output_embeddings().weight is net.get_input_embeddings().weight


def quantized_names(net):
    return {name for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
