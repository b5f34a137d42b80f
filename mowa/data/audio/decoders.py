"""Decode recordings with libsndfile or FFmpeg (PyAV): float32 chunks at the file's own sample rate.

libsndfile decodes WAV, FLAC and NIST SPHERE; FFmpeg decodes everything else and whatever libsndfile rejects, such as
SPHERE that is compressed with shorten. MP3 and Ogg go to FFmpeg because libsndfile ends both early without an error: it
estimates the length of an MP3 without a Xing header, and decodes only the first of several chained Ogg streams. Whether
the end of a recording is missing is checked in `reader`.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from mowa.data.audio import headers, timestamps
from mowa.data.audio.timestamps import Timeline
from mowa.errors import AudioError

log = logging.getLogger("mowa")

Samples = npt.NDArray[np.float32]

RATE_RANGE_HZ = (100, 768_000)
MAX_CHANNELS = 1024
DURATION_TOLERANCE_S = 0.25  # encoder delay and padding: a lossy file may be this much shorter than its header states

_CHUNK_VALUES = 2**13  # values decoded at once, over all channels; bounds the error of "decoded s" in error messages
_SNDFILE_MAGIC = (b"RIFF", b"RF64", b"fLaC", b"NIST")
_FFMPEG_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,avi,caf,flac,flv,matroska,mov,mp3,mpeg,mpegts,nistsphere,ogg,w64,wav"
)
_PROBE = {"probesize": str(2**26), "analyzeduration": str(3600 * 10**6)}  # bytes, kept in memory; µs
_MAX_PLANES = 8  # PyAV 18 reads out of bounds if more channels have planes of their own
_OGG_TRUNCATED = "its last page does not end the stream"
_CONVERT = {"": "Convert it with the program that wrote it.", "nistsphere": "Convert it with sph2pipe -f wav."}
_ADVICE = "Copy the file again, or cut it with ffmpeg."


@dataclass(frozen=True, slots=True)
class AudioBytes:
    """An encoded recording in memory. `name` is used in error messages."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


AudioInput = Path | AudioBytes


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """Header of a recording. `duration_s` is None if the container does not state it; `format` is the container."""

    duration_s: float | None
    rate_hz: int
    channels: int
    format: str


@dataclass(frozen=True, slots=True)
class AudioDecoder:
    """An open recording.

    `chunks(mixer)` decodes from frame `start_frame` on, in chunks of any length at `info.rate_hz`. The mixer maps the
    decoded values [n, C] to [n] or [n, K], before they are scaled to ±1. `timeline` places them by their timestamps;
    None where the format has none.
    """

    info: AudioInfo
    chunks: Callable[[ChannelMixer], Iterator[Samples]]
    start_frame: int = 0
    timeline: Timeline | None = None


ChannelMixer = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class DecodingError(Exception):
    """The decoder failed at this point; what was decoded before it may be complete."""


