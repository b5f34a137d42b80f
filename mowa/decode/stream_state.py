"""The state of a live stream between two feeds, and the bytes that it is saved as."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mowa.errors import ModelError

Samples = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


def no_samples() -> Samples:
    """Return an empty array of samples."""
    return np.zeros(0, np.float32)


@dataclass(slots=True)
class StreamState:
    """State of a stream between two feeds. Positions are samples from its beginning.

    num_samples      samples processed
    pending          samples that do not fill a step yet
    pre_speech       the last samples before speech, while there is none
    vad_state, encoder_state  state of the detector and of the encoder
    utterance_start  first sample of the utterance; -1 while there is no speech
    silence_start    first sample of the silence in the utterance; -1 if there is none
    level            RMS of the loudest of the last steps, full scale 1
    gain             factor by which the utterance is amplified
    frames_decoded   frames of the utterance whose words were returned
    stable_ids, stable_probs  token ids and probabilities of the final frames after those
    segment_start_s  start of the first word of the segment; -1 if it has none
    last_character   of the text before the latter; "" at the beginning
    last_partial     text of the last partial segment
    closed           whether the stream was closed
    """

    num_samples: int = 0
    pending: Samples = field(default_factory=no_samples)
    pre_speech: Samples = field(default_factory=no_samples)
    vad_state: Arrays = field(default_factory=dict)
    encoder_state: Arrays | None = None
    utterance_start: int = -1
    silence_start: int = -1
    level: float = 0.0
    gain: float = 1.0
    frames_decoded: int = 0
    stable_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    stable_probs: NDArray[np.float32] = field(default_factory=no_samples)
    segment_start_s: float = -1.0
    last_character: str = ""
    last_partial: str = ""
    closed: bool = False


def serialize(state: StreamState) -> bytes:
    """Return a .npz (without pickle) of the arrays of a state, and of its other fields as JSON."""
    scalars = {
        name: value
        for name in StreamState.__slots__
        if not isinstance(value := getattr(state, name), np.ndarray | dict)
    }
    arrays: Arrays = {
        name: value for name in StreamState.__slots__ if isinstance(value := getattr(state, name), np.ndarray)
    }
    for group in ("vad_state", "encoder_state"):
        arrays |= {f"{group}.{name}": value for name, value in (getattr(state, group) or {}).items()}
    out = BytesIO()
    np.savez(out, scalars=np.frombuffer(json.dumps(scalars).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def deserialize(saved: bytes) -> StreamState:
    """Return the state that `serialize` wrote. Raises ModelError for other bytes."""
    try:
        with np.load(BytesIO(saved), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        scalars = json.loads(bytes(arrays.pop("scalars")))
        groups: dict[str, Arrays] = {"vad_state": {}, "encoder_state": {}}
        for name in [name for name in arrays if "." in name]:
            group, _, key = name.partition(".")
            groups[group][key] = arrays.pop(name)
        return StreamState(
            **scalars | arrays | {"vad_state": groups["vad_state"], "encoder_state": groups["encoder_state"] or None}
        )
    except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as error:
        raise ModelError(f"this is not a saved stream, or it is damaged ({error})") from None
