"""Special tokens as llama.cpp treats them: which are found in text, in which order, and which take white space along.

llama.cpp changes the types of tokens with certain names, whatever the file says, and takes white space around some
tokens away for models with certain names.

Source: llama-vocab.cpp of llama.cpp (MIT), build 11549.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from mowa.errors import DataError

KEY = "tokenizer.ggml."
END_TOKENS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> [e~[ "
    "<\uff5cend\u2581of\u2581sentence\uff5c>".split()
)
"""Tokens that end generation in llama.cpp; they are control tokens there."""
HARMONY_TOKENS = frozenset("<|channel|> <|message|> <|start|> <|constrain|>".split())
"""Tokens that llama.cpp makes user-defined."""
_FILL_TOKENS = {
    "fim_pre prefix": "<|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> \u2581<PRE> <|code_prefix|> <|prefix|> "
    "<\uff5cfim\u2581begin\uff5c>",
    "fim_suf suffix": "<|fim_suffix|> <fim-suffix> <fim_suffix> <SUF> \u2581<SUF> <|code_suffix|> <|suffix|> "
    "<\uff5cfim\u2581hole\uff5c>",
    "fim_mid middle": "<|fim_middle|> <fim-middle> <fim_middle> <MID> \u2581<MID> <|code_middle|> <|middle|> "
    "<\uff5cfim\u2581end\uff5c>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}  # keys that name the token, without `_token_id` → tokens that become control tokens where no key does
SPACES = " \t\n\v\f\r"  # what C counts as white space


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class SpecialTokens:
    """Tokens that are cut out of text before the rest of it is tokenized.

    types         id → types of the token, of which llama.cpp lets a token have two
    found         ids of all special tokens
    hidden        ids of those that are cut out on demand only
    left_strips   ids of those that take away white space before them
    right_strips  ids of those that take away white space after them
    """

    def __init__(self, tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]) -> None:
        """Find the special tokens of a vocabulary; types are those of the file."""
        ids = {token: index for index, token in enumerate(tokens)}
        self.types = _effective_types(ids, types, metadata)
        hidden = {TokenType.CONTROL, TokenType.UNKNOWN}
        self.hidden = frozenset(index for index, found in self.types.items() if found & hidden)
        self.found = self.hidden | {index for index, found in self.types.items() if TokenType.USER_DEFINED in found}
        self.left_strips, self.right_strips = _strips(ids, self.found, metadata)
        self._tokens = tokens
        self._by_start: dict[str, list[tuple[int, int]]] = {}
        for order, index in enumerate(sorted(self.found, key=lambda one: (-len(tokens[one].encode()), one))):
            self._by_start.setdefault(tokens[index][:2], []).append((order, index))

    def split(self, text: str, parse_special: bool) -> list[str | int]:
        """Split text into ids of special tokens and the text between them, longer tokens first.

        parse_special: find control tokens too, not only user-defined ones.
        """
        starts = self._by_start.keys() & {*text, *map(str.__add__, text, text[1:])}
        fragments: list[str | int] = [text] if text else []
        present = [found for start in starts for found in self._by_start[start] if self._tokens[found[1]] in text]
        for _, index in sorted(present):
            if parse_special or index not in self.hidden:
                fragments = [
                    part
                    for fragment in fragments
                    for part in (self._cut(fragment, index) if isinstance(fragment, str) else [fragment])
                ]
        return fragments

    def _cut(self, text: str, index: int) -> list[str | int]:
        token = self._tokens[index]
        if token not in text:
            return [text]
        parts: list[str | int] = []
        while (start := text.find(token)) >= 0:
            left, text = text[:start], text[start + len(token) :]
            parts += [left.rstrip(SPACES) if index in self.left_strips else left, index]
            text = text.lstrip(SPACES) if index in self.right_strips else text
        return [part for part in (*parts, text) if part != ""]


def _effective_types(ids: Mapping[str, int], types: Sequence[int], metadata: Mapping[str, Any]) -> dict[int, set[int]]:
    """Return the types of each token after llama.cpp changed them for some names."""
    kinds = {index: {int(kind)} for index, kind in enumerate(types)}
    control = set(END_TOKENS)
    for keys, names in _FILL_TOKENS.items():
        if not any(f"{KEY}{key}_token_id" in metadata for key in keys.split()):
            control |= set(names.split())
    for name in control & ids.keys():
        kinds[ids[name]].add(TokenType.CONTROL)
    for name in HARMONY_TOKENS & ids.keys():
        kinds[ids[name]] = {TokenType.USER_DEFINED}
    calls, ends = {"<|call|>", "<|calls|>"} & ids.keys(), {"<|return|>", "<|flush|>"} & ids.keys()
    if calls and ends and "<|end|>" in ids:
        kinds[ids["<|end|>"]] = {TokenType.USER_DEFINED}
    if {"<|tool_response>", "</s>"} <= ids.keys():
        kinds[ids["</s>"]] = {TokenType.NORMAL}
    return kinds


def _strips(
    ids: Mapping[str, int], special: frozenset[int], metadata: Mapping[str, Any]
) -> tuple[frozenset[int], frozenset[int]]:
    """Return the tokens that take away the white space before them, and those that take away what follows."""
    pre, name, architecture = (
        str(metadata.get(key, "")) for key in (f"{KEY}pre", "general.name", "general.architecture")
    )
    name = name.lower()
    jina = any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code"))
    if jina or any(part in architecture for part in ("nomic-bert-moe", "jina-bert-v3")):
        return frozenset(ids[token] for token in ("<mask>",) if token in ids), frozenset()
    if "phi-3" in name or "phi3" in name:
        if missing := {"</s>", "<unk>", "<s>", "<|endoftext|>"} - ids.keys():
            raise DataError(
                f"the model is named {name!r} and has no token {min(missing)!r}, which llama.cpp expects of Phi-3 and "
                "does not load without: give it another name"
            )
        return frozenset(), (special | {ids["</s>"]}) - {ids[token] for token in ("<unk>", "<s>", "<|endoftext|>")}
    if "modern-bert" in name:
        return frozenset(ids[token] for token in ("[MASK]",) if token in ids), frozenset()
    return frozenset(), frozenset()
