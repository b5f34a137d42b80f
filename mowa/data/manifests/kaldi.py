"""Kaldi data directories → rows: wav.scp, segments, text, utt2spk, utt2dur, reco2dur.

Files that are sorted, as Kaldi wants them, are read side by side and not held; wav.scp is, where there are segments:
one path a recording. Commands in wav.scp are refused: nothing is run here that a file says.
https://kaldi-asr.org/doc/data_prep.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mowa.data.manifests.tables import TableRow, read_lines
from mowa.errors import DataError

_INSIDE = re.compile(r".*\.ark:\d+(\[.*\])?")


def read_kaldi(folder: Path) -> Iterator[TableRow]:
    """The utterances of a directory, in the order of segments, or of wav.scp where there are none.

    Fields: id, audio, text, and where given speaker, duration, offset (seconds; the utterance is a part of the
    recording then). DataError, with file and line, for commands and archives in wav.scp, and for broken lines.
    """
    text, speaker = _beside(folder / "text"), _beside(folder / "utt2spk")
    for where, fields in _segments(folder) if (folder / "segments").is_file() else _recordings(folder):
        name = fields["id"]
        yield where, folder, {**fields, "text": text(name), "speaker": speaker(name)}


def _recordings(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    stated = ("utt2dur", "reco2dur")
    length = _beside(next((folder / name for name in stated if (folder / name).is_file()), folder / stated[0]))
    for where, name, path in _paths(folder):
        yield where, {"id": name, "audio": path, "duration": length(name)}


def _segments(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    paths = {name: path for _, name, path in _paths(folder)}
    lengths = {name: _seconds(where, value) for where, name, value in _pairs(folder / "reco2dur")}
    for where, name, rest in _pairs(folder / "segments"):
        recording, *times = rest.split() or [""]
        if len(times) < 2:
            raise DataError(f"{where}: is no segment. Write: utterance, recording, start and end in seconds.")
        begin_s, end_s = (_seconds(where, time) for time in times[:2])
        if recording not in paths:
            raise DataError(f"{where}: recording {recording} is not in wav.scp. Add it, or delete the segment.")
        if end_s == -1:  # to the end of the recording
            if begin_s == 0:
                yield where, {"id": name, "audio": paths[recording], "duration": lengths.get(recording, 0)}
                continue
            if recording not in lengths:
                raise DataError(
                    f"{where}: ends with its recording (-1), whose length is not in reco2dur. Write its end."
                )
            end_s = lengths[recording]
        if not 0 <= begin_s < end_s:
            raise DataError(f"{where}: from {begin_s:g} to {end_s:g} s is no segment. Start and end are in seconds.")
        yield where, {"id": name, "audio": paths[recording], "offset": begin_s, "duration": round(end_s - begin_s, 6)}


def _seconds(where: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise DataError(f"{where}: {value[:40]} is no time. Write seconds, such as 12.5.") from None


def _paths(folder: Path) -> Iterator[tuple[str, str, str]]:
    for where, name, path in _pairs(folder / "wav.scp"):
        if path.endswith("|") or path.startswith("|"):
            raise DataError(
                f"{where}: is a command ({path[:60]}), and none is run here. "
                "Run it once into a file, and write the file's path in its place."
            )
        if _INSIDE.fullmatch(path):
            raise DataError(f"{where}: {path} lies inside a Kaldi archive. Take it out with wav-copy, as files.")
        if not path:
            raise DataError(f"{where}: names no recording. Fill in its path, or delete the line.")
        yield where, name, path


def _pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Where each line stands, its first word, and the rest of it; none where there is no such file."""
    if path.is_file():
        for number, line in enumerate(read_lines(path), 1):
            name, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
            if name:
                yield f"{path}:{number}", name, rest.strip()


def _beside(path: Path) -> Callable[[str], str]:
    """Look-up in a file of pairs, "" for what is not there. Where it is sorted, it is read as far as it is asked, and
    what was passed over is kept; else all of it is held."""
    before, ordered = "", True
    for _, name, _ in _pairs(path):
        before, ordered = name, ordered and before <= name
        if not ordered:
            break
    held: dict[str, str] = {}
    pairs = _pairs(path)
    ahead: tuple[str, str, str] | None = None

    def found(wanted: str) -> str:
        nonlocal ahead
        while wanted not in held:
            ahead = ahead or next(pairs, None)
            if ahead is None or (ordered and ahead[1] > wanted):
                return ""
            held[ahead[1]] = ahead[2]
            ahead = None
        return held.pop(wanted)

    return found
