"""Turn each kind of Hugging Face tokenizer into a vocabulary of llama.cpp, and name what llama.cpp does not do.

A rule that llama.cpp cannot follow at all is a ModelError. One that matters for some texts only, such as a Unicode
normalization, is a deviation: differences of token ids that come from it are told from others.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mowa.errors import ModelError
from mowa.exporters.gguf.tokenizer.backend_rules import canonical, describe, expressions, flatten
from mowa.exporters.gguf.tokenizer.charsmap import CharsMap
from mowa.exporters.gguf.tokenizer.gguf_tokenizer import BYTE_CHARACTERS, SPACE
from mowa.exporters.gguf.tokenizer.hf_tokenizer import HFTokenizer
from mowa.exporters.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, split_words
from mowa.exporters.gguf.tokenizer.sentencepiece_model import BPE, UNIGRAM, SentencePieceModel
from mowa.exporters.gguf.tokenizer.special_tokens import TokenType
from mowa.exporters.gguf.tokenizer.subword_models import merge_by_rank
from mowa.exporters.gguf.tokenizer.token_ids import Deviation
from mowa.exporters.gguf.tokenizer.vocabulary import (
    Vocabulary,
    as_wordpiece,
    score_by_rank,
    with_literal_spaces,
    with_sentencepiece_types,
)

UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled")
_SPACES_REMOVED = (" {2,}", r"\s{2,}", r"\s+")  # expressions of Replace steps that merge spaces
_BYTE_LEVEL_TABLE = {byte: char for byte, char in enumerate(BYTE_CHARACTERS)}


@dataclass(frozen=True)
class Conversion:
    """A vocabulary of llama.cpp and the keys that belong to it.

    model       value of `tokenizer.ggml.model`
    entries     further keys, without `tokenizer.ggml.`
    rules       steps of the normalizer and pre-tokenizer that llama.cpp does not follow on all texts, in words
    deviations  other things that llama.cpp does not do
    warnings    other things to tell the user
    """

    model: str
    vocabulary: Vocabulary
    entries: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    deviations: tuple[Deviation, ...] = ()
    warnings: tuple[str, ...] = ()


def convert_vocabulary(hf: HFTokenizer, vocabulary: Vocabulary, texts: Sequence[str]) -> tuple[Conversion, ...]:
    """Return forms that the vocabulary can have in llama.cpp, the better one first; token ids decide between them.

    Args:
        texts: on which unknown pre-tokenizers are compared.

    Raises ModelError if llama.cpp has no such kind of tokenizer, or no pre-tokenizer that splits like it.
    """
    model, kind = hf.spec["model"], hf.spec["model"]["type"]
    if kind == "BPE":
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ModelError(f"the tokenizer's BPE has {option}={model[option]!r}, which llama.cpp cannot do")
        steps = flatten(hf.spec["pre_tokenizer"])
        if any(step["type"] == "ByteLevel" for step in steps):
            return (_convert_byte_level(hf, vocabulary, texts),)
        return _convert_sentencepiece(hf, vocabulary)
    if kind == "WordPiece":
        return (_convert_wordpiece(hf, vocabulary),)
    if kind == "Unigram":
        return (_convert_unigram(hf, vocabulary),)
    if kind == "SentencePiece":
        return (_convert_model_file(model["sentencepiece"], vocabulary),)
    raise ModelError(f"the tokenizer's model is {kind}; llama.cpp has BPE, WordPiece and Unigram")


def _unsupported(step: Mapping[str, Any], of: str) -> ModelError:
    return ModelError(
        f"llama.cpp has no {describe(step)}, which is a step of the tokenizer's {of}: it cannot be exported"
    )


def _unicode_rules(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return Unicode normalizations as rules that llama.cpp does not follow. Raises ModelError for other steps."""
    for step in steps:
        if step["type"] not in UNICODE_FORMS:
            raise _unsupported(step, "normalizer")
    return tuple(f"the normalizer {step['type']}: llama.cpp does not normalize text" for step in steps)


