"""Turn a tokenizer of transformers into the metadata of a GGUF file, and prove by token ids that it is the same one.

`convert_tokenizer` derives every key from the tokenizer's own rules, tokenizes hard texts and the caller's with both
the tokenizer and `GGUFTokenizer`, and refuses if the ids differ for a reason that is not known. `tokenizer_metadata`
returns the metadata alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mowa.data.chat.template import resolve_chat_template
from mowa.errors import DataError, ModelError
from mowa.exporters.gguf.chat_template import chat_template_metadata
from mowa.exporters.gguf.tokenizer.battery import MAX_TOKENS, hard_texts
from mowa.exporters.gguf.tokenizer.gguf_tokenizer import GGUFTokenizer
from mowa.exporters.gguf.tokenizer.hf_tokenizer import HFTokenizer, names_of
from mowa.exporters.gguf.tokenizer.kinds import Conversion, convert_vocabulary
from mowa.exporters.gguf.tokenizer.special_tokens import KEY, SPACES, TokenType
from mowa.exporters.gguf.tokenizer.token_ids import Deviation, Difference, TokenIdReport, compare_token_ids
from mowa.exporters.gguf.tokenizer.vocabulary import (
    AddedToken,
    Vocabulary,
    fit_vocabulary,
    read_vocabulary,
    unreachable_tokens,
    with_unique_tokens,
)

MAX_UNREACHABLE = 300  # tokens that no merge makes and that are put into texts of the comparison
MAX_ROUNDING = 1e-6  # of sums of scores, relative
_ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls",
            "mask": "mask"}  # fmt: skip


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A tokenizer as GGUF metadata, and what was proven about it.

    metadata  key → str, bool, int, list of str, or array: int32 token types, float32 scores, uint8 charsmap
    warnings  what llama.cpp does otherwise, with how many texts of the comparison differ for that reason
    report    of the comparison
    """

    metadata: dict[str, Any]
    warnings: tuple[str, ...]
    report: TokenIdReport


def tokenizer_metadata(tokenizer: Any, vocab_size: int, **options: Any) -> dict[str, Any]:
    """Return the metadata of `convert_tokenizer`, which takes the same arguments."""
    return convert_tokenizer(tokenizer, vocab_size, **options).metadata


def convert_tokenizer(
    tokenizer: Any,
    vocab_size: int,
    texts: Sequence[str] = (),
    *,
    model_name: str = "",
    drop_excess: bool = False,
    allow_known_differences: bool = False,
) -> ConvertedTokenizer:
    """Convert a fast tokenizer of transformers for llama.cpp and compare token ids.

    Args:
        tokenizer: of transformers.
        vocab_size: rows of the model's embedding.
        texts: the caller's own, such as training texts; their ids must be the same.
        model_name: `general.name` of the file, by which llama.cpp strips white space beside special tokens of Phi-3.
        drop_excess: leave out added tokens without an embedding instead of refusing.
        allow_known_differences: accept differences in `texts` that have a known reason, as in the hard texts.

    Raises ModelError if llama.cpp has no such tokenizer, the vocabulary does not fit the embedding, or ids differ; the
    message names the rule or the first text. Raises DataError if `texts` hold text that is not Unicode.
    """
    hf = HFTokenizer(tokenizer)
    vocabulary = fit_vocabulary(read_vocabulary(hf.spec), vocab_size, drop_excess=drop_excess)
    special = [token.content for token in vocabulary.added.values()]
    battery = hard_texts(special, _texts_of_tokens(hf, vocabulary))
    tried = []
    for conversion in convert_vocabulary(hf, vocabulary, [*battery, *texts]):
        metadata = _metadata(tokenizer, hf, conversion)
        reader = GGUFTokenizer(metadata | {"general.name": model_name})
        deviations = _deviations(conversion, hf, reader)
        hard, own = (compare_token_ids(hf.encode, reader.encode, chosen, deviations) for chosen in (battery, texts))
        tried.append((conversion, metadata, hard, own))
        if not hard.unexplained and not own.unexplained:
            break
    else:
        _, _, hard, own = tried[0]
        _require_equal(own.unexplained, "a text of yours")
        _require_equal(hard.unexplained, "a text of the built-in comparison")
    if not allow_known_differences:
        for reason, differences in own.known.items():
            _require_equal(differences, "a text of yours", f" ({reason})")
    known = {key: [*hard.known.get(key, ()), *own.known.get(key, ())] for key in {**hard.known, **own.known}}
    report = TokenIdReport(hard.checked + own.checked, [], known)
    found = tuple(
        f"{reason}: {len(differences)} of {report.checked} texts have other token ids, such as {differences[0]}"
        for reason, differences in known.items()
    )
    return ConvertedTokenizer(metadata, (*conversion.warnings, *found), report)


