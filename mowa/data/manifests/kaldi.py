"""Read Kaldi data directories row by row: wav.scp, segments, text, utt2spk, utt2dur, reco2dur.

Files that are sorted, as Kaldi requires, are read side by side and not kept in memory, except wav.scp if there are
segments. No command from a file is run: a line of wav.scp with one, like any other line that cannot be used, becomes a
`BadRow`, and so do its segments.
Source: https://kaldi-asr.org/doc/data_prep.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mowa.data.manifests.rows import BadRow, TableRow
from mowa.data.manifests.text_tables import read_lines

_ARK_PATH = re.compile(r".*\.ark:\d+(\[.*\])?")

Utterance = tuple[str, str, dict[str, Any] | BadRow]  # position, id, columns


def read_kaldi(folder: Path) -> Iterator[TableRow]:
    """Yield the utterances of a directory in the order of segments, or of wav.scp without segments.

    Columns: id, audio, text, speaker, duration, and offset for utterances that are an excerpt of their recording
    (seconds). Raises DataError if a file is not UTF-8 or cannot be read.
    """
    text, speaker = _open_lookup(folder / "text"), _open_lookup(folder / "utt2spk")
    for where, name, found in _read_segments(folder) if (folder / "segments").is_file() else _read_recordings(folder):
        texts = {"text": text(name), "speaker": speaker(name)}
        yield where, folder, found if isinstance(found, BadRow) else {"id": name, **found, **texts}


def _read_recordings(folder: Path) -> Iterator[Utterance]:
    names = ("utt2dur", "reco2dur")
    duration = _open_lookup(next((folder / name for name in names if (folder / name).is_file()), folder / names[0]))
    for where, name, path in _read_pairs(folder / "wav.scp"):
        stated, problem = duration(name), _path_problem(path)
        yield where, name, BadRow(f"{where}: {problem}", name) if problem else {"audio": path, "duration": stated}


def _read_segments(folder: Path) -> Iterator[Utterance]:
    paths = {name: (where, path) for where, name, path in _read_pairs(folder / "wav.scp")}
    durations = {name: value for _, name, value in _read_pairs(folder / "reco2dur")}
    for where, name, rest in _read_pairs(folder / "segments"):
        try:
            yield where, name, _parse_segment(rest, paths, durations)
        except ValueError as error:
            yield where, name, BadRow(f"{where}: {error}", name)


def _parse_segment(
    rest: str, paths: Mapping[str, tuple[str, str]], durations: Mapping[str, str]
) -> dict[str, str | float]:
    """Return the columns of a segment. Raises ValueError with the reason if it cannot be used."""
    recording, *times = rest.split() or [""]
    if len(times) < 2:
        raise ValueError("is not a segment. Expected: utterance, recording, start and end in seconds.")
    start_s, end_s = map(_parse_seconds, times[:2])
    if recording not in paths:
        raise ValueError(f"recording {recording} is not in wav.scp. Add it, or delete the segment.")
    where, path = paths[recording]
    if problem := _path_problem(path):
        raise ValueError(f"recording {recording} ({where}) {problem}")
    if end_s == -1:  # the end of the recording
        if start_s == 0:
            return {"audio": path, "duration": _parse_seconds(durations.get(recording, "0"))}
        if recording not in durations:
            raise ValueError("ends with its recording (-1), whose duration is not in reco2dur. Write the end.")
        end_s = _parse_seconds(durations[recording])
    if not 0 <= start_s < end_s:
        raise ValueError(f"{start_s:g} to {end_s:g} s is not a segment. Start and end are in seconds.")
    return {"audio": path, "offset": start_s, "duration": round(end_s - start_s, 6)}


def _parse_seconds(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{value[:40]} is not a number of seconds. Write seconds, such as 12.5.") from None


def _path_problem(path: str) -> str:
    """Return why the rest of a line of wav.scp is not the path of a recording, else ""."""
    if path.endswith("|") or path.startswith("|"):
        return (
            f"is a command ({path[:60]}), and commands are not run. Write its output to a file once, and put the path "
            "of that file here."
        )
    if _ARK_PATH.fullmatch(path):
        return f"{path} is inside a Kaldi archive. Extract files with wav-copy."
    return "" if path else "has no recording. Add its path, or delete the line."


def _read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the position, the first word and the rest of each line; nothing if there is no such file."""
    if path.is_file():
        for number, line in enumerate(read_lines(path), 1):
            name, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
            if name:
                yield f"{path}:{number}", name, rest.strip()


def _open_lookup(path: Path) -> Callable[[str], str]:
    """Return a function from the first word of a line to its rest, "" if absent.

    A sorted file is read as far as needed, and lines that were passed over are kept; an unsorted one is kept whole.
    """
    previous, is_sorted = "", True
    for _, name, _ in _read_pairs(path):
        previous, is_sorted = name, is_sorted and previous <= name
        if not is_sorted:
            break
    kept: dict[str, str] = {}
    pairs = _read_pairs(path)
    ahead: tuple[str, str, str] | None = None

    def look_up(wanted: str) -> str:
        nonlocal ahead
        while wanted not in kept:
            ahead = ahead or next(pairs, None)
            if ahead is None or (is_sorted and ahead[1] > wanted):
                return ""
            kept[ahead[1]] = ahead[2]
            ahead = None
        return kept.pop(wanted)

    return look_up
