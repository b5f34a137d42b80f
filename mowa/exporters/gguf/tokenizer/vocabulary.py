"""Read tokens, types, scores and merges from the JSON of a Hugging Face tokenizer, in the form that llama.cpp expects.

SentencePiece BPE has merges in Hugging Face's form and scores in llama.cpp's. Scores are made from ranks of merges,
which is exact if every way to make a token is a merge and ranks of different tokens do not interleave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mowa.errors import ModelError
from mowa.exporters.gguf.tokenizer.gguf_tokenizer import SPACE
from mowa.exporters.gguf.tokenizer.special_tokens import TokenType

MAX_NAMED = 5  # tokens in a message
UNREACHABLE = -1e9  # score of a token that no merge makes
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text before it is split; see `AddedToken` of the `tokenizers` package."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id and what belongs to them.

    tokens   text by id, without gaps
    types    `TokenType` by id
    merges   (left, right) in order, for BPE
    scores   by id, for SentencePiece BPE and unigram
    added    id → added token
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    added: Mapping[int, AddedToken] = field(default_factory=dict)


def read_added_tokens(spec: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return id → added token."""
    names = AddedToken.__dataclass_fields__
    return {
        int(one["id"]): AddedToken(**{name: one[name] for name in names if name in one}) for one in spec["added_tokens"]
    }


