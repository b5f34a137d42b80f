"""A tiny chat model, and conversations to fine-tune it on."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.data.chat.tokenizers import tokenizer as make_tokenizer

WORDS = ("how", "are", "you", "well", "thank", "what", "is", "this", "that", "and", "now", "then")


def model(folder, family="chatml", **shape):
    """Save a llama of two layers with the tokenizer of `family` in `folder`, and return the folder."""
    tokenizer = make_tokenizer(family)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | shape
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    net = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), **ids))
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)  # so that the context affects the logits
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(file, count=40):
    """Write conversations whose answers are the last word of the question, and return the file."""
    with file.open("w") as out:
        for number in range(count):
            asked = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 3 + number % 5)]
            turns = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": asked[-1]}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def recipe(folder, **overrides):
    """Return a recipe tree over both, with `section__key` overrides."""
    if not (folder / "base").is_dir():
        model(folder / "base")
        conversations(folder / "chats.jsonl")
    tree = {
        "task": "causal",
        "model": str(folder / "base"),
        "data": {"train": str(folder / "chats.jsonl"), "hold_out": 0.2, "max_length": 128},
        "batch": {"tokens": 256},
        "lora": {"rank": 4, "alpha": 8.0},
        "optimizer": {"max_steps": 6, "learning_rate": 1e-2, "precision": "float32"},
        "evaluation": {"eval_steps": 3},
    }
    for dotted, value in overrides.items():
        place = tree
        *groups, key = dotted.split("__")
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return tree
