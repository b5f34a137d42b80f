"""Read Kaldi data directories row by row: wav.scp, segments, text, utt2spk, utt2dur, reco2dur.

Files that are sorted, as Kaldi requires, are read side by side and not kept in memory, except wav.scp if there are
segments. Commands in wav.scp are rejected, since no command from a file is run.
Source: https://kaldi-asr.org/doc/data_prep.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mowa.data.manifests.tables import TableRow, read_lines
from mowa.errors import DataError

_ARK_PATH = re.compile(r".*\.ark:\d+(\[.*\])?")


def read_kaldi(folder: Path) -> Iterator[TableRow]:
    """Yield the utterances of a directory in the order of segments, or of wav.scp without segments.

    Columns: id, audio, text, speaker, duration, and offset for utterances that are an excerpt of their recording
    (seconds). Raises DataError, with file and line, for commands and archives in wav.scp and for invalid lines.
    """
    text, speaker = _open_lookup(folder / "text"), _open_lookup(folder / "utt2spk")
    for where, fields in _read_segments(folder) if (folder / "segments").is_file() else _read_recordings(folder):
        name = fields["id"]
        yield where, folder, {**fields, "text": text(name), "speaker": speaker(name)}


def _read_recordings(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    names = ("utt2dur", "reco2dur")
    duration = _open_lookup(next((folder / name for name in names if (folder / name).is_file()), folder / names[0]))
    for where, name, path in _read_paths(folder):
        yield where, {"id": name, "audio": path, "duration": duration(name)}


def _read_segments(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    paths = {name: path for _, name, path in _read_paths(folder)}
    durations = {name: _parse_seconds(where, value) for where, name, value in _read_pairs(folder / "reco2dur")}
    for where, name, rest in _read_pairs(folder / "segments"):
        recording, *times = rest.split() or [""]
        if len(times) < 2:
            raise DataError(f"{where}: is not a segment. Expected: utterance, recording, start and end in seconds.")
        start_s, end_s = (_parse_seconds(where, time) for time in times[:2])
        if recording not in paths:
            raise DataError(f"{where}: recording {recording} is not in wav.scp. Add it, or delete the segment.")
        if end_s == -1:  # the end of the recording
            if start_s == 0:
                yield where, {"id": name, "audio": paths[recording], "duration": durations.get(recording, 0)}
                continue
            if recording not in durations:
                raise DataError(
                    f"{where}: ends with its recording (-1), whose duration is not in reco2dur. Write the end."
                )
            end_s = durations[recording]
        if not 0 <= start_s < end_s:
            raise DataError(f"{where}: {start_s:g} to {end_s:g} s is not a segment. Start and end are in seconds.")
        yield where, {"id": name, "audio": paths[recording], "offset": start_s, "duration": round(end_s - start_s, 6)}


def _parse_seconds(where: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise DataError(f"{where}: {value[:40]} is not a number of seconds. Write seconds, such as 12.5.") from None


def _read_paths(folder: Path) -> Iterator[tuple[str, str, str]]:
    for where, name, path in _read_pairs(folder / "wav.scp"):
        if path.endswith("|") or path.startswith("|"):
            raise DataError(
                f"{where}: is a command ({path[:60]}), and commands are not run. "
                "Write its output to a file once, and put the path of that file here."
            )
        if _ARK_PATH.fullmatch(path):
            raise DataError(f"{where}: {path} is inside a Kaldi archive. Extract files with wav-copy.")
        if not path:
            raise DataError(f"{where}: has no recording. Add its path, or delete the line.")
        yield where, name, path


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
