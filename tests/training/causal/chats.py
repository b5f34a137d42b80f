"""A tiny chat model and conversations to tune it on, in a folder."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.data.chat.tokenizers import tokenizer as made

WORDS = ("how", "are", "you", "well", "thank", "what", "is", "this", "that", "and", "now", "then")


def model(folder, family="chatml", **shape):
    """A llama of two layers with the vocabulary of that family's tokenizer, written with it."""
    tokenizer = made(family)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | shape
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    net = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), **ids))
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)  # so that tokens matter to each other
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(file, count=40):
    """Questions whose answer is their last word, which can be learnt."""
    with file.open("w") as out:
        for number in range(count):
            asked = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 3 + number % 5)]
            turns = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": asked[-1]}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def recipe(folder, **turned):
    """A recipe over both, for plans.checked."""
    if not (folder / "base").is_dir():
        model(folder / "base")
        conversations(folder / "chats.jsonl")
    tree = {
        "task": "causal",
        "model": str(folder / "base"),
        "data": {"train": str(folder / "chats.jsonl"), "hold_out": 0.2, "length": 128},
        "batch": {"tokens": 256},
        "lora": {"rank": 4, "alpha": 8.0},
        "optimise": {"steps": 6, "learning_rate": 1e-2, "precision": "float32"},
        "evaluate": {"every": 3},
    }
    for dotted, value in turned.items():
        place = tree
        *groups, key = dotted.split("__")
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return tree
