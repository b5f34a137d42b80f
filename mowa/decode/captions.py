"""A transcript, written for people and programs: text, json, srt, vtt, tsv, textgrid.

It knows files and their rules; it refuses to know how the words were found. Words are never broken or re-spelt: only
white space inside one becomes a single space where the format is built of lines. Times are rounded to the millisecond
and confidences to four decimals here and nowhere earlier.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mowa.errors import DataError
from mowa.types import Character, Segment, Transcript, Word

FORMAT_SUFFIXES: Mapping[str, str] = {
    "text": ".txt",
    "json": ".json",
    "srt": ".srt",
    "vtt": ".vtt",
    "tsv": ".tsv",
    "textgrid": ".TextGrid",
}
"""Format → the suffix its files carry."""


def render(transcript: Transcript, output_format: str, *, char_times: bool = False) -> str:
    """Write the transcript as the content of one file (UTF-8), ending in a newline unless it is empty.

        text       the text alone
        json       one object on one line, keys as the fields of Transcript; `parse` reads it back
        srt, vtt   subtitles, see `cues`; times 00:00:00,000 and 00:00:00.000, hours always
        tsv        a header, then one line a word: start_s, end_s, confidence, word; tabs between, no quoting
        textgrid   Praat's long text format, see `tier`

    `characters` adds each word's characters to json, and a second tier of them to textgrid; the others have no place
    for them. Raises DataError for an unknown format. Sources: https://www.w3.org/TR/webvtt1/ and
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
    meant = f" Did you mean {close[0]}?" if close else ""
    raise DataError(f"unknown format {output_format!r}.{meant} Known: {', '.join(FORMAT_SUFFIXES)}.")


def parse_json(line: str) -> Transcript:
    """Read back what `render(transcript, "json")` wrote: the same transcript, up to rounding and characters left out.

    Unknown keys are passed over. Raises DataError if the line is not JSON or not a transcript.
    """
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"not a transcript: {error}.") from None
    return transcript_from_dict(found)


def transcript_from_dict(row: Any) -> Transcript:
    """The transcript that `row` gave these keys and values for. DataError if they are none's."""
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
    # Settings may hold paths and the like: their text will do. NaN is no JSON, and would be a bug of ours.
    return (
        json.dumps(
            transcript_to_dict(transcript, char_times=characters), ensure_ascii=False, allow_nan=False, default=str
        )
        + "\n"
    )


def transcript_to_dict(transcript: Transcript, *, char_times: bool = False) -> dict[str, Any]:
    """A transcript as keys and values that JSON knows, rounded."""
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
        row["final"] = False
    if segment.channel is not None:
        row["channel"] = segment.channel
    row["words"] = [_word_row(word, characters) for word in segment.words]
    return row


def _word_row(word: Word, characters: bool) -> dict[str, Any]:
    row = _timed_row(word)
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
    return Segment(**_timed_from(row), words=words, is_final=row.get("final", True), channel=row.get("channel"))


def _word_from(row: Mapping[str, Any]) -> Word:
    characters = tuple(Character(**_timed_from(character)) for character in row.get("characters", ()))
    return Word(**_timed_from(row), characters=characters)