def read_vocabulary(spec: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary of a tokenizer's JSON with its own spellings; tokens that are not added are normal.

    Ids that no token has become unused tokens `[PAD{id}]`.
    """
    model, added = spec["model"], read_added_tokens(spec)
    scores: dict[int, float] = {}
    if isinstance(model["vocab"], Mapping):
        by_id = {int(index): str(token) for token, index in model["vocab"].items()}
    else:  # unigram: pairs of a token and its score
        by_id = {index: str(token) for index, (token, _) in enumerate(model["vocab"])}
        scores = {index: float(score) for index, (_, score) in enumerate(model["vocab"])}
    types = dict.fromkeys(by_id, int(TokenType.NORMAL))
    for index, token in added.items():
        by_id[index] = token.content
        types[index] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    count = max(by_id, default=-1) + 1
    merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model.get("merges", ())]
    vocabulary = Vocabulary(
        [by_id.get(index, f"[PAD{index}]") for index in range(count)],
        [types.get(index, int(TokenType.UNUSED)) for index in range(count)],
        [(left, right) for left, right in merges],
        [scores.get(index, 0.0) for index in range(count)] if scores else [],
        added,
    )
    return vocabulary


def fit_vocabulary(vocabulary: Vocabulary, vocab_size: int, *, drop_excess: bool = False) -> Vocabulary:
    """Return the vocabulary with as many tokens as the model has embeddings, filled up with unused `[PAD{id}]`.

    drop_excess: leave out added tokens that have no embedding; the model cannot use them anyway.

    Raises ModelError if there are more tokens than embeddings, or one text is the token of two ids.
    """
    count = len(vocabulary.tokens)
    if count > vocab_size:
        excess = range(vocab_size, count)
        names = ", ".join(repr(vocabulary.tokens[index]) for index in excess[:MAX_NAMED])
        if not (drop_excess and all(index in vocabulary.added for index in excess)):
            raise ModelError(
                f"the tokenizer has {count} tokens and the model has embeddings for {vocab_size}: call "
                f"model.resize_token_embeddings({count}) before training, or remove the tokens ({names})"
            )
        added = {index: token for index, token in vocabulary.added.items() if index < vocab_size}
        vocabulary = replace(vocabulary, added=added)
    tokens = [*vocabulary.tokens[:vocab_size], *(f"[PAD{index}]" for index in range(count, vocab_size))]
    padding = vocab_size - count
    vocabulary = replace(
        vocabulary,
        tokens=tokens,
        types=[*vocabulary.types[:vocab_size], *([int(TokenType.UNUSED)] * padding)],
        scores=[*vocabulary.scores[:vocab_size], *([UNREACHABLE] * padding)] if vocabulary.scores else [],
    )
    return with_unique_tokens(vocabulary)


def with_unique_tokens(vocabulary: Vocabulary) -> Vocabulary:
    """Return a vocabulary whose padding has names that no other token has.

    Raises ModelError if a text is the token of two ids, which llama.cpp rejects.
    """
    taken: dict[str, int] = {}
    tokens = list(vocabulary.tokens)
    for index, token in enumerate(tokens):
        if token in taken:
            unused = next((one for one in (index, taken[token]) if vocabulary.types[one] == TokenType.UNUSED), None)
            if unused is None:
                raise ModelError(
                    f"the token {token!r} has the ids {taken[token]} and {index}, and llama.cpp takes each text once: "
                    "remove one of them from tokenizer.json"
                )
            tokens[unused] = f"[PAD{unused}_{len(tokens)}]"
        taken[token] = index
    return replace(vocabulary, tokens=tokens)


def score_by_rank(vocabulary: Vocabulary) -> tuple[Vocabulary, bool]:
    """Return a vocabulary with scores made from the ranks of its merges, and whether they order merges exactly.

    A token's score is the negative rank of its first merge. Exact means: merging by score, any two neighbours that join
    to a token, is the same as merging by rank the pairs that are listed.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(vocabulary.merges):
        ranks.setdefault(left + right, []).append(rank)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    scores = [UNREACHABLE] * len(vocabulary.tokens)
    for token, found in ranks.items():
        if token in ids:
            scores[ids[token]] = -float(found[0])
    in_turn = all(found[-1] - found[0] == len(found) - 1 for found in ranks.values())
    return replace(vocabulary, scores=scores), in_turn and not _has_other_splits(vocabulary, set(vocabulary.merges))


def _has_other_splits(vocabulary: Vocabulary, merges: set[tuple[str, str]]) -> bool:
    """Return whether two tokens join to a third without a merge that says so.

    Only tokens that merging can produce count: single characters and results of merges. Added tokens are cut out of
    text before, except those with U+2581, which spaces become later.
    """
    reachable = {left + right for left, right in merges} | {token for token in vocabulary.tokens if len(token) == 1}
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind not in (TokenType.NORMAL, TokenType.USER_DEFINED) or (kind != TokenType.NORMAL and SPACE not in token):
            continue
        for cut in range(1, len(token)):
            if token[:cut] in reachable and token[cut:] in reachable and (token[:cut], token[cut:]) not in merges:
                return True
    return False


def with_sentencepiece_types(vocabulary: Vocabulary, unknown: str | None, *, has_bytes: bool) -> Vocabulary:
    """Return a vocabulary whose unknown token, and byte tokens if it has some, have those types."""
    types = list(vocabulary.types)
    for index, token in enumerate(vocabulary.tokens):
        if has_bytes and token in BYTES:
            types[index] = int(TokenType.BYTE)
        elif token == unknown:
            types[index] = int(TokenType.UNKNOWN)
    return replace(vocabulary, types=types)


def with_literal_spaces(vocabulary: Vocabulary) -> Vocabulary:
    """Return a vocabulary whose added tokens are spelled as in text where they are matched in normalized text."""
    tokens = list(vocabulary.tokens)
    for index, token in vocabulary.added.items():
        if token.normalized:
            tokens[index] = token.content.replace(SPACE, " ")
    return replace(vocabulary, tokens=tokens)


def as_wordpiece(vocabulary: Vocabulary, prefix: str) -> Vocabulary:
    """Return a WordPiece vocabulary as llama.cpp spells it: U+2581 before tokens that begin a word, else no prefix."""

    def spell(index: int, token: str) -> str:
        if vocabulary.types[index] != TokenType.NORMAL:
            return token
        return token.removeprefix(prefix) if token.startswith(prefix) else SPACE + token

    return replace(vocabulary, tokens=[spell(index, token) for index, token in enumerate(vocabulary.tokens)])


def unreachable_tokens(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Return tokens of several characters that no merge makes."""
    made = {left + right for left, right in merges}
    return [token for token in tokens if len(token) > 1 and token not in made]
