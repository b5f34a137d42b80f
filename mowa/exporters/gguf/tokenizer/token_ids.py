"""Compare the token ids of two tokenizers on texts, and tell differences that are known from those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Encode = Callable[[str, bool], list[int]]
"""Text and whether BOS and the like are added → token ids; special tokens in the text are parsed."""
MAX_SHOWN = 80  # characters of a text in a message


@dataclass(frozen=True)
class Deviation:
    """Something of a tokenizer that llama.cpp does not do.

    message   what it is, and what to do about it
    explains  (text, ids of the tokenizer) → whether ids of that text differ for this reason
    """

    message: str
    explains: Callable[[str, Sequence[int]], bool]


@dataclass(frozen=True)
class Difference:
    """A text with different token ids."""

    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        pairs = enumerate(zip(self.expected, self.found, strict=False))
        at = next((i for i, (one, other) in pairs if one != other), min(len(self.expected), len(self.found)))
        text = repr(self.text if len(self.text) <= MAX_SHOWN else self.text[:MAX_SHOWN] + "…")
        expected, found = (f"{ids[at : at + 5]}" for ids in (self.expected, self.found))
        return f"{text}: from token {at} on {expected} in transformers and {found} in llama.cpp"


@dataclass(frozen=True)
class TokenIdReport:
    """Result of a comparison.

    checked      texts
    unexplained  differences without a known reason
    known        message of a deviation → differences that it explains
    """

    checked: int
    unexplained: list[Difference] = field(default_factory=list)
    known: Mapping[str, list[Difference]] = field(default_factory=dict)


def compare_token_ids(
    expected: Encode, found: Encode, texts: Iterable[str], deviations: Sequence[Deviation] = ()
) -> TokenIdReport:
    """Tokenize texts with both tokenizers, without BOS and the like; the first hundred with them too."""
    checked = 0
    unexplained: list[Difference] = []
    known: dict[str, list[Difference]] = {}
    for text in texts:
        checked += 1
        for add_special in (False, True) if checked <= 100 else (False,):
            ids, others = expected(text, add_special), found(text, add_special)
            if ids == others:
                continue
            plain = expected(text, False) if add_special else ids
            reason = next((one.message for one in deviations if one.explains(text, plain)), None)
            if reason is None:
                unexplained.append(Difference(text, ids, others))
            else:
                known.setdefault(reason, []).append(Difference(text, ids, others))
            break
    return TokenIdReport(checked, unexplained, known)