def _timed_from(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": _string(row, "text")} | {key: float(row[key]) for key in ("start_s", "end_s", "confidence")}


def _string(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key} is {row[key]!r}, not a text")
    return str(row[key])


# ── srt and vtt ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle: one or two lines, shown from `start_s` to `end_s`, whole milliseconds, and the channel heard."""

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
    """Group the words into subtitles of at most two lines of `widest` / 2 characters.

    A cue ends with its segment, before a pause longer than `gap_s`, before it would last longer than `longest_s`, and
    before it would not fit in its lines. One word alone may break the last two rules, since words are never broken.
    A cue shown for less than `shortest_s` stays on while there is room before the next; the last one may outlive the
    recording. Cues start in strictly rising order, last at least 1 ms and never overlap. Segments without words give
    none. 42 characters a line and 7 s are the limits of the Netflix Timed Text Style Guide.
    """
    groups: list[list[Word]] = []
    channels: list[int | None] = []
    for segment in transcript.segments:
        spoken = [word for word in segment.words if _label(word)]  # an empty line would end a cue early
        groups += _groups(spoken, max_duration_s, max_chars // 2, max_gap_s)
        channels += [segment.channel] * (len(groups) - len(channels))
    # Strictly rising, even where two segments overlap.
    starts = list(accumulate((_ms(group[0].start_s) for group in groups), lambda before, at: max(at, before + 1)))
    wanted = [
        max(_ms(group[-1].end_s), at + _ms(min_duration_s), at + 1) for group, at in zip(groups, starts, strict=True)
    ]
    ends = [*map(min, wanted, starts[1:]), *wanted[-1:]]
    return tuple(
        Cue(start / 1000, end / 1000, _lines(group, max_chars // 2), channel)
        for start, end, group, channel in zip(starts, ends, groups, channels, strict=True)
    )


def _groups(words: Sequence[Word], longest_s: float, width: int, gap_s: float) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        if group and (
            word.start_s - group[-1].end_s > gap_s
            or word.end_s - group[0].start_s > longest_s
            or max(map(len, _lines([*group, word], width))) > width
        ):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _lines(words: Sequence[Word], width: int) -> tuple[str, ...]:
    """One line if all fits, else two as even as can be."""
    labels = [_label(word) for word in words]
    whole = " ".join(labels)
    if len(whole) <= width or len(labels) == 1:
        return (whole,)
    splits = [(" ".join(labels[:at]), " ".join(labels[at:])) for at in range(1, len(labels))]
    return min(splits, key=lambda lines: max(map(len, lines)))


def _srt(shown: Sequence[Cue]) -> str:
    return "".join(
        f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n"
        + ("" if cue.channel is None else f"[{cue.channel}] ")
        + "\n".join(cue.lines)
        + "\n\n"
        for number, cue in enumerate(shown, start=1)
    )


def _vtt(shown: Sequence[Cue]) -> str:
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = ["WEBVTT\n"] + [
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n"
        + ("" if cue.channel is None else f"<v channel {cue.channel}>")
        + "\n".join(cue.lines).translate(escapes)
        + "\n"
        for cue in shown
    ]
    return "\n".join(blocks)


def _clock(seconds: float, mark: str) -> str:
    """Hours, minutes, seconds and milliseconds after `mark`, as 01:02:03,004."""
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
    """A stretch of a Praat tier in whole milliseconds; `label` is empty where nothing was said."""

    start_ms: int
    end_ms: int
    label: str


def build_tier(items: Sequence[Word | Character], duration_s: float) -> tuple[Interval, ...]:
    """Tile 0 … duration_s with one interval per item and empty ones between, each at least 1 ms long.

    Praat allows neither gaps, nor overlaps, nor intervals of no length: an item that starts before the one ahead of it
    has ended starts there, and one of no length gets 1 ms. The tier outlasts `duration_s` only where its items do.
    """
    tiles: list[Interval] = []
    reached = 0
    for item in items:
        start = max(_ms(item.start_s), reached)
        end = max(_ms(item.end_s), start + 1)
        if start > reached:
            tiles.append(Interval(reached, start, ""))
        tiles.append(Interval(start, end, _label(item)))
        reached = end
    if (rest := max(_ms(duration_s), 1)) > reached:
        tiles.append(Interval(reached, rest, ""))
    return tuple(tiles)


def _textgrid(transcript: Transcript, characters: bool) -> str:
    items: dict[str, Sequence[Word | Character]] = {}
    for channel in sorted({segment.channel for segment in transcript.segments}, key=str) or [None]:
        words = [word for segment in transcript.segments if segment.channel == channel for word in segment.words]
        of = "" if channel is None else f" of channel {channel}"
        items[f"words{of}"] = words
        if characters:
            items[f"characters{of}"] = [character for word in words for character in word.characters]
    # All tiers end together: at the end of the recording, or of the tier that outlasts it.
    end_ms = max(build_tier(each, transcript.duration_s)[-1].end_ms for each in items.values())
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', ""]
    lines += ["xmin = 0", f"xmax = {end_ms / 1000:.3f}", "tiers? <exists>", f"size = {len(items)}", "item []:"]
    for number, (name, each) in enumerate(items.items(), start=1):
        tiles = build_tier(each, end_ms / 1000)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += ["        xmin = 0", f"        xmax = {end_ms / 1000:.3f}"]
        lines += [f"        intervals: size = {len(tiles)}"]
        for index, tile in enumerate(tiles, start=1):
            doubled = tile.label.replace('"', '""')
            lines += [f"        intervals [{index}]:", f"            xmin = {tile.start_ms / 1000:.3f}"]
            lines += [f"            xmax = {tile.end_ms / 1000:.3f}", f'            text = "{doubled}"']
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _label(item: Word | Character) -> str:
    """The text on one line: white space of any kind, line breaks included, becomes one space."""
    return " ".join(item.text.split())
