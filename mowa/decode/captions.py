"""Write transcripts as text, JSON, SRT, WebVTT, TSV and Praat TextGrid, and read the JSON back.

Words are not split or changed, except that white space inside a word becomes a single space in formats made of lines.
Times are rounded to milliseconds and confidences to four decimals here, and nowhere before.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mowa.errors import DataError
from mowa.io.atomic import dump_json
from mowa.types import Character, Segment, Transcript, Word

FORMAT_SUFFIXES: Mapping[str, str] = {
    "text": ".txt",
    "json": ".json",
    "srt": ".srt",
    "vtt": ".vtt",
    "tsv": ".tsv",
    "textgrid": ".TextGrid",
}
"""Output format → file suffix."""


def render(transcript: Transcript, output_format: str, *, char_times: bool = False) -> str:
    """Return the transcript as the contents of a file, ending in a newline unless it is empty.

        text       the text
        json       one object on one line, with the fields of Transcript as keys; `parse_json` reads it
        srt, vtt   subtitles, see `build_cues`; times 00:00:00,000 and 00:00:00.000
        tsv        a header, then a line per word: start_s, end_s, confidence, word; tab-separated, without quoting
        textgrid   Praat's long text format, see `build_tier`

    `char_times` adds the characters of each word to json, and a second tier of them to textgrid. Raises DataError for
    an unknown format. Sources: https://www.w3.org/TR/webvtt1/ and
    https://www.fon.hum.uva.nl/praat/manual/TextGrid_file_formats.html
    """
    match output_format:
        case "text":
            return f"{transcript.text}\n" if transcript.text else ""
        case "json":
            return _json(transcript, char_times)
        case "srt":
            return _srt(build_cues(transcript))
        case "vtt":
            return _vtt(build_cues(transcript))
        case "tsv":
            return _tsv(transcript.words)
        case "textgrid":
            return _textgrid(transcript, char_times)
    close = difflib.get_close_matches(output_format.lower(), FORMAT_SUFFIXES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise DataError(f"unknown format {output_format!r}.{hint} Formats: {', '.join(FORMAT_SUFFIXES)}.")


def parse_json(line: str) -> Transcript:
    """Parse what `render(transcript, "json")` returned: the same transcript, up to rounding and omitted characters.

    Unknown keys are ignored. Raises DataError if the line is not JSON or not a transcript.
    """
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"not a transcript: {error}.") from None
    return transcript_from_dict(fields)


def transcript_from_dict(row: Any) -> Transcript:
    """Return the transcript of the keys and values of `transcript_to_dict`. Raises DataError if they are not one."""
    try:
        if not isinstance(row, dict):
            raise TypeError(f"a JSON object was expected, this is a {type(row).__name__}")
        return Transcript(
            file=_string(row, "file"),
            text=_string(row, "text"),
            duration_s=float(row["duration_s"]),
            segments=tuple(_segment_from(segment) for segment in row["segments"]),
            model=row.get("model", ""),
            settings=row.get("settings", {}),
        )
    except KeyError as error:
        raise DataError(f"not a transcript: the key {error} is missing.") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"not a transcript: {error}.") from None


# ── json ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _json(transcript: Transcript, characters: bool) -> str:
    # default=str: settings may hold paths. allow_nan=False: NaN is not JSON, and would be a bug.
    fields = transcript_to_dict(transcript, char_times=characters)
    return dump_json(fields, allow_nan=False, default=str) + "\n"


def transcript_to_dict(transcript: Transcript, *, char_times: bool = False) -> dict[str, Any]:
    """Return a transcript as JSON-serializable keys and values, rounded."""
    return {
        "file": transcript.file,
        "text": transcript.text,
        "duration_s": round(transcript.duration_s, 3),
        "confidence": round(transcript.confidence, 4),
        "segments": [_segment_row(segment, char_times) for segment in transcript.segments],
        "model": transcript.model,
        "settings": dict(transcript.settings),
    }


def _segment_row(segment: Segment, characters: bool) -> dict[str, Any]:
    row = _timed_row(segment)
    if not segment.is_final:
        row["is_final"] = False
    if segment.channel is not None:
        row["channel"] = segment.channel
    row["words"] = [_word_row(word, characters) for word in segment.words]
    return row


def _word_row(word: Word, characters: bool) -> dict[str, Any]:
    row = _timed_row(word)
    if not word.space_before:
        row["space_before"] = False
    if characters and word.characters:
        row["characters"] = [_timed_row(character) for character in word.characters]
    return row


def _timed_row(item: Segment | Word | Character) -> dict[str, Any]:
    return {
        "text": item.text,
        "start_s": round(item.start_s, 3),
        "end_s": round(item.end_s, 3),
        "confidence": round(item.confidence, 4),
    }


def _segment_from(row: Mapping[str, Any]) -> Segment:
    words = tuple(_word_from(word) for word in row["words"])
    return Segment(**_timed_from(row), words=words, is_final=row.get("is_final", True), channel=row.get("channel"))


def _word_from(row: Mapping[str, Any]) -> Word:
    characters = tuple(Character(**_timed_from(character)) for character in row.get("characters", ()))
    return Word(**_timed_from(row), characters=characters, space_before=row.get("space_before", True))


def _timed_from(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": _string(row, "text")} | {key: float(row[key]) for key in ("start_s", "end_s", "confidence")}


def _string(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key} is {row[key]!r}, not a text")
    return str(row[key])


# ── srt and vtt ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Cue:
    """A subtitle of one or two lines, shown from `start_s` to `end_s` (whole milliseconds), and its audio channel."""

    start_s: float
    end_s: float
    lines: tuple[str, ...]
    channel: int | None = None


def build_cues(
    transcript: Transcript,
    max_duration_s: float = 7.0,
    max_chars: int = 84,
    max_gap_s: float = 0.8,
    min_duration_s: float = 1.0,
) -> tuple[Cue, ...]:
    """Group the words into subtitles of at most two lines of `max_chars` / 2 characters; East Asian ones count as two.

    A cue ends with its segment, before a pause longer than `max_gap_s`, before it would last longer than
    `max_duration_s`, and before it would exceed its lines; a single word may exceed the last two limits, since words
    are not split. A cue shorter than `min_duration_s` is extended up to the next one; the last cue may end after the
    recording. Cues have strictly increasing starts, last at least 1 ms and do not overlap. Segments without words give
    none. 42 characters per line and 7 s are the limits of the Netflix Timed Text Style Guide.
    """
    groups: list[list[Word]] = []
    channels: list[int | None] = []
    for segment in transcript.segments:
        words = [word for word in segment.words if _label(word)]  # an empty line would end a cue
        groups += _group_words(words, max_duration_s, max_chars // 2, max_gap_s)
        channels += [segment.channel] * (len(groups) - len(channels))
    # strictly increasing, even if segments overlap
    starts = list(accumulate((_ms(group[0].start_s) for group in groups), lambda before, at: max(at, before + 1)))
    preferred_ends = [
        max(_ms(group[-1].end_s), at + _ms(min_duration_s), at + 1) for group, at in zip(groups, starts, strict=True)
    ]
    ends = [*map(min, preferred_ends, starts[1:]), *preferred_ends[-1:]]
    return tuple(
        Cue(start / 1000, end / 1000, _break_lines(group, max_chars // 2), channel)
        for start, end, group, channel in zip(starts, ends, groups, channels, strict=True)
    )


def _group_words(words: Sequence[Word], max_duration_s: float, max_line: int, max_gap_s: float) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        if group and (
            word.start_s - group[-1].end_s > max_gap_s
            or word.end_s - group[0].start_s > max_duration_s
            or max(map(_columns, _break_lines([*group, word], max_line))) > max_line
        ):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _break_lines(words: Sequence[Word], max_line: int) -> tuple[str, ...]:
    """Return one line if the words fit, else the two that differ least in length."""
    gaps = [int(word.space_before) for word in words]
    pieces = [" " * gap + _label(word) for word, gap in zip(words, gaps, strict=True)]
    ends = list(accumulate(map(_columns, pieces)))
    if ends[-1] - gaps[0] <= max_line or len(words) == 1:
        return ("".join(pieces)[gaps[0] :],)

    def longest(at: int) -> int:
        return max(ends[at - 1] - gaps[0], ends[-1] - ends[at - 1] - gaps[at])

    split = min(range(1, len(words)), key=longest)
    return "".join(pieces[:split])[gaps[0] :], "".join(pieces[split:])[gaps[split] :]


def _columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _srt(cues: Sequence[Cue]) -> str:
    return "".join(
        f"{number}\n{_format_time(cue.start_s, ',')} --> {_format_time(cue.end_s, ',')}\n"
        + ("" if cue.channel is None else f"[{cue.channel}] ")
        + "\n".join(cue.lines)
        + "\n\n"
        for number, cue in enumerate(cues, start=1)
    )


def _vtt(cues: Sequence[Cue]) -> str:
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = ["WEBVTT\n"] + [
        f"{_format_time(cue.start_s, '.')} --> {_format_time(cue.end_s, '.')}\n"
        + ("" if cue.channel is None else f"<v channel {cue.channel}>")
        + "\n".join(cue.lines).translate(escapes)
        + "\n"
        for cue in cues
    ]
    return "\n".join(blocks)


def _format_time(seconds: float, mark: str) -> str:
    """Format as hours, minutes, seconds and milliseconds after `mark`, such as 01:02:03,004."""
    whole_s, ms = divmod(_ms(seconds), 1000)
    minutes, s = divmod(whole_s, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{s:02}{mark}{ms:03}"


# ── tsv ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tsv(words: Sequence[Word]) -> str:
    lines = [f"{word.start_s:.3f}\t{word.end_s:.3f}\t{word.confidence:.4f}\t{_label(word)}\n" for word in words]
    return "".join(["start_s\tend_s\tconfidence\tword\n", *lines])


# ── textgrid ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval of a Praat tier in whole milliseconds; `label` is empty between words."""

    start_ms: int
    end_ms: int
    label: str


