"""Tokenize from GGUF metadata alone, exactly as llama.cpp does, without llama.cpp and without transformers.

`GGUFTokenizer` reads the keys `tokenizer.ggml.*`. It is what an exported tokenizer is compared with, and tokenizes for
models that exist as GGUF only. Supported vocabularies: `llama` (SentencePiece BPE), `gpt2` and `gemma4` (BPE), `bert`
(WordPiece), `t5` (unigram).

Source: llama-vocab.cpp of llama.cpp (MIT), build 11549.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mowa.errors import DataError, ModelError
from mowa.exporters.gguf.tokenizer.charsmap import CharsMap
from mowa.exporters.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, split_words
from mowa.exporters.gguf.tokenizer.special_tokens import KEY, SpecialTokens, TokenType
from mowa.exporters.gguf.tokenizer.subword_models import (
    UNKNOWN_PENALTY,
    build_trie,
    match_longest,
    merge_by_rank,
    merge_by_score,
    most_probable,
)
from mowa.exporters.gguf.tokenizer.unicode_classes import base_letter, category, lowercase

MODELS = ("llama", "gpt2", "gemma4", "bert", "t5")
SPACE = "\u2581"  # stands for a space in tokens
MAX_CACHED_WORDS = 100_000
_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "bos": {"llama": 1, "gpt2": 11, "bert": 101},
    "eos": {"llama": 2, "gpt2": 11, "t5": 1},
    "unknown": {"llama": 0, "bert": 100, "t5": 2},
    "seperator": {"bert": 102},  # spelled so in GGUF
}
_MATCHED = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)  # in a unigram vocabulary
_IDEOGRAPHS = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)),
    *((0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in byte-level BPE (GPT-2): printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


BYTE_CHARACTERS = byte_characters()
_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARACTERS)}


class GGUFTokenizer:
    """A tokenizer made from the metadata of a GGUF file."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Read the keys `tokenizer.ggml.*`, and `general.name` and `general.architecture` as llama.cpp does.

        Raises DataError if keys are missing or contradict each other, ModelError if the vocabulary is not supported.
        """
        self.model = str(_required(metadata, "model"))
        if self.model not in MODELS:
            raise ModelError(f"tokenizer.ggml.model is {self.model!r}; supported are {', '.join(MODELS)}")
        texts = (str(token).partition("\0")[0] for token in _required(metadata, "tokens"))  # they end at a NUL there
        self.tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise DataError(f"the token {twice!r} is in the vocabulary twice: llama.cpp does not load such a file")
        self.types = [int(kind) for kind in _per_token(metadata, "token_type", len(self.tokens), TokenType.NORMAL)]
        self.special = SpecialTokens(self.tokens, self.types, metadata)
        self._read_flags(metadata)
        self._words: dict[str, list[int]] = {}
        scores = [float(score) for score in _per_token(metadata, "scores", len(self.tokens), 0.0)]
        if self.model in ("gpt2", "gemma4"):
            self._ranks = _read_merges(metadata)
        elif self.model == "llama":
            self._scores = dict(zip(self.tokens, scores, strict=True))
        elif self.model == "bert":
            self._longest = max(map(len, self.tokens))
        else:
            self._prepare_unigram(metadata, scores)

    def _read_flags(self, metadata: Mapping[str, Any]) -> None:
        is_bpe = self.model in ("gpt2", "gemma4")
        name = "gemma4" if self.model == "gemma4" else str(metadata.get(f"{KEY}pre") or "default")
        if is_bpe and name not in PRE_TOKENIZERS:
            raise ModelError(f"the pre-tokenizer {name!r} is unknown; known are {', '.join(PRE_TOKENIZERS)}")
        self.pre: PreTokenizer = PRE_TOKENIZERS[name if is_bpe else "default"]
        self.is_gemma4 = is_bpe and name in ("gemma4", "granite-embed-multi-311m")

        def flag(key: str, default: bool) -> bool:
            return bool(metadata.get(KEY + key, default))

        self.add_space_prefix = flag("add_space_prefix", self.model == "llama")
        self.remove_extra_whitespaces = flag("remove_extra_whitespaces", False)
        self.add_bos = flag("add_bos_token", self.pre.add_bos if is_bpe else self.model in ("llama", "bert"))
        self.add_bos |= self.is_gemma4
        self.add_eos = flag("add_eos_token", self.model == "t5")
        self.clean_spaces = self.pre.clean_spaces if is_bpe else self.model == "bert"
        self.lowercase = flag("normalizer.lowercase", True)
        self.strip_accents = flag("normalizer.strip_accents", self.lowercase)
        self.bos, self.eos, self.unknown, self.separator = (self._special_id(metadata, key) for key in _DEFAULT_IDS)
        for added, index, key in ((self.add_bos, self.bos, "bos"), (self.add_eos, self.eos, "eos")):
            if added and index is None:
                raise DataError(f"add_{key}_token is true and {key}_token_id is not set: llama.cpp does not load this")

    def _special_id(self, metadata: Mapping[str, Any], name: str) -> int | None:
        """Return the id of a special token: that of the file, else llama.cpp's default for the vocabulary."""
        found = metadata.get(f"{KEY}{name}_token_id")
        if found is not None and 0 <= int(found) < len(self.tokens):
            return int(found)
        default = _DEFAULT_IDS[name].get(self.model)
        return default if default is not None and default < len(self.tokens) else None

    def _prepare_unigram(self, metadata: Mapping[str, Any], scores: Sequence[float]) -> None:
        matched = {token.encode(): index for token, index in self.ids.items() if self.types[index] in _MATCHED}
        own = {token: index for token, index in matched.items() if self.types[index] == TokenType.USER_DEFINED}
        typed = list(zip(scores, self.types, strict=True))
        self._trie = build_trie(matched)
        self._piece_scores = [0.0 if kind == TokenType.USER_DEFINED else score for score, kind in typed]
        self._penalty = min((score for score, kind in typed if kind == TokenType.NORMAL), default=0.0) - UNKNOWN_PENALTY
        self._charsmap = CharsMap(bytes(metadata.get(f"{KEY}precompiled_charsmap", b"")), build_trie(own))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of a text.

        add_special: add BOS, EOS or separator as the file says. parse_special: control tokens that the text spells
        become their ids; user-defined tokens always do.

        Raises DataError for text that is not Unicode, such as a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text has no UTF-8 form: {error.reason} at character {error.start}") from None
        ids: list[int] = []
        after_special = True
        for fragment in self.special.split(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._encode_fragment(fragment, after_special)
            after_special = isinstance(fragment, int)
        if not add_special:
            return ids
        is_bert = self.model == "bert"
        start = [self.bos] if self.add_bos or is_bert else []
        end = [self.separator] if is_bert else [self.eos] if self.add_eos else []
        return [index for index in (*start, *ids, *end) if index is not None]

    def _encode_fragment(self, text: str, after_special: bool) -> list[int]:
        if self.model == "llama":
            text = (" " if self.add_space_prefix and after_special else "") + text
            return self.encode_word(text.replace(" ", SPACE))
        if self.model == "t5":
            return self._most_probable(self._normalize(text.encode()))
        if self.model == "bert":
            words = self._bert_words(text)
        elif self.pre.byte_level:
            words = [_spell_bytes(word) for word in split_words(text, self.pre.patterns)]
        else:
            words = split_words(text.replace(" ", SPACE), self.pre.patterns)
        return [index for word in words for index in self._cached(word)]

    def _cached(self, word: str) -> list[int]:
        """Return the ids of a word of BPE or WordPiece."""
        if (found := self._words.get(word)) is None:
            if len(self._words) >= MAX_CACHED_WORDS:
                self._words.clear()
            found = self._words[word] = self.encode_word(word)
        return found

    def encode_word(self, word: str) -> list[int]:
        """Return the ids of a word that is split off and spelled as in the vocabulary, with U+2581 for a space."""
        if self.model == "t5":
            return self._most_probable(word.encode())
        if self.model == "bert":
            found = match_longest(SPACE + word, self.ids, self._longest)
            return found or ([] if self.unknown is None else [self.unknown])
        if self.model == "llama":
            pieces = merge_by_score(word, self._scores)
        else:
            whole = self.pre.ignore_merges or (self.is_gemma4 and not word.strip("\n"))
            pieces = [word] if whole and word in self.ids else merge_by_rank(word, self._ranks)
        return [index for piece in pieces for index in self._piece_ids(piece)]

    def _most_probable(self, text: bytes) -> list[int]:
        return most_probable(text, self._trie, self._piece_scores, self.unknown or 0, self._penalty)

    def _piece_ids(self, piece: str) -> Iterable[int]:
        """Return the id of a piece, or those of its bytes; BPE leaves out bytes without a token."""
        if (index := self.ids.get(piece)) is not None:
            return (index,)
        if self.model != "llama" and self.pre.byte_level:
            return (self.ids[char] for char in piece if char in self.ids)
        names = [f"<0x{byte:02X}>" for byte in piece.encode()]
        if self.model == "llama" and (missing := [name for name in names if name not in self.ids]):
            raise DataError(f"the vocabulary has neither {piece!r} nor {missing[0]}: llama.cpp fails on this text")
        return (self.ids[name] for name in names if name in self.ids)

    def _bert_words(self, text: str) -> list[str]:
        """Split text at white space; punctuation, ASCII symbols and ideographs are words of their own."""
        chars = [base_letter(char) for char in text] if self.strip_accents else list(text)
        words = [""]
        for char in chars:
            kind = category(char)
            if kind == "Z":
                words.append("")
            elif char in "\0\ufffd" or kind == "C" or (self.strip_accents and kind == "M"):
                continue
            else:
                char, code = lowercase(char) if self.lowercase else char, ord(char)
                is_symbol = kind == "S" and code < 0x7F
                if kind == "P" or is_symbol or any(first <= code <= last for first, last in _IDEOGRAPHS):
                    words += [char, ""]
                else:
                    words[-1] += char
        return [word for word in words if word]

    def _normalize(self, text: bytes) -> bytes:
        """Replace characters by the map of a unigram vocabulary, and spaces by U+2581."""
        space = SPACE.encode()
        normalized = bytearray()
        in_word = prefixed = False
        for piece in self._charsmap.normalize(text):
            for byte in piece:
                if byte != ord(" "):
                    if not in_word and (self.remove_extra_whitespaces or (self.add_space_prefix and not prefixed)):
                        normalized += space
                        prefixed = True
                    normalized.append(byte)
                elif not self.remove_extra_whitespaces:
                    normalized += space
                in_word = byte != ord(" ")
        return bytes(normalized)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        skip_special: leave out control tokens.
        """
        ids = list(ids)
        strip = self.add_space_prefix
        if skip_special and self.add_bos and ids and ids[0] == self.bos:
            ids, strip = ids[1:], False
        if skip_special and self.add_eos and ids and ids[-1] == self.eos:
            ids = ids[:-1]
        pieces = [b"" if skip_special and index in self.special.hidden else self.token_bytes(index) for index in ids]
        if strip and pieces:
            pieces[0] = pieces[0].removeprefix(b" ")
        text = b"".join(pieces).decode(errors="replace")
        return _clean_spaces(text) if self.clean_spaces else text

    def token_bytes(self, index: int) -> bytes:
        """Return the bytes that a token stands for in text; none for unused tokens."""
        token, kinds = self.tokens[index], self.special.types[index]
        if index in self.special.found:
            return token.encode()
        if TokenType.BYTE in kinds:
            return bytes([int(token[3:5], 16)])
        if TokenType.NORMAL not in kinds:
            return b""
        if self.model == "gpt2" and self.pre.byte_level:
            return bytes(byte for char in token for byte in ([_BYTES[char]] if char in _BYTES else char.encode()))
        return token.replace(SPACE, " ").encode()


def _spell_bytes(text: str) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in text.encode())


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if KEY + key not in metadata:
        raise DataError(f"the metadata has no {KEY}{key}: this GGUF file holds no tokenizer")
    return metadata[KEY + key]


def _per_token(metadata: Mapping[str, Any], key: str, count: int, default: float) -> Sequence[float]:
    values: Sequence[float] = metadata.get(KEY + key, [default] * count)
    if len(values) < count:
        raise DataError(f"{KEY}{key} has {len(values)} values for {count} tokens: the file is damaged")
    return values[:count]


def _read_merges(metadata: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Return (left, right) → rank; a merge is two tokens with a space between them."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(_required(metadata, "merges")):
        left, space, right = merge[:1], "", ""
        head, space, right = merge[1:].partition(" ")
        if space:
            ranks.setdefault((left + head, right), rank)
    return ranks


def _clean_spaces(text: str) -> str:
    """Remove spaces before punctuation and English contractions, as transformers does in decoded text."""
    text = re.sub(" ([?!.,])", r"\1", text)
    text = re.sub(" ' ", "'", text)
    return re.sub(" ('(?:s|m|re|ve))", r"\1", text)
