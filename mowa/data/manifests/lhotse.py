"""lhotse's cut manifests, without lhotse: one cut, as JSON has it → the fields of a row.

Only whole recordings in files, and parts of them, are read: what lhotse would have to compute (mixing, padding, changes
of speed) or run (commands) is refused. https://lhotse.readthedocs.io/en/latest/cuts.html, written by lhotse 1.33.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mowa.errors import DataError

_TYPES = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")
_SAME_S = 0.01  # a cut that ends so near the end of its recording is all of it
_SAVE = "Save the cuts with lhotse's save_audios first."


def is_cut(fields: Mapping[str, Any]) -> bool:
    return fields.get("type") in _TYPES or isinstance(fields.get("recording"), dict)


def parse_cut(where: str, cut: Mapping[str, Any]) -> dict[str, Any]:
    """id, audio, text, duration (seconds), and where said speaker, language, gender; offset where the cut is a part.

    DataError for what is no part of one recording in one file.
    """
    kind, recording = cut.get("type", "MonoCut"), cut.get("recording")
    if kind in ("MixedCut", "PaddingCut"):
        raise DataError(f"{where}: is a {kind}, which only lhotse can put together. {_SAVE}")
    if not isinstance(recording, dict):
        raise DataError(f"{where}: is a cut without a recording. Write the cuts with their recordings, not features.")
    try:
        begin_s, length_s = float(cut["start"]), float(cut["duration"])
        path = _file(where, recording["sources"], cut.get("channel"))
        whole_s = float(recording["duration"])
        spoken = sorted(cut.get("supervisions") or (), key=lambda said: float(said["start"]))
        text = " ".join(said["text"] for said in spoken if said.get("text"))
        changes = [change["name"] for change in recording.get("transforms") or ()]
    except (AttributeError, KeyError, TypeError, ValueError) as wrong:
        raise DataError(f"{where}: is no whole cut ({wrong!r}). Write it again with lhotse.") from None
    if changed := [str(name) for name in changes if name != "Resample"]:  # all are resampled as they are heard
        raise DataError(f"{where}: its recording is to be changed ({', '.join(changed)}) by lhotse. {_SAVE}")
    found: dict[str, Any] = {"id": cut.get("id"), "audio": path, "duration": length_s, "text": text}
    for tag in ("speaker", "language", "gender"):
        said_of = {str(said[tag]) for said in spoken if said.get(tag)}
        if len(said_of) == 1:
            found[tag] = said_of.pop()
    if begin_s > 0 or begin_s + length_s < whole_s - _SAME_S:
        found["offset"] = begin_s
    return found


def _file(where: str, sources: Any, channel: Any) -> str:
    """The one file that all channels are in."""
    if len(sources) != 1:
        raise DataError(f"{where}: its channels are in {len(sources)} files. {_SAVE}")
    (source,) = sources
    if source["type"] != "file":
        raise DataError(f"{where}: its sound comes from a {source['type']}, and only files are read. {_SAVE}")
    heard = channel if isinstance(channel, list) else [channel]
    if len(source["channels"]) > 1 and channel is not None and sorted(heard) != sorted(source["channels"]):
        raise DataError(
            f"{where}: is channel {channel} of {len(source['channels'])}, and channels are not chosen one by one here. "
            f"{_SAVE}"
        )
    return str(source["source"])
