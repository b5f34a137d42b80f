import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mowa.decode import ctc
from mowa.errors import ModelError
from mowa.types import Character, Vocabulary, Word

TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "ł", "ó", "sz", "-", "'")
POLISH = Vocabulary(TOKENS, blank=0, delimiter=4, specials=frozenset({1, 2, 3}))
CHINESE = Vocabulary(("<pad>", "你", "好"), blank=0, delimiter=None)
THAI = Vocabulary(("<pad>", "<unk>", "|", *"สวัดีครบผมชื่อเำ", "ab"), blank=0, delimiter=2, specials=frozenset({1}))
PIECES = Vocabulary(("<pad>", "<unk>", "▁", "▁kot", "y", "▁a", "le"), blank=0, delimiter=2, specials=frozenset({1}))
PHONEMES = Vocabulary(
    ("<pad>", "<s>", "</s>", "<unk>", "|", "h", "ə", "l", "oʊ", "aː", "t͡ʃ"), 0, 4, frozenset({1, 2, 3}), separator=" "
)
GREEK = Vocabulary(("<pad>", "<unk>", "|", *"ΑΣΟß", "SZ"), 0, 2, frozenset({1}), lower_case=True)
SPACED = Vocabulary(("<pad>", "a", " b", "c ", "d e", "\u00a0"), blank=0, delimiter=None)

TEXTUAL = [token for token in range(len(TOKENS)) if token not in POLISH.specials]
# runs of frames; blanks and delimiters are as frequent as all other tokens together
RUNS = st.lists(st.tuples(st.sampled_from([0, 4] * 4 + TEXTUAL), st.integers(1, 5)), max_size=30)


def ids_of(runs):
    return [token for token, length in runs for _ in range(length)]


def path_of(ids, probabilities=None):
    probabilities = np.ones(len(ids)) if probabilities is None else probabilities
    return ctc.TokenPath(np.array(ids, np.int32), np.array(probabilities, np.float32))


def build_tokenizer(folder, vocabulary):
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2PhonemeCTCTokenizer

    file = folder / "vocab.json"
    file.write_text(json.dumps({token: id for id, token in enumerate(vocabulary.tokens)}), encoding="utf-8")
    delimiter = None if vocabulary.delimiter is None else vocabulary.tokens[vocabulary.delimiter]
    if vocabulary.separator:
        return Wav2Vec2PhonemeCTCTokenizer(str(file), word_delimiter_token=delimiter, do_phonemize=False)
    return Wav2Vec2CTCTokenizer(str(file), word_delimiter_token=delimiter, do_lower_case=vocabulary.lower_case)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), POLISH)


# ── parity with transformers ──────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(runs=RUNS.filter(bool))
def test_words_characters_and_times_equal_the_transformers_tokenizer(tokenizer, runs):
    theirs = tokenizer.decode(
        ids_of(runs), output_word_offsets=True, output_char_offsets=True, clean_up_tokenization_spaces=False
    )
    words = ctc.path_to_words(path_of(ids_of(runs)), POLISH)

    def seconds(offsets, key):
        return [(at[key], at["start_offset"] * 0.02, at["end_offset"] * 0.02) for at in offsets if at[key] != " "]

    assert ctc.join_words(words) == " ".join(theirs.text.split())
    assert [(word.text, word.start_s, word.end_s) for word in words] == seconds(theirs.word_offsets, "word")
    letters = [letter for word in words for letter in word.characters]
    assert [(letter.text, letter.start_s, letter.end_s) for letter in letters] == seconds(theirs.char_offsets, "char")


