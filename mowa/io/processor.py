"""Read and write the vocabulary and audio settings of a checkpoint, in the files that transformers uses.

Settings that change the result are never guessed: a missing sample rate, normalization or blank is a ModelError.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mowa.errors import ModelError
from mowa.io.atomic import read_json
from mowa.types import Preprocessing, Vocabulary

log = logging.getLogger("mowa")

# Defaults of Wav2Vec2CTCTokenizer (transformers, tokenization_wav2vec2.py).
DEFAULT_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
DEFAULT_DELIMITER = "|"
# Spellings of the special tokens in checkpoints. Such a token is special even if the files do not say so.
_SPELLINGS = {
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "bos_token": ("<s>", "[BOS]", "[CLS]"),
    "eos_token": ("</s>", "[EOS]", "[SEP]"),
}
_SPECIALS = {spelling for spellings in _SPELLINGS.values() for spelling in spellings} | {"<bos>", "<eos>", "<blank>"}
_SPECIALS_FOLDED = {spelling.casefold() for spelling in _SPECIALS}
_DELIMITERS = ("<space>", "[SPACE]", "\N{LOWER ONE EIGHTH BLOCK}", " ")  # where word_delimiter_token is no token


def read_preprocessing(folder: Path) -> Preprocessing:
    """Read audio settings from preprocessor_config.json, or from processor_config.json as transformers 5 writes it.

    `return_attention_mask` and `padding_value` default as in Wav2Vec2FeatureExtractor (False, 0). Raises ModelError if
    the file, the sampling rate or the normalization is missing.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file() or not (folder / "processor_config.json").is_file():
        settings = read_json(file)
    else:
        file = folder / "processor_config.json"
        settings = read_json(file).get("feature_extractor") or {}
    for key in ("sampling_rate", "do_normalize"):
        if key not in settings:
            raise ModelError(f"{file} has no {key}: add the value that the model was trained with")
    return Preprocessing(
        rate_hz=int(settings["sampling_rate"]),
        normalize=bool(settings["do_normalize"]),
        attention_mask=bool(settings.get("return_attention_mask", False)),
        padding_value=float(settings.get("padding_value", 0.0)),
    )


def read_vocabulary(folder: Path, head_size: int, target_lang: str | None = None) -> Vocabulary:
    """Read the tokens of a CTC head with `head_size` outputs from vocab.json and the tokenizer files beside it.

    The blank is `pad_token_id` of config.json, or the tokenizer's pad token if that is missing. If they disagree, the
    config is used and a warning is logged, since the CTC loss was computed with it. Added tokens with ids beyond the
    head are ignored. Tokens that are spelt like special ones ([UNK], </s>) are special even if the tokenizer's files
    are missing or name others. `target_lang` selects one of several languages (MMS); None is the tokenizer's.

    Raises ModelError if vocab.json is missing, has several languages (MMS) and target_lang selects none, or does not
    match the head, or if there is no blank.
    """
    files = ("special_tokens_map.json", "tokenizer_config.json")
    settings = {key: value for name in files for key, value in _read_optional(folder / name).items()}
    if target_lang is not None:
        settings["target_lang"] = target_lang
    config = read_json(folder / "config.json")
    ids = _token_ids(folder, settings, head_size)
    named = {_content(settings.get(role)) or default for role, default in DEFAULT_TOKENS.items()}
    named |= {token["content"] for token in _added_tokens(settings).values() if token.get("special")}
    named |= {_content(token) or "" for token in settings.get("additional_special_tokens") or ()}
    special = {token for token in ids if token in named or token.casefold() in _SPECIALS_FOLDED}
    blank = _find_blank(folder, ids, settings, config.get("pad_token_id"), head_size)
    phonemes = _has_phonemes(settings, config)
    delimiter = _find_delimiter(ids, settings, phonemes)
    return Vocabulary(
        tokens=tuple(sorted(ids, key=ids.__getitem__)),
        blank=blank,
        delimiter=delimiter,
        specials=frozenset(ids[token] for token in special) - {blank, delimiter},
        separator=" " if phonemes else "",
        lower_case=bool(settings.get("do_lower_case")) and not phonemes,
    )


def _find_blank(folder: Path, ids: Mapping[str, int], settings: Mapping[str, Any], blank: Any, head_size: int) -> int:
    """Return the id of the blank, which is `blank` in config.json, or else the tokenizer's pad token."""
    pad = _first_of((_content(settings.get("pad_token")), *_SPELLINGS["pad_token"]), ids)
    if blank is None:
        blank = pad
    elif pad is not None and pad != blank:
        log.warning(
            "%s: the tokenizer pads with id %d, the config with %d: using %d as blank", folder, pad, blank, blank
        )
    if blank is None or not 0 <= blank < head_size:
        raise ModelError(f"{folder}/config.json: pad_token_id {blank} is not one of the head's {head_size} outputs")
    return int(blank)


