"""Turn each kind of Hugging Face tokenizer into a vocabulary of llama.cpp, and name what llama.cpp does not do.

A rule that llama.cpp cannot follow at all is a ModelError. One that matters for some texts only, such as a Unicode
normalization, is a deviation: differences of token ids that come from it are told from others.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mowa.errors import ModelError
from mowa.exporters.gguf.tokenizer.backend_rules import describe, expressions, flatten
from mowa.exporters.gguf.tokenizer.gguf_tokenizer import BYTE_CHARACTERS, SPACE
from mowa.exporters.gguf.tokenizer.hf_tokenizer import HFTokenizer
from mowa.exporters.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, split_words
from mowa.exporters.gguf.tokenizer.subword_models import merge_by_rank
from mowa.exporters.gguf.tokenizer.vocabulary import (
    Vocabulary,
    as_wordpiece,
    score_by_rank,
    with_bytes,
    with_literal_spaces,
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
    warnings    other things to tell the user
    first_only  whether a space is put before the first text only; llama.cpp puts one after each special token too
    """

    model: str
    vocabulary: Vocabulary
    entries: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    first_only: bool = False


def convert_vocabulary(hf: HFTokenizer, vocabulary: Vocabulary, texts: Sequence[str]) -> Conversion:
    """Return the vocabulary in llama.cpp's form. `texts`: on which unknown pre-tokenizers are compared.

    Raises ModelError if llama.cpp has no such kind of tokenizer, or no pre-tokenizer that splits like it.
    """
    model, kind = hf.spec["model"], hf.spec["model"]["type"]
    if kind == "BPE":
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ModelError(f"the tokenizer's BPE has {option}={model[option]!r}, which llama.cpp cannot do")
        steps = flatten(hf.spec["pre_tokenizer"])
        if any(step["type"] == "ByteLevel" for step in steps):
            return _convert_byte_level(hf, vocabulary, texts)
        return _convert_sentencepiece(hf, vocabulary)
    if kind == "WordPiece":
        return _convert_wordpiece(hf, vocabulary)
    if kind == "Unigram":
        return _convert_unigram(hf, vocabulary)
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
    return Conversion("gpt2", vocabulary, entries, rules + more, warnings)