def mix_to_mono(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Average the channels: [n, C] → [n]."""
    return values.mean(axis=1)


def audio_error(source: AudioInput | str, message: str) -> AudioError:
    """Return an AudioError on one line that begins with the name of the recording."""
    name = str(source)
    return AudioError(f"{name if name.isprintable() else repr(name)}: {' '.join(message.split())}")


@lru_cache(4096)
def warn_once(source: AudioInput | str, message: str) -> None:
    """Log a warning once per process: a recording may be read several times, by channels or in parts."""
    log.warning("%s", audio_error(source, message))


def truncated_error(source: AudioInput, reason: str, decoded_s: float) -> AudioError:
    """Return the error for a recording that ends before its header says it does."""
    return audio_error(source, f"is cut off: {reason}, {decoded_s:.1f} s could be decoded. {_ADVICE}")


def decode_error(source: AudioInput, reason: str, decoded_s: float) -> AudioError:
    """Return the error for a recording whose decoder failed after `decoded_s`."""
    return audio_error(source, f"cannot be decoded after {decoded_s:.1f} s ({reason}). {_ADVICE}")


@contextmanager
def open_audio(source: AudioInput, start_s: float = 0.0) -> Iterator[AudioDecoder]:
    """Open a recording with the decoder for its first bytes; its name is ignored.

    Decoding starts at `start_s` if the decoder can seek exactly, else at 0 (see `AudioDecoder.start_frame`).
    Raises AudioError if the recording cannot be opened or its header shows that it is invalid or cut off.
    """
    with ExitStack() as closing:
        file = closing.enter_context(_open_bytes(source))
        magic = file.read(4)
        if not magic:
            raise audio_error(source, "is empty (0 bytes). Copy the file again.")
        decoder = _open_sndfile(source, file, closing, start_s) if magic in _SNDFILE_MAGIC else None
        decoder = decoder or _open_ffmpeg(source, file, closing)
        _validate_header(source, decoder.info.rate_hz, decoder.info.channels)
        yield decoder


def _open_bytes(source: AudioInput) -> BinaryIO:
    if isinstance(source, AudioBytes):
        return io.BytesIO(source.data)
    if source.is_dir():
        raise audio_error(source, "is a folder, not a recording. Pass a file in it.")
    try:
        return source.open("rb")
    except (FileNotFoundError, ValueError):  # ValueError: a null byte in the path
        raise audio_error(source, "does not exist. Check the spelling.") from None
    except OSError as error:
        raise audio_error(source, f"cannot be opened ({error.strerror}). Check its permissions.") from None


def _validate_header(source: AudioInput, rate_hz: int, channels: int) -> None:
    low, high = RATE_RANGE_HZ
    if not (low <= rate_hz <= high and 1 <= channels <= MAX_CHANNELS):
        raise audio_error(
            source,
            f"has an invalid header: {rate_hz} Hz, {channels} channels (expected {low} to {high} Hz and "
            f"1 to {MAX_CHANNELS} channels). Export it again.",
        )


def _open_sndfile(source: AudioInput, file: BinaryIO, closing: ExitStack, start_s: float) -> AudioDecoder | None:
    """Open WAV, FLAC or SPHERE; return None if FFmpeg should try: another format in RIFF, another codec, no length."""
    if header := headers.read_wav_header(file) or headers.read_sphere_header(file):
        _validate_header(source, header.rate_hz, header.channels)
        if header.unstated_bytes:
            return None
        if header.is_joined:
            warn_once(source, "is followed by another recording in the same file, which is not read. Split the file.")
    try:
        file.seek(0)
        sound = closing.enter_context(soundfile.SoundFile(file if isinstance(source, AudioBytes) else _encode(source)))
    except soundfile.LibsndfileError:
        return None
    if not 0 < sound.frames < 2**62:
        return None
    duration_s = sound.frames / sound.samplerate
    if header and header.size_ratio > 1:
        raise truncated_error(source, f"its header promises {duration_s * header.size_ratio:.1f} s", duration_s)
    start = min(round(start_s * sound.samplerate), sound.frames) if start_s and sound.seekable() else 0
    info = AudioInfo(duration_s, sound.samplerate, sound.channels, sound.format.lower())
    return AudioDecoder(info, lambda mixer: _decode_sndfile(sound, start, mixer), start)


def _encode(path: Path) -> bytes | Path:
    """Return a path as soundfile opens it, which encodes names itself and fails at one that is not UTF-8."""
    return os.fsencode(path) if os.name == "posix" else path


def _decode_sndfile(sound: soundfile.SoundFile, start: int, mixer: ChannelMixer) -> Iterator[Samples]:
    frames = max(1, _CHUNK_VALUES // sound.channels)
    try:
        if start:
            sound.seek(start)
        while len(chunk := sound.read(frames, dtype="float32", always_2d=True)):
            yield mixer(chunk)
    except soundfile.LibsndfileError as error:
        raise DecodingError(error.error_string) from None


def _open_ffmpeg(source: AudioInput, file: BinaryIO, closing: ExitStack) -> AudioDecoder:
    import av

    truncated, num_frames = headers.is_ogg_truncated(file), headers.read_mp3_frame_count(file)
    # Some of FFmpeg's formats, playlists above all, open other files and URLs: allow only these, and only this file.
    options = {"protocol_whitelist": "file", "format_whitelist": _FFMPEG_FORMATS}
    if (wav := headers.read_wav_header(file)) and wav.unstated_bytes:
        options["ignore_length"] = "1"
        stated_s, unstated_s = wav.stated_bytes / wav.bytes_per_s, wav.unstated_bytes / wav.bytes_per_s
        warn_once(
            source,
            f"states {stated_s:.1f} s in its header, and {unstated_s:.1f} s of audio follow, as where its writer was"
            " stopped: all of it is read.",
        )
    file.seek(0)
    target = file if isinstance(source, AudioBytes) else f"file:{source}"
    try:
        container = closing.enter_context(av.open(target, "r", metadata_errors="ignore", options=options))
        if _begins_too_late(container):
            file.seek(0)
            container = closing.enter_context(av.open(target, "r", metadata_errors="ignore", options=options | _PROBE))
    except (av.FFmpegError, ValueError) as error:
        if truncated:
            raise truncated_error(source, _OGG_TRUNCATED, 0.0) from None
        reason = _error_reason(error)
        raise audio_error(source, f"is not audio, or its index is cut off ({reason}). Copy it again.") from None
    if truncated:
        raise truncated_error(source, _OGG_TRUNCATED, (container.duration or 0) / 1e6)
    track = container.streams.audio[0] if container.streams.audio else None
    if track is None or track.codec_context is None:
        problem = "has no audio stream" if track is None else "uses a codec that FFmpeg cannot decode"
        advice = (
            "Choose a recording with audio." if track is None else _CONVERT.get(container.format.name, _CONVERT[""])
        )
        raise audio_error(source, f"{problem} ({container.format.long_name}). {advice}")
    rate_hz, channels = track.codec_context.sample_rate, track.codec_context.channels
    if channels > _MAX_PLANES and track.codec_context.format.is_planar:
        raise audio_error(
            source, f"has {channels} channels; at most {_MAX_PLANES} are supported for its codec. Convert it to WAV."
        )
    start_s, timeline = timestamps.find_start_s(container), None
    if container.format.name in timestamps.FORMATS_WITH_TIMESTAMPS:
        timeline = Timeline(start_s, lambda: not _lost_ogg_pages(source), chained=container.format.name == "ogg")
    duration_s = headers.read_duration_s(container, num_frames, start_s)
    info = AudioInfo(duration_s, rate_hz, channels, container.format.name.split(",")[0])
    return AudioDecoder(info, lambda mixer: _decode_ffmpeg(container, rate_hz, mixer, timeline), timeline=timeline)


def _begins_too_late(container: Any) -> bool:
    """Return whether the audio begins behind what FFmpeg read to find the streams, in a format without a header."""
    if not container.streams.audio:
        return container.format.name in ("flv", "mpeg")
    context = container.streams.audio[0].codec_context
    return context is not None and not context.sample_rate


def _lost_ogg_pages(source: AudioInput) -> bool:
    with _open_bytes(source) as file:
        return headers.lost_ogg_pages(file)


def _decode_ffmpeg(container: Any, rate_hz: int, mixer: ChannelMixer, timeline: Timeline | None) -> Iterator[Samples]:
    """Decode the first audio stream. Skip damaged packets if audio follows and they last less than the tolerance."""
    import av

    failure, lost_s = "", 0.0
    try:
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                failure = _error_reason(error)
                lost_s += float((packet.duration or 0) * packet.time_base)
                if lost_s > DURATION_TOLERANCE_S:
                    break
                continue
            for frame in frames:
                if frame.sample_rate != rate_hz:
                    raise DecodingError(f"its sample rate changes from {rate_hz} to {frame.sample_rate} Hz")
                if frame.format.is_planar and frame.layout.nb_channels > _MAX_PLANES:
                    raise DecodingError(f"its channels grow to {frame.layout.nb_channels}")
                hole_s = timeline.place(frame.time, frame.samples / rate_hz) if timeline else 0.0
                for count in timestamps.silence_pieces(hole_s, rate_hz):
                    yield mixer(np.broadcast_to(np.float32(0), (count, frame.layout.nb_channels)))
                yield _mix_frame(frame, mixer)
            if frames and packet.size:
                failure = ""
    except av.FFmpegError as error:
        failure = _error_reason(error)
    if failure:
        raise DecodingError(failure)


def _mix_frame(frame: Any, mixer: ChannelMixer) -> Samples:
    """Mix an FFmpeg frame (planar or interleaved, integer or float) and scale it to ±1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        return (mixer(values.astype(np.float32) - 128) / 128).astype(np.float32)
    scale = 1 if values.dtype.kind == "f" else 2.0 ** (8 * values.dtype.itemsize - 1)
    return (mixer(values.astype(np.float64)) / scale).astype(np.float32)


def _error_reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