def _find_delimiter(ids: Mapping[str, int], settings: Mapping[str, Any], phonemes: bool) -> int | None:
    named = _content(settings.get("word_delimiter_token"))
    if phonemes:
        return ids.get(named) if named is not None else None
    return _first_of((named or DEFAULT_DELIMITER, *_DELIMITERS), ids)


def _first_of(tokens: Iterable[str | None], ids: Mapping[str, int]) -> int | None:
    return next((ids[token] for token in tokens if token is not None and token in ids), None)


def _has_phonemes(settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer is transformers' Wav2Vec2PhonemeCTCTokenizer."""
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    return "Phoneme" in name or "phone_delimiter_token" in settings


def vocabulary_to_dict(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return everything but the tokens as JSON-serializable keys and values."""
    return {
        "blank": vocabulary.blank,
        "delimiter": vocabulary.delimiter,
        "specials": sorted(vocabulary.specials),
        "separator": vocabulary.separator,
        "lower_case": vocabulary.lower_case,
    }


def vocabulary_from_dict(tokens: Iterable[str], row: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary of these tokens and of what `vocabulary_to_dict` returned; KeyError for a missing key."""
    return Vocabulary(
        tuple(tokens),
        blank=row["blank"],
        delimiter=row["delimiter"],
        specials=frozenset(row["specials"]),
        separator=row.get("separator", ""),
        lower_case=row.get("lower_case", False),
    )


def write_processor(vocabulary: Vocabulary, preprocessing: Preprocessing, folder: Path) -> None:
    """Write vocab.json and the files of tokenizer and feature extractor into `folder`, as transformers reads them."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2PhonemeCTCTokenizer

    vocab = folder / "vocab.json"
    vocab.write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary.tokens)}, ensure_ascii=False, indent=1),
        encoding="utf-8",
    )
    special = {vocabulary.tokens[index] for index in vocabulary.specials}
    roles: dict[str, str | None] = {
        role: next((token for token in spellings if token in special), None) for role, spellings in _SPELLINGS.items()
    }
    roles["pad_token"] = vocabulary.tokens[vocabulary.blank]
    others = sorted(special - set(roles.values()))
    delimiter = None if vocabulary.delimiter is None else vocabulary.tokens[vocabulary.delimiter]
    tokenizer: Any
    if vocabulary.separator:
        tokenizer = Wav2Vec2PhonemeCTCTokenizer(str(vocab), word_delimiter_token=delimiter, do_phonemize=False, **roles)
    else:
        tokenizer = Wav2Vec2CTCTokenizer(
            str(vocab), word_delimiter_token=delimiter, do_lower_case=vocabulary.lower_case, **roles
        )
    if others:
        tokenizer.add_tokens(others, special_tokens=True)
    tokenizer.save_pretrained(folder)
    present = {role: token for role, token in roles.items() if token is not None}
    (folder / "special_tokens_map.json").write_text(json.dumps(present, ensure_ascii=False, indent=1), encoding="utf-8")
    Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=preprocessing.rate_hz,
        padding_value=preprocessing.padding_value,
        do_normalize=preprocessing.normalize,
        return_attention_mask=preprocessing.attention_mask,
    ).save_pretrained(folder)


def _token_ids(folder: Path, settings: Mapping[str, Any], head_size: int) -> dict[str, int]:
    """Return token → id, with exactly one token for each id of the head."""
    vocab = read_json(folder / "vocab.json")
    if any(isinstance(value, dict) for value in vocab.values()):
        vocab = _select_language(folder, vocab, settings.get("target_lang"))
        settings = {}  # its added tokens are those of another language
    added = _read_optional(folder / "added_tokens.json")
    added |= {token["content"]: int(id) for id, token in _added_tokens(settings).items()}
    ids = vocab | {token: id for token, id in added.items() if token not in vocab and id < head_size}
    if len(ids) != head_size:
        raise ModelError(f"the vocabulary of {folder} has {len(ids)} tokens and its head {head_size} outputs")
    if set(ids.values()) != set(range(head_size)):
        raise ModelError(f"{folder}/vocab.json: ids must be 0 to {head_size - 1}, each used once")
    return ids


def _select_language(folder: Path, languages: Mapping[str, Any], target_lang: str | None) -> dict[str, int]:
    """MMS (arXiv:2305.13516) has one vocabulary per language; the tokenizer's target_lang selects one."""
    if target_lang is None or target_lang not in languages:
        some = ", ".join(sorted(languages)[:5])
        raise ModelError(
            f"{folder}/vocab.json holds {len(languages)} languages ({some}, …) and target_lang in"
            f" tokenizer_config.json is {target_lang!r}: set it to the language of the head's weights"
        )
    return dict(languages[target_lang])


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _added_tokens(settings: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
    return settings.get("added_tokens_decoder") or {}


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    """Return the text of a token, stored as a string or as an AddedToken object with `content`."""
    return token["content"] if isinstance(token, Mapping) else token
