"""Embeddings that an adapter of a language model resizes or trains: added tokens, `embed_tokens` and `lm_head`.

PEFT keeps trained modules (`modules_to_save`) and trained rows (`trainable_token_indices`) in the adapter; a base whose
vocabulary was resized must be resized in the same way before the adapter is loaded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def add_tokens(tokenizer: Any, net: Any, tokens: Sequence[str], *, seed: int = 0) -> None:
    """Add `tokens` to the tokenizer, as text rather than special tokens, and rows to the embeddings that lack them.

    Checkpoints often have more embeddings than tokens; then those are used.
    """
    tokenizer.add_tokens([token for token in tokens if token not in tokenizer.get_vocab()])
    highest = max([tokenizer.convert_tokens_to_ids(token) for token in tokens], default=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resize(net, max(net.get_input_embeddings().num_embeddings, highest + 1))


def resize(net: Any, rows: int, *, mean_resizing: bool = True) -> None:
    """Resize the embeddings of `net` and its head to `rows`, in place, without writing to tensors that it shares.

    With `mean_resizing`, new rows are drawn around the mean of the others; else they are to be loaded.
    """
    if rows == net.get_input_embeddings().num_embeddings:
        return
    copies: dict[int, nn.Parameter] = {}
    for module in (net.get_input_embeddings(), net.get_output_embeddings()):  # transformers replaces the data of these
        for name, weight in list(module.named_parameters(recurse=False)):
            copied = copies.setdefault(id(weight), nn.Parameter(weight.detach().clone(), weight.requires_grad))
            setattr(module, name, copied)
    with _silence():
        net.resize_token_embeddings(rows, mean_resizing=mean_resizing)


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress transformers' advice on how new rows are initialized."""
    log = logging.getLogger("transformers.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def saved_rows(net: Any, folder: Path, weights: Path) -> int:
    """Return how many rows of embeddings the adapter in `folder` needs.

    As many as the embeddings in `weights` have; without any, enough for the tokens of its tokenizer, and at least those
    of `net`. An adapter without embeddings and tokenizer has as many as `net`.
    """
    from safetensors import safe_open

    rows: int = net.get_input_embeddings().num_embeddings
    modules = {id(module): name for name, module in net.named_modules()}
    names = [modules.get(id(part)) for part in (net.get_input_embeddings(), net.get_output_embeddings())]
    endings = tuple(f".{name}{middle}weight" for name in names if name for middle in (".", ".base_layer."))
    with safe_open(weights, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith(endings):
                saved: int = file.get_slice(key).get_shape()[0]
                return saved
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return max(rows, tokenizer_rows(folder))
    return rows


def tokenizer_rows(folder: Path) -> int:
    """Return the highest id of the tokenizer in `folder`, plus one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return 1 + max(tokenizer.get_vocab().values())


def merge_trained_modules(net: Any, dtype: Any) -> None:
    """Replace PEFT's wrappers of trained modules and rows in `net` by the modules as trained, in `dtype`, in place.

    No existing tensor is written to. A head that was tied to the embeddings stays tied if both are trained alike; else
    the config says that it is not.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    wrappers = [(name, one) for name, one in net.named_modules() if isinstance(one, AuxiliaryTrainingWrapper)]
    for name, wrapper in wrappers:
        if isinstance(wrapper, ModulesToSaveWrapper):
            module: Any = copy.deepcopy(wrapper.modules_to_save[wrapper.active_adapters[0]])
        else:
            weight = wrapper.weight.detach().clone()
            module = copy.deepcopy(wrapper.original_module)
            module.weight = nn.Parameter(weight)
        net.set_submodule(name, module.to(dtype or module.weight.dtype).requires_grad_(False))
    if not (wrappers and net.config.get_text_config().tie_word_embeddings):
        return
    embeddings, head = net.get_input_embeddings(), net.get_output_embeddings()
    if embeddings.weight.shape == head.weight.shape and bool((embeddings.weight == head.weight).all()):
        head.weight = embeddings.weight
    else:
        untie(net)


def untie(net: Any) -> None:
    """Untie the head of `net` from the embeddings, so that both are saved and loaded."""
    net.config.tie_word_embeddings = net.config.get_text_config().tie_word_embeddings = False
    net.all_tied_weights_keys = {}


def complete_wrappers(net: Any) -> None:
    """Give embeddings and heads of which PEFT trains rows the attributes that readers of stock modules expect."""
    for module in net.modules():
        if type(module).__name__ == "TrainableTokensWrapper":
            for name in ("bias", "num_embeddings", "in_features", "out_features"):
                object.__setattr__(module, name, getattr(module.original_module, name, None))  # no parameter of its own


def missing_modules(net: Any, names: Iterable[str]) -> list[str]:
    """Return those of `names` that are the last part of no module of `net`."""
    existing = {name.rpartition(".")[2] for name, _ in net.named_modules()}
    return [name for name in names if name.rpartition(".")[2] not in existing]