@pytest.mark.parametrize(
    "vocabulary",
    [CHINESE, THAI, PIECES, PHONEMES, GREEK, POLISH],
    ids=["zh", "th", "▁", "phonemes", "greek", "pl"],
)
def test_the_text_of_every_kind_of_vocabulary_equals_the_transformers_tokenizer(tmp_path, vocabulary):
    theirs, rng = build_tokenizer(tmp_path, vocabulary), np.random.default_rng(7)
    textual = [id for id in range(len(vocabulary)) if id not in vocabulary.specials]
    for _ in range(100):
        ids = rng.choice(textual, rng.integers(1, 40)).tolist()
        expected = theirs.decode(ids, clean_up_tokenization_spaces=False)
        words = ctc.path_to_words(path_of(ids), vocabulary)
        # transformers' tokenizer has no SentencePiece tokens, and leaves their ▁
        assert ctc.join_words(words) == " ".join(expected.replace("▁", " ").split())
        if not vocabulary.separator:
            assert all(word.text == "".join(one.text for one in word.characters) for word in words)


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(runs=RUNS, end_s=st.floats(0, 3), data=st.data())
def test_times_are_ordered_and_confidences_are_probabilities(runs, end_s, data):
    ids = ids_of(runs)
    probabilities = data.draw(arrays(np.float32, len(ids), elements=st.floats(0, 1, width=32)))
    words = ctc.path_to_words(path_of(ids, probabilities), POLISH, end_s=end_s)
    for items in (words, [letter for word in words for letter in word.characters]):
        bounds = [bound for item in items for bound in (item.start_s, item.end_s)]
        assert bounds == sorted(bounds)
        assert all(0 <= bound <= end_s for bound in bounds)
        assert all(0 <= item.confidence <= 1 for item in items)
    for word in words:
        assert word.text == "".join(letter.text for letter in word.characters)
        lowest, highest = (pick(letter.confidence for letter in word.characters) for pick in (min, max))
        assert lowest * (1 - 1e-12) <= word.confidence <= highest * (1 + 1e-12)


@given(ids=st.lists(st.integers(0, len(SPACED) - 1)), vocabulary=st.sampled_from([POLISH, SPACED]))
def test_words_equal_the_split_text(ids, vocabulary):
    words = ctc.path_to_words(path_of(ids), vocabulary)
    assert [word.text for word in words] == ctc.join_words(words).split()


@given(
    ids=st.lists(st.integers(0, 6), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    vocabulary=st.sampled_from([CHINESE, THAI, PIECES, PHONEMES, POLISH, SPACED]),
)
def test_words_of_complete_frames_do_not_change(ids, cuts, vocabulary):
    """As a live stream does: words are taken from the frames that are complete, and the rest waits."""
    ids = [id % len(vocabulary) for id in ids]
    words, rest, before, position = [], [], "", 0
    for part in (ids[a:b] for a, b in pairwise([0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)])):
        rest += part
        count = ctc.count_complete_frames(path_of(rest), vocabulary)
        for end in (count, len(rest)) if len(rest) + position == len(ids) else (count,):
            taken, rest = rest[:end], rest[end:]
            found = ctc.path_to_words(path_of(taken), vocabulary, before=before)
            words += [(word.text, word.space_before, round(word.start_s / 0.02) + position) for word in found]
            before = ctc.last_character(path_of(taken), vocabulary) or before
            position += end
    whole = ctc.path_to_words(path_of(ids), vocabulary)
    expected = [(word.text, word.space_before, round(word.start_s / 0.02)) for word in whole]
    assert words == expected


@given(runs=RUNS, boundaries=st.lists(st.integers(0, 150)))
def test_concatenated_windows_equal_the_whole(runs, boundaries):
    ids = ids_of(runs)
    probabilities = np.linspace(0.1, 1, len(ids))
    bounds = [0, *sorted(min(at, len(ids)) for at in boundaries), len(ids)]
    windows = [path_of(ids[a:b], probabilities[a:b]) for a, b in pairwise(bounds)]
    joined = ctc.concat_paths(windows)
    assert (joined.ids.dtype, joined.probabilities.dtype) == (np.int32, np.float32)
    assert ctc.path_to_words(joined, POLISH) == ctc.path_to_words(path_of(ids, probabilities), POLISH)


