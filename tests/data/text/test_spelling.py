"""Texts are spelt in tokens of several characters as by transformers' tokenizers, and mapped to what they can spell."""

import json

import numpy as np
import pytest
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2PhonemeCTCTokenizer

from mowa.data.quality.filter import FilterConfig, filter_examples
from mowa.data.text.alphabet import VocabularyMapper, find_missing_tokens
from mowa.data.text.spelling import vocabulary_speller
from mowa.errors import DataError
from mowa.tasks.ctc import encode_labels
from mowa.types import Example, Vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def build(*tokens, delimiter="|", **options):
    tokens = (*SPECIAL, *tokens)
    return Vocabulary(tokens, 0, tokens.index(delimiter) if delimiter else None, frozenset({1, 2, 3}), **options)


DIGRAPHS = build("|", *"abcdhisz", "sz", "ch", "dz", "dzi", "<laugh>")
SPACE = build("<space>", *"abc", "<laugh>", delimiter="<space>")
NO_DELIMITER = build(*"你好ab", delimiter=None)
PIECES = build("▁", *"aklmoty", "▁ko", "▁kot", "ma", "ty", delimiter="▁")
PHONEMES = build("|", "h", "ə", "l", "oʊ", "aː", "t͡ʃ", "a", "t", separator=" ")
UPPER = build("|", *"ABCSZ", "SZ", lower_case=True)


def tokens_of(text, vocabulary):
    return [vocabulary.tokens[id] for id in encode_labels(text, vocabulary)]


def build_tokenizer(folder, vocabulary, tokenizer_class=Wav2Vec2CTCTokenizer, **options):
    file = folder / "vocab.json"
    file.write_text(json.dumps({token: id for id, token in enumerate(vocabulary.tokens)}), encoding="utf-8")
    delimiter = None if vocabulary.delimiter is None else vocabulary.tokens[vocabulary.delimiter]
    return tokenizer_class(str(file), word_delimiter_token=delimiter, **options)


# --- against transformers ---------------------------------------------------------------------------------------------


def test_words_are_spelt_in_the_longest_tokens_as_by_transformers(tmp_path):
    tokenizer, rng = build_tokenizer(tmp_path, DIGRAPHS), np.random.default_rng(7)
    for _ in range(300):
        word = "".join(rng.choice(list("abcdhisz"), rng.integers(1, 12)))
        assert encode_labels(word, DIGRAPHS) == tokenizer(word).input_ids, word


def test_spaces_beside_tokens_of_several_characters_are_kept(tmp_path):
    """transformers drops them, so that its labels do not decode to the text."""
    text = "chasz a dzia"
    assert tokens_of(text, DIGRAPHS) == ["ch", "a", "sz", "|", "a", "|", "dzi", "a"]
    tokenizer = build_tokenizer(tmp_path, DIGRAPHS)
    assert tokenizer.decode(encode_labels(text, DIGRAPHS), group_tokens=False) == text
    assert tokenizer.decode(tokenizer(text).input_ids, group_tokens=False) != text


def test_phonemes_are_those_of_transformers(tmp_path):
    tokenizer = build_tokenizer(tmp_path, PHONEMES, Wav2Vec2PhonemeCTCTokenizer, do_phonemize=False)
    for text in ("h ə l oʊ", "h ə | l oʊ | t͡ʃ aː", " t  t aː "):
        assert encode_labels(text, PHONEMES) == tokenizer(text).input_ids
    with pytest.raises(DataError, match="həl not in"):
        encode_labels("həl oʊ", PHONEMES)


def test_a_delimiter_of_several_characters_is_one_label(tmp_path):
    tokenizer = build_tokenizer(tmp_path, SPACE)
    assert tokens_of("ab c", SPACE) == ["a", "b", "<space>", "c"]
    assert tokenizer.decode(encode_labels("ab c", SPACE)) == "ab c"


def test_upper_case_vocabularies_that_write_lower_case(tmp_path):
    tokenizer = build_tokenizer(tmp_path, UPPER, do_lower_case=True)
    text, *_ = VocabularyMapper(UPPER, "map", {}).map_text("Abc, szab")
    assert text == "ABC SZAB"
    assert tokenizer.decode(encode_labels(text, UPPER), group_tokens=False) == "abc szab"


