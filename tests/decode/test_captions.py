import csv
import html
import io
import json
from dataclasses import replace
from itertools import pairwise

import praatio.textgrid
import pysubs2
import pytest
import webvtt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mowa.decode import captions
from mowa.errors import DataError
from mowa.types import Character, Segment, Transcript, Word

# no digits, braces or backslashes, which pysubs2 takes for SubStation markup; the cases below have them
LABELS = st.text("aąbcćzżó&<>\"'-?", min_size=1, max_size=60)
CONFIDENCES = st.integers(0, 10_000).map(lambda parts: parts / 10_000)
EMPTY = Transcript(file="silence.wav", text="", duration_s=1.5)


@st.composite
def transcripts(draw, in_order=True):
    """Draw transcripts with times in whole milliseconds; without `in_order` words may overlap and be out of order."""
    rows = draw(st.lists(st.tuples(LABELS, st.integers(0, 2000), st.integers(0, 9000), CONFIDENCES), max_size=30))
    words, position = [], 0
    for label, gap, length, confidence in rows:
        start = position + gap if in_order else gap
        letters = Character(label[0], start / 1000, (start + length) / 1000, confidence)
        words.append(Word(label, start / 1000, (start + length) / 1000, confidence, (letters,)))
        position = start + length
    bounds = sorted(draw(st.sets(st.integers(1, max(1, len(words) - 1))))) if words else []
    parts = [tuple(words[a:b]) for a, b in pairwise([0, *bounds, len(words)]) if words[a:b]]
    segments = tuple(
        Segment(" ".join(word.text for word in part), part[0].start_s, part[-1].end_s, part, part[0].confidence)
        for part in parts
    )
    end = max((word.end_s for word in words), default=0)
    duration_s = round(end + draw(st.integers(0, 3000)) / 1000, 3)
    return Transcript("a.wav", " ".join(part.text for part in segments), duration_s, segments, "polish", {"beams": 1})


def transcript(*words, duration_s=10.0):
    whole = Segment(" ".join(word.text for word in words), words[0].start_s, words[-1].end_s, words, 0.5)
    return Transcript("a.wav", whole.text, duration_s, (whole,))


# ── other programs ────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(spoken=transcripts())
def test_pysubs2_reads_the_words_and_no_cue_overlaps(spoken):
    read = pysubs2.SSAFile.from_string(captions.render(spoken, "srt"), format_="srt", keep_html_tags=True)
    assert [label for cue in read for label in cue.plaintext.split()] == [word.text for word in spoken.words]
    assert all(cue.start < cue.end for cue in read)
    assert all(before.end <= after.start for before, after in pairwise(read))


@settings(deadline=None)
@given(spoken=transcripts())
def test_webvtt_reads_the_same_cues(spoken):
    read = webvtt.from_buffer(io.BytesIO(captions.render(spoken, "vtt").encode()), strict=True)
    shown = captions.build_cues(spoken)
    read_ms = [(cue.start_time.in_milliseconds(), cue.end_time.in_milliseconds()) for cue in read]
    assert read_ms == [(round(cue.start_s * 1000), round(cue.end_s * 1000)) for cue in shown]
    assert [tuple(html.unescape(line) for line in cue.lines) for cue in read] == [cue.lines for cue in shown]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spoken=transcripts())
def test_praatio_reads_tiers_that_tile_the_recording(tmp_path, spoken):
    file = tmp_path / "a.TextGrid"
    file.write_text(captions.render(spoken, "textgrid", char_times=True), encoding="utf-8")
    read = praatio.textgrid.openTextgrid(str(file), includeEmptyIntervals=True, reportingMode="error")
    letters = [letter for word in spoken.words for letter in word.characters]
    assert read.tierNames == ("words", "characters")
    for tier, items in zip(read.tiers, (spoken.words, letters), strict=True):
        assert [entry.label for entry in tier.entries if entry.label] == [item.text for item in items]
        assert tier.entries[0].start == 0
        assert tier.entries[-1].end == tier.maxTimestamp == read.maxTimestamp
        assert all(entry.start < entry.end for entry in tier.entries)
        assert all(before.end == after.start for before, after in pairwise(tier.entries))
    if all(word.start_s < word.end_s for word in spoken.words) and spoken.duration_s:
        assert read.maxTimestamp == spoken.duration_s
        times = [(entry.start, entry.end) for entry in read.tiers[0].entries if entry.label]
        assert times == [(word.start_s, word.end_s) for word in spoken.words]