def _convert_byte_level(hf: HFTokenizer, vocabulary: Vocabulary, texts: Sequence[str]) -> Conversion:
    steps = flatten(hf.spec["pre_tokenizer"])
    for step in steps:
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            raise _unsupported(step, "pre-tokenizer")
    rules = _unicode_rules(flatten(hf.spec["normalizer"]))
    name, more, warnings = choose_pre_tokenizer(hf, vocabulary, texts)
    entries = {"pre": name, "merges": [f"{left} {right}" for left, right in vocabulary.merges]}
    return Conversion("gpt2", vocabulary, entries, rules + more, warnings=warnings)


def choose_pre_tokenizer(
    hf: HFTokenizer, vocabulary: Vocabulary, texts: Sequence[str]
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return the value of `tokenizer.ggml.pre`, rules that llama.cpp follows on some texts only, and warnings.

    A pre-tokenizer of llama.cpp that was made for the same regular expressions is taken. Otherwise one that splits all
    texts in the same way; token ids have to prove it.

    Raises ModelError if there is none.
    """
    found = expressions(flatten(hf.spec["pre_tokenizer"]))
    splits = {text: hf.words(hf.normalize(text)) for text in texts}
    if known := _made_for(found):
        name = _with_merges(known, hf, vocabulary)
        different = _first_difference(name, splits, hf)
        rule = f"llama.cpp's version of the regular expression of {name!r}, which splits {different!r} differently"
        return name, () if different is None else (rule,), ()
    candidates = {one: _first_difference(one, splits, hf) for one, kind in PRE_TOKENIZERS.items() if kind.byte_level}
    if not (same := [one for one, text in candidates.items() if text is None]):
        order = {text: position for position, text in enumerate(splits)}
        nearest = max(candidates, key=lambda one: order[str(candidates[one])])
        raise ModelError(
            f"llama.cpp has no pre-tokenizer that splits text like the regular expressions {list(found or ())}; the "
            f"nearest, {nearest!r}, splits {candidates[nearest]!r} differently: export to another format"
        )
    name = _with_merges(same, hf, vocabulary)
    return name, (), (
        f"no pre-tokenizer of llama.cpp was made for the regular expressions {list(found or ())}; {name!r} splits "
        f"{len(splits)} texts in the same way",
    )  # fmt: skip


def _made_for(found: tuple[str, ...] | None) -> list[str]:
    """Return the pre-tokenizers of llama.cpp that were made for these regular expressions."""
    return [
        name
        for name, one in PRE_TOKENIZERS.items()
        if one.byte_level and found in [tuple(map(canonical, rule)) for rule in one.rules]
    ]


def _with_merges(names: Sequence[str], hf: HFTokenizer, vocabulary: Vocabulary) -> str:
    """Return the first pre-tokenizer that takes words that are tokens as the tokenizer does: whole, or merged.

    Raises ModelError if there is none, and the two are not the same for this vocabulary.
    """
    ignores = bool(hf.spec["model"].get("ignore_merges"))
    if (same := next((name for name in names if PRE_TOKENIZERS[name].ignore_merges == ignores), None)) is not None:
        return same
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(vocabulary.merges)))}
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == TokenType.NORMAL and len(pieces := merge_by_rank(token, ranks)) > 1:
            raise ModelError(
                f"the tokenizer has ignore_merges={ignores} and llama.cpp's {names[0]!r} the opposite; its token "
                f"{token!r} is merged to {pieces} only: export to another format"
            )
    return names[0]


def _first_difference(name: str, splits: Mapping[str, list[str]], hf: HFTokenizer) -> str | None:
    """Return the first text that a pre-tokenizer of llama.cpp splits in another way than the tokenizer."""
    patterns = PRE_TOKENIZERS[name].patterns
    for text, words in splits.items():
        pieces = split_words(hf.normalize(text), patterns)
        if ["".join(map(_BYTE_LEVEL_TABLE.__getitem__, piece.encode())) for piece in pieces] != words:
            return text
    return None


def _convert_sentencepiece(hf: HFTokenizer, vocabulary: Vocabulary) -> tuple[Conversion, ...]:
    model, others = hf.spec["model"], []
    prefix = False
    deviations: tuple[Deviation, ...] = ()
    for step in flatten(hf.spec["normalizer"]):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif not _escapes_spaces(step):
            others.append(step)
    rules = _unicode_rules(others)
    for step in flatten(hf.spec["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            scheme = step.get("prepend_scheme", "always")
            prefix = scheme != "never"
            rules += ("no space is put before text that begins with one: llama.cpp puts it there",) if prefix else ()
            deviations += (_space_before_first(vocabulary),) if scheme == "first" else ()
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "}):
            raise _unsupported(step, "pre-tokenizer")
    if not model.get("byte_fallback"):
        raise ModelError("the tokenizer's BPE has neither ByteLevel nor byte_fallback; llama.cpp needs one of them")
    vocabulary = with_literal_spaces(with_sentencepiece_types(vocabulary, model.get("unk_token"), has_bytes=True))
    scored, is_exact = score_by_rank(vocabulary)
    by_score = Conversion("llama", scored, {"pre": "default", "add_space_prefix": prefix}, rules, deviations)
    if is_exact:
        return (by_score,)
    warning = (
        "scores made from ranks of merges may merge some texts in another order; those of the comparison are equal"
    )
    by_score = replace(by_score, warnings=(warning,))
    if prefix:
        return (by_score,)
    entries = {"pre": "sarvam-moe", "merges": [f"{left} {right}" for left, right in vocabulary.merges]}
    warning = (
        "the file needs a llama.cpp of 2026 with the pre-tokenizer 'sarvam-moe', as the merges have no order by score"
    )
    return Conversion("gpt2", vocabulary, entries, rules, deviations, (warning,)), by_score


def _space_before_first(vocabulary: Vocabulary) -> Deviation:
    contents = [token.content for token in vocabulary.added.values()]
    message = "a space is put before the first text only: llama.cpp puts one after each special token too"
    return Deviation(message, lambda text, ids: any(content in text for content in contents))


def _escapes_spaces(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE


def _merges_spaces(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"].get("Regex") in _SPACES_REMOVED
    return bool(step["type"] == "Strip" and step.get("strip_right", True))


def _convert_wordpiece(hf: HFTokenizer, vocabulary: Vocabulary) -> Conversion:
    model, normalizers = hf.spec["model"], flatten(hf.spec["normalizer"])
    steps = flatten(hf.spec["pre_tokenizer"])
    if [step["type"] for step in normalizers] != ["BertNormalizer"]:
        raise ModelError("the tokenizer's WordPiece has another normalizer than BertNormalizer, llama.cpp's only")
    if [step["type"] for step in steps] != ["BertPreTokenizer"]:
        raise ModelError("the tokenizer's WordPiece has another pre-tokenizer than BertPreTokenizer, llama.cpp's only")
    normalizer = normalizers[0]
    for option in ("clean_text", "handle_chinese_chars"):
        if not normalizer.get(option, True):
            raise _unsupported(normalizer, "normalizer")
    lowercase = bool(normalizer.get("lowercase", True))
    strips = normalizer.get("strip_accents")
    strip_accents = lowercase if strips is None else bool(strips)
    entries = {"pre": "default", "normalizer.lowercase": lowercase, "normalizer.strip_accents": strip_accents}
    warnings = () if lowercase else ("a llama.cpp before 2026 turns all text to lower case",)
    rules = ("lower case, accents and control characters of BertNormalizer, of which llama.cpp has simpler ones",)
    longest, prefix = int(model.get("max_input_chars_per_word", 100)), model.get("continuing_subword_prefix", "##")
    deviations = (
        Deviation(
            f"words of more than {longest} characters are unknown: llama.cpp splits them",
            lambda text, ids: any(len(word) > longest for word in hf.words(hf.normalize(text))),
        ),
        Deviation("U+2581 in text: llama.cpp marks the beginning of a word with it", lambda text, ids: SPACE in text),
    )
    return Conversion("bert", as_wordpiece(vocabulary, prefix), entries, rules, deviations, warnings)


def _convert_unigram(hf: HFTokenizer, vocabulary: Vocabulary) -> Conversion:
    model, others = hf.spec["model"], []
    entries: dict[str, Any] = {"pre": "default"}
    merges_spaces, prefix = False, False
    for step in flatten(hf.spec["normalizer"]):
        if step["type"] == "Precompiled":
            entries["precompiled_charsmap"] = _charsmap(step)
        elif _merges_spaces(step):
            merges_spaces = True
        elif not _escapes_spaces(step):
            others.append(step)
    rules = _unicode_rules(others)
    for step in flatten(hf.spec["pre_tokenizer"]):
        if step["type"] == "WhitespaceSplit":
            merges_spaces = True
        elif step["type"] == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            prefix = step.get("prepend_scheme", "always") != "never"
        else:
            raise _unsupported(step, "pre-tokenizer")
    unknown = vocabulary.tokens[int(model["unk_id"])] if model.get("unk_id") is not None else None
    vocabulary = with_sentencepiece_types(vocabulary, unknown, has_bytes=bool(model.get("byte_fallback")))
    if model.get("byte_fallback"):
        rules += ("byte_fallback: llama.cpp writes the unknown token for characters outside a unigram vocabulary",)
    entries |= {"add_space_prefix": prefix, "remove_extra_whitespaces": merges_spaces}
    rules += ("white space: llama.cpp merges or keeps all of it, and splits words only by pieces",)
    return Conversion("t5", vocabulary, entries, rules)


def _charsmap(step: Mapping[str, Any]) -> np.ndarray:
    """Return the bytes of a Precompiled normalizer, uint8."""
    return np.frombuffer(b64decode(step["precompiled_charsmap"]), np.uint8)


def _convert_model_file(model: SentencePieceModel, vocabulary: Vocabulary) -> Conversion:
    """Convert the SentencePiece model of a slow tokenizer, with its own scores and types."""
    if model.kind not in (UNIGRAM, BPE):
        raise ModelError(f"the SentencePiece model has the type {model.kind}; llama.cpp has 1 (unigram) and 2 (BPE)")
    added = vocabulary.added.keys()
    own = {index: kind for index, kind in enumerate(model.types) if index not in added or kind == TokenType.UNKNOWN}
    types = [own.get(index, kind) for index, kind in enumerate(vocabulary.types)]
    vocabulary = with_literal_spaces(replace(vocabulary, types=types))
    entries = {"pre": "default", "add_space_prefix": model.add_dummy_prefix}
    entries["remove_extra_whitespaces"] = model.remove_extra_whitespaces
    spaces = Deviation(
        "white space: llama.cpp merges, keeps or adds other spaces than SentencePiece",
        lambda text, ids: text != " ".join(text.split()) or SPACE in text,
    )
    if model.kind == UNIGRAM:
        charsmap = {"precompiled_charsmap": np.frombuffer(model.charsmap, np.uint8)} if model.charsmap else {}
        return Conversion("t5", vocabulary, entries | charsmap, (), (spaces,))
    deviations: tuple[Deviation, ...] = (spaces,) if model.remove_extra_whitespaces else ()
    if model.charsmap:
        normalize = CharsMap(model.charsmap, {}).normalize
        message = "the normalization of the SentencePiece model: llama.cpp does not normalize text"
        deviations += (Deviation(message, lambda text, ids: b"".join(normalize(text.encode())) != text.encode()),)
    return Conversion("llama", vocabulary, entries, (), deviations)
