"""Which decoder reads a recording, and its sound as that decoder gives it: float32 pieces at its own rate.

Two share the work. libsndfile reads WAV and FLAC; FFmpeg (through PyAV) reads everything else, and what libsndfile
refuses. MP3 and Ogg are FFmpeg's because libsndfile guesses the length of an MP3 without a Xing header and stops at its
guess, and reads only the first of several chained Ogg streams: both end early without a word.

What is missing at the end is not judged here, but by `audio`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from mowa.data.audio import headers
from mowa.errors import AudioError

Samples = npt.NDArray[np.float32]

RATE_RANGE_HZ = (100, 768_000)
MAX_CHANNELS = 1024

_PIECE = 2**13  # values decoded at once, over all channels; what a failing decoder loses of the seconds it reports
DURATION_TOLERANCE_S = 0.25  # encoder delay and padding: a lossy file may hold this much less than its header counts
_FORMATS = "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,avi,caf,flac,matroska,mov,mp3,mpeg,mpegts,ogg,w64,wav"
_PLANES_MAX = 8  # PyAV 18 reads memory that is not its own where each of more channels has its own plane
_TORN = "its last page does not end the stream"
_ADVICE = "Copy the file again, or cut it with ffmpeg."


@dataclass(frozen=True, slots=True)
class AudioBytes:
    """A recording that is no file: its bytes, and what to call it."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


AudioInput = Path | AudioBytes


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What the header says. `duration_s` is None where the container does not say; `format` is the container's name."""

    duration_s: float | None
    rate_hz: int
    channels: int
    format: str


@dataclass(frozen=True, slots=True)
class AudioDecoder:
    """An opened one: its header, and its sound in pieces of any length at `info.rate_hz`, from frame `begins` on.

    `pieces` takes what to make of the channels: float [n, C] → float [n] or [n, K], before it is scaled to ±1.
    """

    info: AudioInfo
    chunks: Callable[[ChannelMixer], Iterator[Samples]]
    start_frame: int = 0


ChannelMixer = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class DecodingError(Exception):
    """The decoder gave up here; how bad that is depends on what the container promised."""


