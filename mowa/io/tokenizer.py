"""Write a language model's tokenizer so that batches can be padded for generation, and the generation config with it.

`generate` of transformers continues the last token of every row, so a batch is padded on the left. Finished rows are
filled with the pad token, and labels of pad tokens are usually masked, so it should not be the one that ends an answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PADDING_SIDE = "left"
_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_OTHER_ENDS = ("<|endoftext|>", "<|end_of_text|>")  # of a text, where another token ends an answer
_RESERVED = ("<|reserved_special_token_", "<unused", "<|placeholder", "<|extra_")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write `tokenizer` into `folder`, padding on the left with the token of `choose_pad_token`; it does not change."""
    with_padding(tokenizer).save_pretrained(folder)


def with_padding(tokenizer: Any) -> Any:
    """Return a copy of `tokenizer` that pads on the left, with the token of `choose_pad_token`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = PADDING_SIDE  # the latter is written
    if (token := choose_pad_token(tokenizer)) is not None and token != tokenizer.pad_token:
        tokenizer.pad_token = token
    return tokenizer


def choose_pad_token(tokenizer: Any) -> str | None:
    """Return the pad token: the tokenizer's own, or if it has none, or the end token, a special token without a use.

    No token is added. Where there is no such token, it is the end token.
    """
    own, eos = tokenizer.pad_token, tokenizer.eos_token
    if own is not None and own != eos:
        return str(own)
    found = next((token for token in _candidates(tokenizer) if token not in (eos, tokenizer.bos_token)), own or eos)
    return None if found is None else str(found)


def _candidates(tokenizer: Any) -> Iterator[str]:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(map(str, tokenizer.all_special_tokens))
    yield from (name for name in _NAMES if name in special)
    if tokenizer.unk_token is not None:
        yield tokenizer.unk_token
    yield from (name for name in _OTHER_ENDS if name in special)
    yield from sorted(name for name in special if name.startswith(_RESERVED))


def align_generation_config(generation_config: Any, tokenizer: Any) -> Any:
    """Return a copy of `generation_config` with the pad token of `tokenizer`, and its end token among the ends.

    Settings of sampling are left out where nothing is sampled: transformers does not write such a config.
    """
    aligned = copy.deepcopy(generation_config)
    if tokenizer.pad_token_id is not None:
        aligned.pad_token_id = tokenizer.pad_token_id
    ends = aligned.eos_token_id
    listed = list(ends) if isinstance(ends, list | tuple) else [one for one in (ends,) if one is not None]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed:
        listed.append(tokenizer.eos_token_id)
    aligned.eos_token_id = listed[0] if len(listed) == 1 else listed or None
    if not aligned.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(aligned, name, None)
    return aligned
