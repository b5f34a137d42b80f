"""Parse the cuts of a lhotse manifest without lhotse, or its supervisions together with its recordings.

Supported are whole recordings in files and excerpts of them. Cuts that lhotse would have to compute (mixing, padding,
speed perturbation) or whose audio is the output of a command are rejected.
Source: https://lhotse.readthedocs.io/en/latest/cuts.html (lhotse 1.33).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mowa.data.manifests.rows import BadRow, TableRow, usable_fields
from mowa.errors import DataError

_TYPES = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")
_TOLERANCE_S = 0.01  # a cut that ends this close to the end of its recording is a whole recording
_ADVICE = "Save the cuts with lhotse's save_audios first."


def is_cut(fields: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is a lhotse cut, or a recording, which is read as a cut of its whole length."""
    return fields.get("type") in _TYPES or isinstance(fields.get("recording"), dict) or _is_recording(fields)


def _is_recording(fields: Mapping[str, Any]) -> bool:
    return isinstance(fields.get("sources"), list) and "sampling_rate" in fields


def find_recordings(supervisions: Path) -> Path | None:
    """Return the manifest of recordings beside one of supervisions: corpus_recordings_train for _supervisions_."""
    start, found, end = supervisions.name.rpartition("supervisions")
    stem = f"{start}recordings{end.partition('.')[0]}"
    suffixes = dict.fromkeys((end[end.find(".") :], ".jsonl.gz", ".jsonl", ".json.gz", ".json"))
    files = (supervisions.with_name(stem + suffix) for suffix in suffixes if found)
    return next((file for file in files if file.is_file()), None)


def join_recordings(supervisions: Iterator[TableRow], recordings: Iterator[TableRow]) -> Iterator[TableRow]:
    """Yield a cut for each supervision, the part of its recording that it describes. Memory: the recordings."""
    by_id = {str(fields.get("id")): fields for fields in usable_fields(recordings)}
    for where, folder, fields in supervisions:
        if isinstance(fields, BadRow) or "recording_id" not in fields:
            yield where, folder, fields
            continue
        name = str(fields["recording_id"])
        if name not in by_id:
            reason = f"{where}: recording {name} is not in the manifest of recordings. Add it, or delete the line."
            yield where, folder, BadRow(reason, str(fields.get("id") or ""))
            continue
        cut = {key: fields.get(key) for key in ("id", "start", "duration", "channel")}
        yield where, folder, {**cut, "recording": by_id[name], "supervisions": [{**fields, "start": 0}]}


def parse_cut(where: str, cut: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a cut to the columns of a row.

    Columns: id, audio, text, duration (seconds); speaker, language and gender if all supervisions agree; offset if the
    cut is an excerpt. Raises DataError unless the cut is one recording in one file, or an excerpt of one.
    """
    if _is_recording(cut):
        cut = {"id": cut.get("id"), "start": 0, "duration": cut.get("duration"), "recording": cut}
    kind, recording = cut.get("type", "MonoCut"), cut.get("recording")
    if kind in ("MixedCut", "PaddingCut"):
        raise DataError(f"{where}: is a {kind}, which needs lhotse. {_ADVICE}")
    if not isinstance(recording, dict):
        raise DataError(f"{where}: is a cut without a recording. Write cuts with recordings, not features.")
    try:
        start_s, duration_s = float(cut["start"]), float(cut["duration"])
        path = _audio_path(where, recording["sources"], cut.get("channel"))
        recording_s = float(recording["duration"])
        supervisions = sorted(cut.get("supervisions") or (), key=lambda one: float(one["start"]))
        text = " ".join(one["text"] for one in supervisions if one.get("text"))
        transforms = [transform["name"] for transform in recording.get("transforms") or ()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: is not a complete cut ({error!r}). Write it again with lhotse.") from None
    if unsupported := [str(name) for name in transforms if name != "Resample"]:  # reading resamples anyway
        raise DataError(
            f"{where}: its recording has transforms ({', '.join(unsupported)}), which need lhotse. {_ADVICE}"
        )
    fields: dict[str, Any] = {"id": cut.get("id"), "audio": path, "duration": duration_s, "text": text}
    for tag in ("speaker", "language", "gender"):
        values = {str(one[tag]) for one in supervisions if one.get(tag)}
        if len(values) == 1:
            fields[tag] = values.pop()
    if start_s > 0 or start_s + duration_s < recording_s - _TOLERANCE_S:
        fields["offset"] = start_s
    return fields


def _audio_path(where: str, sources: Any, channel: Any) -> str:
    """Return the one file that holds all channels of the cut."""
    if len(sources) != 1:
        raise DataError(f"{where}: its channels are in {len(sources)} files. {_ADVICE}")
    (source,) = sources
    if source["type"] != "file":
        raise DataError(f"{where}: its audio source is a {source['type']}, and only files are supported. {_ADVICE}")
    channels = channel if isinstance(channel, list) else [channel]
    if len(source["channels"]) > 1 and channel is not None and sorted(channels) != sorted(source["channels"]):
        raise DataError(
            f"{where}: is channel {channel} of {len(source['channels'])}, and single channels are not supported. "
            f"{_ADVICE}"
        )
    return str(source["source"])
