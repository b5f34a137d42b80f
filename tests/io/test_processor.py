"""Vocabularies and audio settings, read from the files of transformers' tokenizers and feature extractors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2PhonemeCTCTokenizer,
    Wav2Vec2Processor,
)

from mowa.errors import ModelError
from mowa.io.processor import (
    read_preprocessing,
    read_vocabulary,
    vocabulary_from_dict,
    vocabulary_to_dict,
    write_processor,
)

TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", "a", "ą", "ź")
AUDIO = {"sampling_rate": 16_000, "do_normalize": True, "return_attention_mask": True, "padding_value": 0.0}


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file; keys set to None are removed."""
    data = json.loads((folder / name).read_text(encoding="utf-8")) | values
    write(folder, name, {key: value for key, value in data.items() if value is not None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a checkpoint without its weights, which are not read here."""
    write(tmp_path, "config.json", {"model_type": "wav2vec2", "pad_token_id": 0})
    write(tmp_path, "vocab.json", {token: id for id, token in enumerate(TOKENS)})
    write(tmp_path, "tokenizer_config.json", {"pad_token": "<pad>", "word_delimiter_token": "|"})
    write(tmp_path, "special_tokens_map.json", {"unk_token": {"content": "<unk>"}, "bos_token": "<s>"})
    write(tmp_path, "preprocessor_config.json", AUDIO)
    return tmp_path


def test_the_vocabulary_says_what_each_output_means(folder: Path) -> None:
    vocab = read_vocabulary(folder, len(TOKENS))
    assert vocab.tokens == TOKENS
    assert (vocab.blank, vocab.delimiter, vocab.specials) == (0, 4, {1, 2, 3})


def test_names_of_special_tokens_are_read_from_the_files(folder: Path) -> None:
    names = {"<pad>": "[PAD]", "<unk>": "[UNK]", "<s>": "^", "|": "_"}
    write(folder, "vocab.json", {names.get(token, token): id for id, token in enumerate(reversed(TOKENS))})
    change(folder, "config.json", pad_token_id=None)
    change(folder, "tokenizer_config.json", pad_token={"content": "[PAD]"}, word_delimiter_token="_")
    write(folder, "special_tokens_map.json", {"unk_token": {"content": "[UNK]"}, "bos_token": "^"})
    vocab = read_vocabulary(folder, 8)
    assert (vocab.blank, vocab.delimiter, vocab.specials) == (7, 3, {4, 5, 6})


@pytest.mark.parametrize(
    "spelling",
    [("[PAD]", "[CLS]", "[SEP]", "[UNK]"), ("<pad>", "<s>", "</s>", "<unk>"), ("<PAD>", "<S>", "</S>", "<UNK>")],
)
def test_special_tokens_are_found_without_the_tokenizer_files(folder: Path, spelling: tuple[str, ...]) -> None:
    write(folder, "vocab.json", {token: id for id, token in enumerate((*spelling, "|", "a", "<b>", "[c]"))})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    vocab = read_vocabulary(folder, 8)
    assert (vocab.blank, vocab.delimiter, vocab.specials) == (0, 4, {1, 2, 3})


def test_special_tokens_that_the_files_do_not_name_are_no_text(folder: Path) -> None:
    names = {"<unk>": "[UNK]", "<s>": "[CLS]"}
    write(folder, "vocab.json", {names.get(token, token): id for id, token in enumerate(TOKENS)})
    assert read_vocabulary(folder, 8).specials == {1, 2, 3}


def test_the_blank_may_be_spelt_in_brackets(folder: Path) -> None:
    write(folder, "vocab.json", {"a": 0, "|": 1, "[PAD]": 2})
    change(folder, "config.json", pad_token_id=None)
    assert read_vocabulary(folder, 3).blank == 2


@pytest.mark.parametrize("delimiter", ["<space>", "[SPACE]", "▁", " "])
@pytest.mark.parametrize("named", [None, "|"])
def test_delimiters_that_the_files_do_not_name_are_found(folder: Path, delimiter: str, named: str | None) -> None:
    write(folder, "vocab.json", {delimiter if token == "|" else token: id for id, token in enumerate(TOKENS)})
    change(folder, "tokenizer_config.json", word_delimiter_token=named)
    assert read_vocabulary(folder, 8).delimiter == 4


@pytest.mark.parametrize("tokenizer_class", [Wav2Vec2CTCTokenizer, Wav2Vec2PhonemeCTCTokenizer])
def test_what_the_tokenizer_writes_is_read_and_written(folder: Path, tmp_path: Path, tokenizer_class: type) -> None:
    """Phonemes are separated by spaces, and a tokenizer of upper-case letters may write lower case."""
    phonemes = tokenizer_class is Wav2Vec2PhonemeCTCTokenizer
    options = {"do_phonemize": False, "word_delimiter_token": "|"} if phonemes else {"do_lower_case": True}
    tokens = (*TOKENS[:5], "B", "sz", "aː")
    write(folder, "vocab.json", {token: id for id, token in enumerate(tokens)})
    tokenizer = tokenizer_class(str(folder / "vocab.json"), **options)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    vocab = read_vocabulary(folder, 8)
    assert (vocab.separator, vocab.lower_case) == ((" ", False) if phonemes else ("", True))
    assert (vocab.tokens, vocab.blank, vocab.delimiter, vocab.specials) == (tokens, 0, 4, {1, 2, 3})
    out = tmp_path / "out"
    out.mkdir()
    write(out, "config.json", {})
    write_processor(vocab, read_preprocessing(folder), out)
    assert read_vocabulary(out, 8) == vocab
    ids = [5, 6, 4, 7]
    assert AutoTokenizer.from_pretrained(out).decode(ids) == tokenizer.decode(ids)
    assert vocabulary_from_dict(vocab.tokens, vocabulary_to_dict(vocab)) == vocab


def test_phonemes_have_no_delimiter_unless_it_is_named(folder: Path) -> None:
    change(folder, "tokenizer_config.json", word_delimiter_token=None, tokenizer_class="Wav2Vec2PhonemeCTCTokenizer")
    assert read_vocabulary(folder, 8).delimiter is None


def test_files_of_current_transformers_are_read(folder: Path) -> None:
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
        (folder / name).unlink()
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    vocab = read_vocabulary(folder, len(TOKENS))
    assert (vocab.tokens, vocab.blank, vocab.delimiter, vocab.specials) == (TOKENS, 0, 4, {1, 2, 3})
    assert read_preprocessing(folder).normalize is False
    assert read_preprocessing(folder).attention_mask is True


def test_added_tokens_within_the_head_are_used(folder: Path) -> None:
    """Old checkpoints have <s> and </s> in added_tokens.json; some heads have no outputs for them."""
    bare = [token for token in TOKENS if token not in ("<s>", "</s>")]
    write(folder, "vocab.json", {token: id for id, token in enumerate(bare)})
    write(folder, "added_tokens.json", {"<s>": 6, "</s>": 7})
    vocab = read_vocabulary(folder, 8)
    assert vocab.tokens == (*bare, "<s>", "</s>")
    assert vocab.specials == {1, 6, 7}
    assert read_vocabulary(folder, 6).tokens == tuple(bare)
    (folder / "added_tokens.json").unlink()
    decoder = {"6": {"content": "<s>", "special": True}, "7": {"content": "[NOISE]", "special": True}}
    change(folder, "tokenizer_config.json", added_tokens_decoder=decoder)
    assert read_vocabulary(folder, 8).specials == {1, 6, 7}


def test_the_config_takes_precedence_over_the_tokenizer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, "config.json", pad_token_id=3)
    with caplog.at_level(logging.WARNING, "mowa"):
        vocab = read_vocabulary(folder, 8)
    assert (vocab.blank, vocab.specials) == (3, {0, 1, 2})
    assert "pads with id 0, the config with 3: using 3 as blank" in caplog.text


@pytest.mark.parametrize("size", [1, 7, 9, 4097])
def test_a_vocabulary_of_another_size_is_rejected(folder: Path, size: int) -> None:
    with pytest.raises(ModelError, match=f"has 8 tokens and its head {size} outputs"):
        read_vocabulary(folder, size)


@pytest.mark.parametrize(
    ("vocab", "pad", "message"),
    [
        ({"<pad>": 0, "a": 1, "b": 1}, 0, "ids must be 0 to 2, each used once"),
        ({"<pad>": 0, "a": 1, "b": 3}, 0, "ids must be 0 to 2, each used once"),
        ({"a": 0, "b": 1, "c": 2}, None, "pad_token_id None is not one of the head's 3 outputs"),
        ({"a": 0, "b": 1, "c": 2}, 3, "pad_token_id 3 is not one of the head's 3 outputs"),
    ],
)
def test_invalid_vocabularies_are_rejected(folder: Path, vocab: dict[str, int], pad: int | None, message: str) -> None:
    write(folder, "vocab.json", vocab)
    change(folder, "config.json", pad_token_id=pad)
    with pytest.raises(ModelError, match=message):
        read_vocabulary(folder, 3)


def test_several_languages_need_target_lang(folder: Path) -> None:
    pol = {token: id for id, token in enumerate(TOKENS)}
    write(folder, "vocab.json", {"eng": {"<pad>": 0}, "pol": pol})
    with pytest.raises(
        ModelError, match=r"holds 2 languages \(eng, pol, …\) and target_lang in tokenizer_config\.json is None"
    ):
        read_vocabulary(folder, 8)
    change(folder, "tokenizer_config.json", target_lang="pol")
    assert read_vocabulary(folder, 8).tokens == TOKENS


# preprocessing


def test_audio_settings_are_read(folder: Path) -> None:
    write(folder, "preprocessor_config.json", {"sampling_rate": 8000, "do_normalize": False, "padding_value": 1.0})
    settings = read_preprocessing(folder)
    assert (settings.rate_hz, settings.normalize, settings.attention_mask, settings.padding_value) == (
        8000,
        False,
        False,
        1.0,
    )


@pytest.mark.parametrize("key", ["do_normalize", "sampling_rate"])
def test_missing_audio_settings_are_an_error(folder: Path, key: str) -> None:
    change(folder, "preprocessor_config.json", **{key: None})
    with pytest.raises(ModelError, match=f"preprocessor_config.json has no {key}"):
        read_preprocessing(folder)