def choose_pre_tokenizer(
    hf: HFTokenizer, vocabulary: Vocabulary, texts: Sequence[str]
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return the value of `tokenizer.ggml.pre`, rules that llama.cpp follows on some texts only, and warnings.

    A pre-tokenizer of llama.cpp that was made for the same regular expressions is taken. Otherwise one that splits all
    texts in the same way; token ids have to prove it.

    Raises ModelError if there is none.
    """
    found = expressions(flatten(hf.spec["pre_tokenizer"]))
    ignores = bool(hf.spec["model"].get("ignore_merges"))
    known = [name for name, one in PRE_TOKENIZERS.items() if one.byte_level and found in one.rules]
    splits = {text: hf.words(hf.normalize(text)) for text in texts}
    name = _with_merges(known, ignores, vocabulary)
    if name is not None:
        different = _first_difference(name, splits, hf)
        rule = f"llama.cpp's version of the regular expression of {name!r}, which splits {different!r} differently"
        return name, () if different is None else (rule,), ()
    candidates = {one: _first_difference(one, splits, hf) for one, kind in PRE_TOKENIZERS.items() if kind.byte_level}
    name = _with_merges([one for one, text in candidates.items() if text is None], ignores, vocabulary)
    if name is None:
        order = list(splits)
        nearest = max(candidates, key=lambda one: order.index(text) if (text := candidates[one]) in splits else 0)
        raise ModelError(
            f"llama.cpp has no pre-tokenizer for the expressions {list(found or ())} with ignore_merges={ignores}; the "
            f" nearest, {nearest!r}, splits {candidates[nearest]!r} differently: export to another format"
        )
    warning = (
        f"no pre-tokenizer of llama.cpp is known to have the regular expressions {list(found or ())}; {name!r} splits "
        f"{len(splits)} texts in the same way"
    )
    return name, (), (warning,)


def _with_merges(names: Sequence[str], ignores: bool, vocabulary: Vocabulary) -> str | None:
    """Return the first pre-tokenizer that takes words that are tokens as the tokenizer does."""
    same = next((name for name in names if PRE_TOKENIZERS[name].ignore_merges == ignores), None)
    if same is None and names and _merges_make_all_tokens(vocabulary):
        return names[0]
    return same


def _merges_make_all_tokens(vocabulary: Vocabulary) -> bool:
    """Return whether merging the characters of each token gives that token, so that ignoring merges changes nothing."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(vocabulary.merges)))}
    return all(
        index in vocabulary.added or len(merge_by_rank(token, ranks)) == 1
        for index, token in enumerate(vocabulary.tokens)
    )


def _first_difference(name: str, splits: Mapping[str, list[str]], hf: HFTokenizer) -> str | None:
    """Return the first text that a pre-tokenizer of llama.cpp splits in another way than the tokenizer."""
    patterns = PRE_TOKENIZERS[name].patterns
    for text, words in splits.items():
        pieces = split_words(hf.normalize(text), patterns)
        if ["".join(map(_BYTE_LEVEL_TABLE.__getitem__, piece.encode())) for piece in pieces] != words:
            return text
    return None


def _convert_sentencepiece(hf: HFTokenizer, vocabulary: Vocabulary) -> Conversion:
    model, prefix, first_only, others = hf.spec["model"], False, False, []
    for step in flatten(hf.spec["normalizer"]):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif not _escapes_spaces(step):
            others.append(step)
    rules = _unicode_rules(others)
    for step in flatten(hf.spec["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            scheme = step.get("prepend_scheme", "always")
            prefix, first_only = scheme != "never", scheme == "first"
            rules += ("a space before text that begins with one: llama.cpp puts it there",) if scheme != "never" else ()
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "}):
            raise _unsupported(step, "pre-tokenizer")
    if not model.get("byte_fallback"):
        raise ModelError("the tokenizer's BPE has neither ByteLevel nor byte_fallback; llama.cpp needs one of them")
    vocabulary = with_literal_spaces(with_bytes(vocabulary, model.get("unk_token")))
    scored, is_exact = score_by_rank(vocabulary)
    if not is_exact and not prefix:
        entries = {"pre": "sarvam-moe", "merges": [f"{left} {right}" for left, right in vocabulary.merges]}
        warning = "the merges have no order by score; the file needs a llama.cpp with the pre-tokenizer 'sarvam-moe'"
        return Conversion("gpt2", vocabulary, entries, rules, (warning,))
    return Conversion("llama", scored, {"pre": "default", "add_space_prefix": prefix}, rules, (), first_only)


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
    warning = "a cased WordPiece vocabulary needs a llama.cpp of 2026; older ones turn all text to lower case"
    rules = (
        f"words of more than {model.get('max_input_chars_per_word', 100)} characters, which llama.cpp does not reject, "
        "and lower case and accents of some scripts",
    )
    prefix = model.get("continuing_subword_prefix", "##")
    return Conversion("bert", as_wordpiece(vocabulary, prefix), entries, rules, () if lowercase else (warning,))


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
    vocabulary = with_bytes(vocabulary, unknown)
    if model.get("byte_fallback"):
        rules += ("byte_fallback: llama.cpp writes the unknown token for characters outside a unigram vocabulary",)
    entries |= {"add_space_prefix": prefix, "remove_extra_whitespaces": merges_spaces}
    rules += ("white space: llama.cpp merges or keeps all of it, and splits words only by pieces",)
    return Conversion("t5", vocabulary, entries, rules)


def _charsmap(step: Mapping[str, Any]) -> np.ndarray:
    """Return the bytes of a Precompiled normalizer, uint8."""
    return np.frombuffer(b64decode(step["precompiled_charsmap"]), np.uint8)