@given(runs=RUNS, boundaries_s=st.lists(st.floats(0, 3)))
def test_segments_hold_every_word_once_and_cross_no_boundary(runs, boundaries_s):
    words = ctc.path_to_words(path_of(ids_of(runs)), POLISH)
    segments = ctc.group_segments(words, boundaries_s)
    assert tuple(word for segment in segments for word in segment.words) == words
    for segment in segments:
        assert segment.words
        assert segment.text == ctc.join_words(segment.words)
        assert not any(segment.words[0].start_s < at <= segment.words[-1].start_s for at in boundaries_s)
    for before, after in pairwise(segments):
        assert any(before.words[-1].start_s < at <= after.start_s for at in boundaries_s)


@pytest.mark.parametrize("frames", [0, 1, 63, 4097])
def test_best_path_is_the_argmax_over_all_but_special_tokens(frames):
    numbers = np.random.default_rng(frames).normal(size=(frames, len(TOKENS)), scale=3)
    log_probs = (numbers - np.log(np.exp(numbers).sum(1, keepdims=True))).astype(np.float32)
    path = ctc.best_path(log_probs, POLISH)
    masked = log_probs.copy()
    masked[:, [1, 2, 3]] = -np.inf
    assert (path.ids.dtype, path.probabilities.dtype, len(path)) == (np.int32, np.float32, frames)
    np.testing.assert_array_equal(path.ids, masked.argmax(1))
    np.testing.assert_allclose(path.probabilities, np.exp(masked.max(1)), rtol=1e-6)


# ── cases ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_special_token_that_has_all_the_mass_does_not_win():
    vocabulary = Vocabulary(("<s>", "<pad>", "a"), blank=1, delimiter=None, specials=frozenset({0}))
    path = ctc.best_path(np.array([[0, -math.inf, -math.inf]], np.float32), vocabulary)
    assert path.ids.tolist() == [1]
    assert path.probabilities.tolist() == [0]


def test_nan_raises():
    log_probs = np.full((4, len(TOKENS)), -1, np.float32)
    log_probs[2, 5] = np.nan
    with pytest.raises(ModelError, match=r"^the model output is NaN in 1 of 4 frames[^\n]*$"):
        ctc.best_path(log_probs, POLISH)


def test_a_shape_other_than_the_vocabulary_raises():
    with pytest.raises(ModelError, match=r"shape \(4, 11\), but the vocabulary has 12 tokens"):
        ctc.best_path(np.zeros((4, 11), np.float32), POLISH)


def test_a_word_with_times_and_confidence():
    # a a _ a | | b: the blank separates two a's; mean over two frames, geometric mean over two characters
    path = path_of([5, 5, 0, 5, 4, 4, 6], [0.2, 0.6, 0.9, 0.9, 1, 1, 0.5])
    first, second = ctc.path_to_words(path, POLISH, end_s=0.13)
    assert (first.text, first.start_s, first.end_s) == ("aa", 0, 4 * 0.02)
    assert first.confidence == pytest.approx(math.sqrt(0.4 * 0.9))
    assert first.characters[0] == Character("a", 0, 2 * 0.02, pytest.approx(0.4))
    assert (second.text, second.start_s, second.end_s) == ("b", 6 * 0.02, 0.13)


def test_a_long_word_of_low_probabilities_has_a_confidence():
    # 4097 characters of 0.1, whose product is 0 in float64
    (word,) = ctc.path_to_words(path_of([5, 6] * 2048 + [5], [0.1] * 4097), POLISH)
    assert word.confidence == pytest.approx(0.1)
    assert len(word.characters) == 4097


def test_special_tokens_in_a_path_are_skipped():
    assert ctc.join_words(ctc.path_to_words(path_of([1, 5, 3, 6, 2]), POLISH)) == "ab"


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1, 2], "a b"), ([3, 1], "c a"), ([1, 4, 1], "ad ea"), ([5, 1, 5, 5, 1], "a a"), ([0, 5, 0], "")],
)
def test_without_a_delimiter_spaces_in_tokens_separate_words(ids, expected):
    assert ctc.join_words(ctc.path_to_words(path_of(ids), SPACED)) == expected