def build_tier(items: Sequence[Word | Character], duration_s: float) -> tuple[Interval, ...]:
    """Tile 0 to duration_s with an interval per item and empty ones between, each at least 1 ms long.

    Praat allows neither gaps nor overlaps nor empty intervals: an item that starts before the previous one has ended
    starts at that end, and one of zero length gets 1 ms. The tier is longer than `duration_s` only if its items are.
    """
    intervals: list[Interval] = []
    position = 0
    for item in items:
        start = max(_ms(item.start_s), position)
        end = max(_ms(item.end_s), start + 1)
        if start > position:
            intervals.append(Interval(position, start, ""))
        intervals.append(Interval(start, end, _label(item)))
        position = end
    if (end_ms := max(_ms(duration_s), 1)) > position:
        intervals.append(Interval(position, end_ms, ""))
    return tuple(intervals)


def _textgrid(transcript: Transcript, characters: bool) -> str:
    items: dict[str, Sequence[Word | Character]] = {}
    for channel in sorted({segment.channel for segment in transcript.segments}, key=str) or [None]:
        words = [word for segment in transcript.segments if segment.channel == channel for word in segment.words]
        suffix = "" if channel is None else f" of channel {channel}"
        items[f"words{suffix}"] = words
        if characters:
            items[f"characters{suffix}"] = [character for word in words for character in word.characters]
    # all tiers end together: with the recording, or with the longest tier
    end_ms = max(build_tier(each, transcript.duration_s)[-1].end_ms for each in items.values())
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', ""]
    lines += ["xmin = 0", f"xmax = {end_ms / 1000:.3f}", "tiers? <exists>", f"size = {len(items)}", "item []:"]
    for number, (name, each) in enumerate(items.items(), start=1):
        intervals = build_tier(each, end_ms / 1000)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += ["        xmin = 0", f"        xmax = {end_ms / 1000:.3f}"]
        lines += [f"        intervals: size = {len(intervals)}"]
        for index, interval in enumerate(intervals, start=1):
            quoted = interval.label.replace('"', '""')
            lines += [f"        intervals [{index}]:", f"            xmin = {interval.start_ms / 1000:.3f}"]
            lines += [f"            xmax = {interval.end_ms / 1000:.3f}", f'            text = "{quoted}"']
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _label(item: Word | Character) -> str:
    """Return the text on one line: white space, including line breaks, becomes single spaces."""
    return " ".join(item.text.split())
