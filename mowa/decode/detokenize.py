"""Turn the tokens of a language model into text, all at once or one by one, with stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def decode_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of tokens, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first of the stop strings begins in `text`; None if there is none."""
    found = [position for one in stop if (position := text.find(one)) >= 0]
    return min(found) if found else None


class StopFilter:
    """Passes text on up to the first stop string, and withholds what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.stopped = stop, "", False

    def push(self, text: str) -> str:
        """Return the text that is certain after `text` was added."""
        if self.stopped:
            return ""
        held = self._held + text
        if (cut := find_stop(held, self._stop)) is not None:
            self.stopped, self._held = True, ""
            return held[:cut]
        longest = max(map(len, self._stop), default=1) - 1
        keep = next(
            (n for n in range(min(longest, len(held)), 0, -1) if any(one.startswith(held[-n:]) for one in self._stop)),
            0,
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return the text that was withheld: no more follows."""
        rest, self._held = self._held, ""
        return rest


class TextStream:
    """Turns tokens into text that will not change, and withholds what may be the beginning of a stop string.

    A token may be part of a character, and its text may depend on the tokens before it: the text of the last few tokens
    is decoded with and without the new one, and the difference is new text. Special tokens have no text; without them,
    the last few tokens always have some, and what a decoder strips from the beginning of a text is never new.
    """

    def __init__(self, tokenizer: Any, special_ids: Collection[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._special_ids = tokenizer, frozenset(special_ids)
        self._ids: list[int] = []
        self._start = self._read = 0
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; there is no text after it."""
        return self._filter.stopped

    def push(self, token: int) -> str:
        """Return the text that is certain after one more token."""
        if token in self._special_ids:
            return ""
        self._ids.append(token)
        text = decode_tokens(self._tokenizer, self._ids[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._filter.push(self._advance(text))

    def finish(self) -> str:
        """Return the rest of the text."""
        text = self._advance(decode_tokens(self._tokenizer, self._ids[self._start :]))
        return self._filter.push(text) + self._filter.finish()

    def _advance(self, text: str) -> str:
        before = decode_tokens(self._tokenizer, self._ids[self._start : self._read])
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]