def mix_to_mono(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The average of all channels."""
    return values.mean(axis=1)


def audio_error(source: AudioInput, message: str) -> AudioError:
    name = str(source)
    return AudioError(f"{name if name.isprintable() else repr(name)}: {' '.join(message.split())}")


def truncated_error(source: AudioInput, reason: str, decoded_s: float) -> AudioError:
    return audio_error(source, f"is cut off: {reason}, {decoded_s:.1f} s could be decoded. {_ADVICE}")


def decode_error(source: AudioInput, reason: str, decoded_s: float) -> AudioError:
    return audio_error(source, f"cannot be decoded after {decoded_s:.1f} s ({reason}). {_ADVICE}")


@contextmanager
def open_audio(source: AudioInput, start_s: float = 0.0) -> Iterator[AudioDecoder]:
    """Choose the decoder by the first bytes, never by the name, and refuse what the header shows to be wrong.

    Where the decoder can, it begins at `begin_s`; where not, at 0.
    """
    with ExitStack() as closing:
        file = closing.enter_context(_bytes(source))
        magic = file.read(4)
        if not magic:
            raise audio_error(source, "is empty (0 bytes). Copy the file again.")
        recording = _sndfile(source, file, closing, start_s) if magic in (b"RIFF", b"RF64", b"fLaC") else None
        recording = recording or _ffmpeg(source, file, closing)
        _refuse_absurd(source, recording.info.rate_hz, recording.info.channels)
        yield recording


def _bytes(source: AudioInput) -> BinaryIO:
    if isinstance(source, AudioBytes):
        return io.BytesIO(source.data)
    if source.is_dir():
        raise audio_error(source, "is a folder, not a recording. Name a file in it.")
    try:
        return source.open("rb")
    except FileNotFoundError:
        raise audio_error(source, "does not exist. Check the spelling.") from None
    except OSError as refusal:
        raise audio_error(source, f"cannot be opened ({refusal.strerror}). Check who may read it.") from None


def _refuse_absurd(source: AudioInput, rate_hz: int, channels: int) -> None:
    low, high = RATE_RANGE_HZ
    if not (low <= rate_hz <= high and 1 <= channels <= MAX_CHANNELS):
        raise audio_error(
            source,
            f"has an absurd header: {rate_hz} Hz, {channels} channels (a recording has {low} to {high} Hz and "
            f"1 to {MAX_CHANNELS} channels). Export it again.",
        )


def _sndfile(source: AudioInput, file: BinaryIO, closing: ExitStack, begin_s: float) -> AudioDecoder | None:
    """WAV or FLAC; None where FFmpeg should try: another format in RIFF, a strange codec, a header without a length."""
    if wav := headers.read_wav_header(file):
        _refuse_absurd(source, wav.rate_hz, wav.channels)
    try:
        file.seek(0)
        sound = closing.enter_context(soundfile.SoundFile(file if isinstance(source, AudioBytes) else source))
    except soundfile.LibsndfileError:
        return None
    if not 0 < sound.frames < 2**62:
        return None
    have_s = sound.frames / sound.samplerate
    if wav and wav.size_ratio > 1:
        raise truncated_error(source, f"its header promises {have_s * wav.size_ratio:.1f} s", have_s)
    begins = min(round(begin_s * sound.samplerate), sound.frames) if begin_s and sound.seekable() else 0
    info = AudioInfo(have_s, sound.samplerate, sound.channels, sound.format.lower())
    return AudioDecoder(info, lambda pick: _sndfile_pieces(sound, begins, pick), begins)


def _sndfile_pieces(sound: soundfile.SoundFile, begins: int, pick: ChannelMixer) -> Iterator[Samples]:
    frames = max(1, _PIECE // sound.channels)
    try:
        if begins:
            sound.seek(begins)
        while len(piece := sound.read(frames, dtype="float32", always_2d=True)):
            yield pick(piece)
    except soundfile.LibsndfileError as wrong:
        raise DecodingError(wrong.error_string) from None


def _ffmpeg(source: AudioInput, file: BinaryIO, closing: ExitStack) -> AudioDecoder:
    import av

    torn, mp3_frames = headers.is_ogg_truncated(file), headers.read_mp3_frame_count(file)
    # Of FFmpeg's formats some, playlists above all, open other files and addresses: only these, and only this file.
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    file.seek(0)
    what = file if isinstance(source, AudioBytes) else f"file:{source}"
    try:
        container = closing.enter_context(av.open(what, "r", metadata_errors="ignore", options=options))
    except (av.FFmpegError, ValueError) as wrong:
        if torn:
            raise truncated_error(source, _TORN, 0.0) from None
        raise audio_error(source, f"is not audio, or its index is cut off ({_reason(wrong)}). Copy it again.") from None
    if torn:
        raise truncated_error(source, _TORN, (container.duration or 0) / 1e6)
    track = container.streams.audio[0] if container.streams.audio else None
    if track is None or track.codec_context is None:
        what = "has no audio stream" if track is None else "is in a codec that FFmpeg cannot decode"
        raise audio_error(source, f"{what} ({container.format.long_name}). Name a recording with sound.")
    rate_hz, channels = track.codec_context.sample_rate, track.codec_context.channels
    if channels > _PLANES_MAX and track.codec_context.format.is_planar:
        raise audio_error(
            source, f"has {channels} channels in a codec of which {_PLANES_MAX} can be read. Convert it to WAV."
        )
    info = AudioInfo(
        headers.read_duration_s(container, mp3_frames), rate_hz, channels, container.format.name.split(",")[0]
    )
    return AudioDecoder(info, lambda pick: _ffmpeg_pieces(container, rate_hz, pick))


def _ffmpeg_pieces(container: Any, rate_hz: int, pick: ChannelMixer) -> Iterator[Samples]:
    """The first audio stream. A packet that fails is passed over where sound follows it and little is lost in all."""
    import av

    failure, lost_s = "", 0.0
    try:
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except av.FFmpegError as wrong:
                failure = _reason(wrong)
                lost_s += float((packet.duration or 0) * packet.time_base)
                if lost_s > DURATION_TOLERANCE_S:
                    break
                continue
            for frame in frames:
                if frame.sample_rate != rate_hz:
                    raise DecodingError(f"its sample rate changes from {rate_hz} to {frame.sample_rate} Hz")
                if frame.format.is_planar and frame.layout.nb_channels > _PLANES_MAX:
                    raise DecodingError(f"its channels grow to {frame.layout.nb_channels}")
                yield _picked(frame, pick)
            if frames and packet.size:
                failure = ""
    except av.FFmpegError as wrong:
        failure = _reason(wrong)
    if failure:
        raise DecodingError(failure)


def _picked(frame: Any, pick: ChannelMixer) -> Samples:
    """An FFmpeg frame, planar or interleaved, integer or float, as what is picked of its channels, in ±1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        return (pick(values.astype(np.float32) - 128) / 128).astype(np.float32)
    scale = 1 if values.dtype.kind == "f" else 2.0 ** (8 * values.dtype.itemsize - 1)
    return (pick(values.astype(np.float64)) / scale).astype(np.float32)


def _reason(wrong: Exception) -> str:
    return getattr(wrong, "strerror", None) or type(wrong).__name__
