"""Accept audio as Python programs hold it: paths, bytes, files, arrays and rows of `datasets`."""

from __future__ import annotations

import io
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mowa.data.audio.decoders import RATE_RANGE_HZ, AudioBytes, Samples, warn_once
from mowa.errors import AudioError

MAX_PEAK = 16.0  # floats beyond it are no audio of full scale 1; mixing and filters overshoot by less


def to_audio_source(value: Any, *, sampling_rate: int | None = None, name: str = "audio") -> str | AudioBytes:
    """Return a path, or an encoded recording in memory called `name`.

    Args:
        value: a path; bytes or a binary file of any audio format; an array (numpy, torch, a list of floats), [n] or
            [channels, n]; or a row of `datasets`: {"array", "sampling_rate"}, {"path"}, {"bytes"}, {"audio": …}.
        sampling_rate: sampling rate of an array, in Hz.

    Raises:
        AudioError: another type, an array without a rate, or values that are no audio.
    """
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return AudioBytes(name, bytes(value))
    if isinstance(value, Mapping):
        return _from_row(value, sampling_rate, name)
    if hasattr(value, "get_all_samples"):  # a decoder of torchcodec, as datasets 4 has it
        samples = value.get_all_samples()
        return _from_array(samples.data, samples.sample_rate, name)
    if hasattr(value, "read"):
        data = value.read()
        if not isinstance(data, bytes):
            raise AudioError(f"{name}: the file is open as text: open it with mode 'rb'")
        return AudioBytes(str(getattr(value, "name", name)), data)
    if hasattr(value, "__array__") or isinstance(value, list | tuple):
        return _from_array(value, sampling_rate, name)
    raise AudioError(
        f"{name}: {type(value).__name__} is not audio: pass a path, bytes, an open file, an array with sampling_rate,"
        " or a row of datasets"
    )


def _from_row(row: Mapping[str, Any], sampling_rate: int | None, name: str) -> str | AudioBytes:
    name = str(row.get("path") or row.get("id") or name)
    if row.get("array") is not None:
        return _from_array(row["array"], row.get("sampling_rate") or sampling_rate, name)
    if row.get("raw") is not None:  # the key of transformers' pipelines
        return _from_array(row["raw"], row.get("sampling_rate") or sampling_rate, name)
    if row.get("bytes") is not None:
        return AudioBytes(name, row["bytes"])
    if row.get("path"):
        return str(row["path"])
    if row.get("audio") is not None:
        return to_audio_source(row["audio"], sampling_rate=sampling_rate, name=name)
    raise AudioError(f"{name}: a row without audio (keys {', '.join(row)}): expected array, bytes, path or audio")


def _from_array(value: Any, sampling_rate: int | None, name: str) -> AudioBytes:
    """Encode an array as WAV, exactly: float32, or int16 and int32 as they are."""
    if sampling_rate is None:
        raise AudioError(f"{name}: an array has no sampling rate: pass sampling_rate=16_000, or its own")
    low, high = RATE_RANGE_HZ
    if not isinstance(sampling_rate, numbers.Real) or not low <= sampling_rate <= high:
        raise AudioError(f"{name}: sampling_rate is {sampling_rate!r}; it must be {low} to {high} Hz")
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except ValueError:
        raise AudioError(
            f"{name}: a list of lists of several lengths is not audio: pass [n] or [channels, n]"
        ) from None
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T  # [channels, n], as in torchaudio
    if array.ndim not in (1, 2) or not array.size:
        raise AudioError(f"{name}: an array of shape {list(array.shape)} is not audio: pass [n] or [channels, n]")
    if array.dtype not in (np.int16, np.int32):
        if array.dtype.kind not in "fiu":
            raise AudioError(f"{name}: an array of {array.dtype} is not audio: pass float32 in -1 … 1, or int16")
        if array.dtype.kind != "f":
            raise AudioError(f"{name}: an array of {array.dtype} has no scale: pass float32 in -1 … 1, or int16")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise AudioError(f"{name}: the array contains NaN or infinity: check how it was made")
        array = _to_full_scale(array, name)
    subtype = {"float32": "FLOAT", "int16": "PCM_16", "int32": "PCM_32"}[str(array.dtype)]
    encoded = io.BytesIO()
    soundfile.write(encoded, array, int(sampling_rate), format="WAV", subtype=subtype)
    return AudioBytes(name, encoded.getvalue())


def _to_full_scale(array: Samples, name: str) -> Samples:
    """Return float32 of full scale ±1; values of 16-bit integers, which a dtype was changed of, are divided by 2¹⁵."""
    peak = float(np.abs(array).max())
    if peak <= MAX_PEAK:
        return array
    if peak > 2**15:
        raise AudioError(f"{name}: the array reaches {peak:.3g}; full scale is 1: divide it by the full scale it has")
    warn_once(name, f"has floats that reach {peak:.0f}: taken for 16-bit integers, and divided by 32768.")
    return array / np.float32(2**15)