@given(spoken=transcripts())
def test_csv_reads_one_word_a_row(spoken):
    rows = list(
        csv.DictReader(io.StringIO(captions.render(spoken, "tsv")), dialect="excel-tab", quoting=csv.QUOTE_NONE)
    )
    assert [Word(row["word"], *(float(row[key]) for key in ("start_s", "end_s", "confidence"))) for row in rows] == [
        Word(word.text, word.start_s, word.end_s, word.confidence) for word in spoken.words
    ]


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(spoken=transcripts())
def test_json_round_trip(spoken):
    line = captions.render(spoken, "json", char_times=True)
    assert line.count("\n") == 1
    assert captions.parse_json(line) == spoken
    assert captions.render(captions.parse_json(line), "json", char_times=True) == line


@given(
    spoken=transcripts(in_order=False),
    max_duration_s=st.floats(0, 20),
    max_chars=st.integers(2, 100),
    max_gap_s=st.floats(0, 2),
)
def test_cues_keep_their_limits_except_for_single_words(spoken, max_duration_s, max_chars, max_gap_s):
    shown = captions.build_cues(spoken, max_duration_s, max_chars, max_gap_s)
    assert [label for cue in shown for line in cue.lines for label in line.split()] == [
        word.text for word in spoken.words
    ]
    assert all(cue.start_s < cue.end_s for cue in shown)
    assert all(before.end_s <= after.start_s for before, after in pairwise(shown))
    for cue in shown:
        several = len(" ".join(cue.lines).split()) > 1
        assert len(cue.lines) <= 2
        assert not several or all(len(line) <= max_chars // 2 for line in cue.lines)
        assert not several or cue.end_s - cue.start_s <= max(max_duration_s, 1.0) + 0.001


@given(spoken=transcripts(in_order=False))
def test_textgrid_tiers_tile_even_if_words_overlap(spoken):
    tiles = captions.build_tier(spoken.words, spoken.duration_s)
    assert tiles[0].start_ms == 0
    assert all(tile.start_ms < tile.end_ms for tile in tiles)
    assert all(before.end_ms == after.start_ms for before, after in pairwise(tiles))
    assert tiles[-1].end_ms >= spoken.duration_s * 1000 - 0.5
    assert [tile.label for tile in tiles if tile.label] == [word.text for word in spoken.words]


# ── cases ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_transcript_in_every_format():
    assert {format: captions.render(EMPTY, format) for format in captions.FORMAT_SUFFIXES} == {
        "text": "",
        "json": '{"file": "silence.wav", "text": "", "duration_s": 1.5, "confidence": 0.0, "segments": [], '
        '"model": "", "settings": {}}\n',
        "srt": "",
        "vtt": "WEBVTT\n",
        "tsv": "start_s\tend_s\tconfidence\tword\n",
        "textgrid": 'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 1.500\ntiers? <exists>\n'
        'size = 1\nitem []:\n    item [1]:\n        class = "IntervalTier"\n        name = "words"\n        xmin = 0\n'
        "        xmax = 1.500\n        intervals: size = 1\n        intervals [1]:\n            xmin = 0.000\n"
        '            xmax = 1.500\n            text = ""\n',
    }


def test_subtitles():
    words = (Word("R&D", 3599.9996, 3600.5, 1), Word("<b>", 3600.6, 3600.9, 1), Word("po", 3602.0, 3602.1, 1))
    spoken = transcript(*words, duration_s=3602.2)
    assert captions.render(spoken, "srt") == (
        "1\n01:00:00,000 --> 01:00:01,000\nR&D <b>\n\n2\n01:00:02,000 --> 01:00:03,000\npo\n\n"
    )
    assert captions.render(spoken, "vtt") == (
        "WEBVTT\n\n01:00:00.000 --> 01:00:01.000\nR&amp;D &lt;b&gt;\n\n01:00:02.000 --> 01:00:03.000\npo\n"
    )


def test_two_lines_are_of_similar_length():
    (cue,) = captions.build_cues(transcript(*(Word("słowo", at / 10, at / 10 + 0.1, 1) for at in range(8))))
    assert cue.lines == ("słowo słowo słowo słowo", "słowo słowo słowo słowo")


def test_cue_duration_and_gap_limits():
    shown = captions.build_cues(transcript(*(Word("a", second, second + 1, 1) for second in range(8))))
    assert [(cue.start_s, cue.end_s) for cue in shown] == [(0, 7), (7, 8)]
    shown = captions.build_cues(transcript(Word("a", 0, 0.2, 1), Word("b", 1.0, 1.2, 1), Word("c", 2.001, 2.2, 1)))
    assert [cue.lines for cue in shown] == [("a b",), ("c",)]


def test_a_word_longer_than_a_line_is_not_split():
    long = "x" * 63
    shown = captions.build_cues(transcript(Word("a", 0, 1, 1), Word(long, 1, 2, 1), Word("b", 2, 3, 1)))
    assert [cue.lines for cue in shown] == [("a",), (long,), ("b",)]


def test_short_cues_are_extended_up_to_the_next():
    words = (Word("raz", 0, 0.1, 1), Word("dwa", 0.95, 1.0, 1), Word("trzy", 5.0, 5.1, 1))
    shown = captions.build_cues(transcript(*words))
    assert [(cue.start_s, cue.end_s) for cue in shown] == [(0, 0.95), (0.95, 1.95), (5.0, 6.0)]


def characters(text, length_s=0.2, gap_s=0.0):
    step = length_s + gap_s
    return [Word(one, at * step, at * step + length_s, 0.5, space_before=at == 0) for at, one in enumerate(text)]


def test_cues_of_languages_without_spaces_break_between_characters():
    text = "我们今天去公园散步然后回家吃饭" * 40
    shown = captions.build_cues(Transcript("a.wav", text, 120.0, (Segment(text, 0, 120.0, tuple(characters(text))),)))
    assert "".join(line for cue in shown for line in cue.lines) == text
    assert len(shown) > 15
    for cue in shown:
        assert cue.end_s - cue.start_s < 7.001
        assert all(len(line) <= 21 for line in cue.lines)  # 42 columns


def test_cues_of_languages_without_spaces_break_at_pauses():
    later = [replace(one, start_s=one.start_s + 3, end_s=one.end_s + 3) for one in characters("再见")]
    words = [*characters("你好"), replace(later[0], space_before=False), later[1]]
    spoken = Transcript("a.wav", "你好再见", 10.0, (Segment("你好再见", 0, 3.4, tuple(words)),))
    assert [cue.lines for cue in captions.build_cues(spoken)] == [("你好",), ("再见",)]
    assert captions.parse_json(captions.render(spoken, "json")).words == spoken.words


def test_white_space_in_a_word_becomes_a_space():
    spoken = transcript(Word("a\tb\n\nc\u2028d", 0, 1, 1), Word(" \n", 1, 2, 1))
    assert captions.render(spoken, "srt") == "1\n00:00:00,000 --> 00:00:01,000\na b c d\n\n"
    assert captions.render(spoken, "tsv").splitlines()[1:] == [
        "0.000\t1.000\t1.0000\ta b c d",
        "1.000\t2.000\t1.0000\t",
    ]
    assert 'text = "a b c d"\n' in captions.render(spoken, "textgrid")


def test_quotes_are_escaped_for_praat():
    assert 'text = "1""2"\n' in captions.render(transcript(Word('1"2', 0, 1, 1)), "textgrid")


def test_json_rounds_and_has_characters_only_with_char_times():
    word = Word("ła", 0.12345, 0.6789, 0.123456, (Character("ł", 0.12345, 0.2, 1), Character("a", 0.2, 0.6789, 1)))
    row = json.loads(captions.render(transcript(word), "json"))
    (written,) = row["segments"][0]["words"]
    assert written == {"text": "ła", "start_s": 0.123, "end_s": 0.679, "confidence": 0.1235}
    assert row["confidence"] == 0.1235
    assert "ła" in captions.render(transcript(word), "json")
    asked = json.loads(captions.render(transcript(word), "json", char_times=True))
    assert asked["segments"][0]["words"][0]["characters"][0] == {
        "text": "ł", "start_s": 0.123, "end_s": 0.2, "confidence": 1
    }  # fmt: skip


def test_partial_segments_round_trip():
    live = Transcript("mic", "a", 1.0, (Segment("a", 0, 1, is_final=False),))
    assert captions.parse_json(captions.render(live, "json")) == live


def test_an_unknown_format_raises_with_the_closest():
    with pytest.raises(DataError, match=r"^unknown format 'SRTT'\. Did you mean srt\? Formats: text, json, srt"):
        captions.render(EMPTY, "SRTT")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "Expecting value"),
        ("{'file'}", "Expecting property name"),
        ("[1]", "a JSON object was expected, this is a list"),
        ('{"file": "a.wav", "text": "a"}', "the key 'duration_s' is missing"),
        ('{"file": "a.wav", "text": null}', "text is None, not a text"),
        ('{"file": "a.wav", "text": "a", "duration_s": "long", "segments": []}', "could not convert"),
        ('{"file": "a.wav", "text": "a", "duration_s": 1, "segments": [{"text": "a"}]}', "the key 'words' is missing"),
    ],
)
def test_invalid_transcripts_raise(line, reason):
    with pytest.raises(DataError, match=f"^not a transcript: .*{reason}"):
        captions.parse_json(line)