def words_of(text, vocabulary, **options):
    ids = [id for character in text for id in (vocabulary.tokens.index(character), 0)]
    return ctc.path_to_words(path_of(ids), vocabulary, **options)


def test_without_delimiter_and_spaces_every_token_is_a_word():
    words = ctc.path_to_words(path_of([1, 0, 2, 2]), CHINESE)
    assert [(word.text, word.start_s, word.end_s) for word in words] == [("你", 0, 0.02), ("好", 0.04, 0.08)]
    assert [word.space_before for word in words] == [True, False]
    assert ctc.join_words(words) == "你好"


def test_a_language_without_spaces_has_words_though_its_vocabulary_has_a_delimiter():
    vocabulary = Vocabulary(("<pad>", "|", *"用微信app吧。「"), blank=0, delimiter=1)
    words = words_of("用app|「微信」吧。".replace("」", ""), vocabulary)
    assert [word.text for word in words] == ["用", "app", "「微", "信", "吧。"]
    assert ctc.join_words(words) == "用app 「微信吧。"


def test_thai_vowels_and_marks_stay_with_their_letters():
    words = words_of("สวัสดี|ครับเดำผม", THAI)
    assert [word.text for word in words] == ["ส", "วั", "ส", "ดี", "ค", "รั", "บ", "เดำ", "ผ", "ม"]
    assert ctc.join_words(words) == "สวัสดี ครับเดำผม"


def test_phonemes_are_words_with_spaces_between_them_and_without_the_delimiter():
    words = words_of(["h", "ə", "l", "oʊ", "|", "t͡ʃ", "aː"], PHONEMES)
    assert ctc.join_words(words) == "h ə l oʊ t͡ʃ aː"
    assert [word.text for word in words] == ["h", "ə", "l", "oʊ", "t͡ʃ", "aː"]


def test_segments_break_between_characters_and_their_text_has_no_spaces():
    words = ctc.path_to_words(path_of([1, 0, 2, 0, 1, 0, 2]), CHINESE)
    segments = ctc.group_segments(words, [0.07])
    assert [segment.text for segment in segments] == ["你好", "你好"]
    assert ctc.join_segments(segments) == "你好你好"
    left, right = (replace(segment, channel=number) for number, segment in enumerate(segments))
    assert ctc.join_segments([left, right]) == "你好 你好"


def test_a_word_without_end_is_broken_at_its_longest_pause():
    assert ctc.find_longest_pause(path_of([5, 0, 5, 0, 0, 0, 6, 0]), POLISH) == 6
    assert ctc.find_longest_pause(path_of([5, 0, 6, 0, 0]), POLISH) == 5
    assert ctc.find_longest_pause(path_of([5, 5, 6, 6]), POLISH) == 2  # b may go on
    assert ctc.find_longest_pause(path_of([5, 5]), POLISH) == 0
    assert ctc.find_longest_pause(path_of([0, 0, 5, 5]), POLISH) == 2
    assert ctc.find_longest_pause(path_of([0, 0, 0]), POLISH) == 3


def test_silence_and_no_frames_give_no_words():
    assert ctc.path_to_words(path_of([0, 0, 4, 0]), POLISH) == ()
    assert ctc.path_to_words(ctc.concat_paths([]), POLISH) == ()
    assert ctc.group_segments(()) == ()


def test_a_word_on_a_boundary_belongs_to_what_follows():
    words = [Word("a", 0, 1, 0.5), Word("b", 1, 2, 1.0), Word("c", 2, 3, 0.5)]
    first, second = ctc.group_segments(words, (5, 1))
    assert (first.text, first.start_s, first.end_s, first.confidence) == ("a", 0, 1, 0.5)
    assert (second.text, second.start_s, second.end_s, second.confidence) == ("b c", 1, 3, 0.75)