# --- cases ------------------------------------------------------------------------------------------------------------


def test_pieces_begin_words():
    assert tokens_of("kot ma koty", PIECES) == ["▁kot", "▁", "ma", "▁kot", "y"]
    assert tokens_of("ty", PIECES) == ["ty"]


def test_without_a_delimiter_spaces_are_left_out():
    assert tokens_of("你好 ab 你", NO_DELIMITER) == ["你", "好", "a", "b", "你"]


@pytest.mark.parametrize(
    ("vocabulary", "text", "mapped", "rejected"),
    [
        (DIGRAPHS, "Szach – <laugh> CZY?", "szach <laugh> cz", ()),
        (DIGRAPHS, "SZ Sz sZ", "sz sz sz", ()),
        (DIGRAPHS, "<pad> a|b", "ad a b", ()),  # special tokens and the delimiter are no text
        (SPACE, "ab <space> c_<laugh>", "ab ac c <laugh>", ()),
        (PIECES, "  Kot,  ma – KOTY ", "kot ma koty", ()),
        (PHONEMES, "h ə | l  oʊ", "h ə | l oʊ", ()),
        (PHONEMES, "hello oʊ", "oʊ", ("hello",)),
        (build("|", "a", "l", "ẹ́"), "Lẹ́la ẸÁ", "lẹ́la a", ()),  # ẹ with an accent is two characters
        (build("|", "a", "k’"), "k'a Kʼ", "k’a k’", ()),
    ],
)
def test_texts_are_mapped_to_what_can_be_spelt(vocabulary, text, mapped, rejected):
    found, _, wrong = VocabularyMapper(vocabulary, "map", {}).map_text(text)
    assert (found, wrong) == (mapped, frozenset(rejected))
    assert not vocabulary_speller(vocabulary).spell(found)[1]


def test_unknown_phonemes_may_be_dropped_or_replaced():
    assert VocabularyMapper(PHONEMES, "drop", {}).map_text("h x x ə") == ("h ə", [("x", "", 2)], frozenset())
    assert VocabularyMapper(PHONEMES, "map", {"x": "h"}).map_text("x ə")[0] == "h ə"


@pytest.mark.parametrize(
    ("vocabulary", "texts", "missing"),
    [
        (DIGRAPHS, ["szach dżem", "Czas"], "emż"),
        (build("|", "a", "sz"), ["szasz", "Saz"], "sz"),  # s and z also occur alone
        (build("|", "a", "sz"), ["szasz"], ""),
        (PHONEMES, ["h ɛ l oʊ", "ɹ ɛ"], "ɛɹ"),
        (UPPER, ["abd"], "D"),
        (build("|", *"AS"), ["saß"], "ß"),
        (build("|", *"ασ"), ["Σας"], ""),
        (NO_DELIMITER, ["你好 吗"], "吗"),
    ],
)
def test_what_a_vocabulary_lacks(vocabulary, texts, missing):
    assert find_missing_tokens(texts, vocabulary, {}) == tuple(missing)


def test_frames_are_counted_by_tokens():
    def kept(text, frames):
        clips = [Example("a", __file__, text, 1.0)]
        return filter_examples(clips, FilterConfig(), vocabulary=DIGRAPHS, num_frames=lambda s: frames).kept

    assert kept("szcha", 3)  # sz ch a
    assert not kept("szcha", 2)
    assert kept("szsz", 3)  # with a blank between
    assert not kept("szsz", 2)


def test_what_no_tokens_spell_is_rejected():
    pieces = build("▁", "▁kot", "k", "o", "ot", delimiter="▁")
    clips = [Example("a", __file__, text, 1.0) for text in ("kot", "kotk", "kt")]
    result = filter_examples(clips, FilterConfig(oov="reject"), vocabulary=pieces, num_frames=lambda s: 50)
    assert [one.text for one in result.kept] == ["kot", "kotk"]
    assert result.oov_counts == {"t": 1}