def _texts_of_tokens(hf: HFTokenizer, vocabulary: Vocabulary) -> list[str]:
    """Return texts of a sample of tokens, and of tokens that no merge makes."""
    used = [index for index, kind in enumerate(vocabulary.types) if kind != TokenType.UNUSED]
    sample = [hf.decode([index]) for index in used[:: max(1, len(used) // MAX_TOKENS)]]
    rare = unreachable_tokens(vocabulary.tokens, vocabulary.merges) if vocabulary.merges else []
    return [*sample, *rare[:MAX_UNREACHABLE]]


def _require_equal(differences: Sequence[Difference], where: str, reason: str = "") -> None:
    if differences:
        raise ModelError(
            f"the exported tokenizer differs from transformers on {where}{reason}: {differences[0]}; "
            f"{len(differences)} texts differ"
        )


def _metadata(tokenizer: Any, hf: HFTokenizer, conversion: Conversion) -> dict[str, Any]:
    vocabulary = with_unique_tokens(conversion.vocabulary)
    entries: dict[str, Any] = {
        "model": conversion.model,
        **conversion.entries,
        "tokens": vocabulary.tokens,
        "token_type": np.array(vocabulary.types, np.int32),
    }
    if vocabulary.scores:
        entries["scores"] = np.array(vocabulary.scores, np.float32)
    entries |= _special_ids(tokenizer, vocabulary)
    entries |= _surroundings(hf, conversion.model, entries, vocabulary)
    metadata = {KEY + key: value for key, value in entries.items()}
    return metadata | chat_template_metadata(getattr(tokenizer, "chat_template", None))


def _special_ids(tokenizer: Any, vocabulary: Vocabulary) -> dict[str, int]:
    """Return the ids of special tokens by key; the end of a turn is the token that the chat template ends one with."""
    ids = {key: getattr(tokenizer, f"{name}_token_id", None) for name, key in _ID_KEYS.items()}
    by_text = {token.content: index for index, token in vocabulary.added.items()}
    ids["eot"] = by_text.get(_turn_end(tokenizer))
    ids["eom"] = by_text.get("<|eom_id|>")
    return {f"{key}_token_id": int(i) for key, i in ids.items() if i is not None and 0 <= i < len(vocabulary.tokens)}


def _turn_end(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return resolve_chat_template(tokenizer).turn_end
    except DataError:
        return ""  # a template that cannot be rendered is reported by `check_template`


def _surroundings(
    hf: HFTokenizer, model: str, entries: Mapping[str, Any], vocabulary: Vocabulary
) -> dict[str, bool | int]:
    """Return which special tokens llama.cpp is to add around a text, as the tokenizer does.

    Raises ModelError if it adds others than BOS before the text and EOS after it.
    """
    before, after = hf.surrounding_ids()
    bos, eos = entries.get("bos_token_id"), entries.get("eos_token_id")
    if model == "bert":
        cls, sep = entries.get("cls_token_id"), entries.get("seperator_token_id")
        if (before, after) == ([cls], [sep]):
            return {"bos_token_id": int(before[0]), "add_bos_token": True, "add_sep_token": True}
    elif before in ([], [bos]) and after in ([], [eos]):
        return {"add_bos_token": before == [bos], "add_eos_token": after == [eos]}
    raise ModelError(
        f"the tokenizer puts {names_of(vocabulary.tokens, before)} before a text and "
        f"{names_of(vocabulary.tokens, after)} after it; llama.cpp can put BOS ({bos}) before and EOS ({eos}) after it"
    )


def _deviations(conversion: Conversion, hf: HFTokenizer, reader: GGUFTokenizer) -> list[Deviation]:
    """Return what llama.cpp does not do, with a test of whether that is why ids of a text differ."""

    def by_rules(text: str, ids: Sequence[int]) -> bool:
        return _ids_by_hf_rules(text, hf, reader) == list(ids)

    found = [Deviation(_strip_message(token), _beside(token)) for token in _misplaced(conversion.vocabulary, reader)]
    for index in sorted(reader.special.found ^ conversion.vocabulary.added.keys()):
        token = reader.tokens[index]
        kind = "special" if index in reader.special.found else "text"
        message = f"the token {token!r}: llama.cpp takes it for {kind} because of its name"
        found.append(Deviation(message, partial(_contains, token)))
    if conversion.model == "t5":
        message = "pieces of equal sums of scores, of which rounding chooses: scores are float32 in GGUF"
        found.append(Deviation(message, partial(_is_tie, reader, conversion.vocabulary.scores)))
    return [*found, *conversion.deviations, *(Deviation(rule, by_rules) for rule in conversion.rules)]


def _is_tie(reader: GGUFTokenizer, scores: Sequence[float], text: str, ids: Sequence[int]) -> bool:
    """Return whether two segmentations of a text have the same sum of scores."""
    sums = [sum(scores[index] for index in found) for found in (ids, reader.encode(text, add_special=False))]
    return abs(sums[0] - sums[1]) <= MAX_ROUNDING * abs(sums[0])


def _contains(token: str, text: str, ids: Sequence[int]) -> bool:
    return token in text


def _ids_by_hf_rules(text: str, hf: HFTokenizer, reader: GGUFTokenizer) -> list[int]:
    """Return ids of the exported vocabulary where text is normalized and split by the tokenizer's own rules."""
    ids: list[int] = []
    for fragment in reader.special.split(text, parse_special=True):
        if isinstance(fragment, int):
            ids.append(fragment)
        else:
            ids += [index for word in hf.words(hf.normalize(fragment)) for index in reader.encode_word(word)]
    return ids


def _misplaced(vocabulary: Vocabulary, reader: GGUFTokenizer) -> list[AddedToken]:
    """Return added tokens that take white space along, or stand alone only, and do not in llama.cpp."""
    return [
        token
        for index, token in vocabulary.added.items()
        if token.single_word
        or token.lstrip != (index in reader.special.left_strips)
        or token.rstrip != (index in reader.special.right_strips)
    ]


def _strip_message(token: AddedToken) -> str:
    what = "is found as a word of its own only" if token.single_word else "takes white space beside it along"
    return f"the token {token.content!r} {what}; llama.cpp does not do that"


def _beside(token: AddedToken) -> Callable[[str, Sequence[int]], bool]:
    """Return a test of whether white space, or for a single word a letter, stands beside the token in a text."""

    def explains(text: str, ids: Sequence[int]) -> bool:
        start = text.find(token.content)
        while start >= 0:
            end = start + len(token.content)
            neighbours = text[max(0, start - 1) : start] + text[end : end + 1]
            if any(char.isspace() or char in SPACES or (token.single_word and char.isalnum()) for char in neighbours):
                return True
            start = text.find(token.content, start + 1)
        return False

    return explains
