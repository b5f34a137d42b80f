"""Any recording, as a stream of mono float32 blocks at the rate a model asks for.

A three-hour file never sits in memory: decode → check → resample → cut into equal blocks, piece by piece. Two decoders
share the work. libsndfile reads WAV and FLAC; FFmpeg (through PyAV) reads everything else, and what libsndfile refuses.
MP3 and Ogg are FFmpeg's because libsndfile guesses the length of an MP3 without a Xing header and stops at its guess,
and reads only the first of several chained Ogg streams: both end early without a word.

A damaged recording is refused, never half read: what was decoded is held against what the container promised. Those
that promise nothing (MP3 without a Xing header, ADTS AAC, CAF, W64, live WebM, a WAV from a pipe) can be refused only
where they break inside a frame.

This file knows nothing of models, speech or text, and it mends nothing: no repair, trimming, denoising or volume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from mowa.data import containers
from mowa.errors import AudioError

Samples = npt.NDArray[np.float32]

SAMPLE_MIN = 400  # the receptive field of wav2vec2: fewer samples than this give no frame
SILENCE_DBFS = -80.0
RATE_RANGE_HZ = (100, 768_000)
CHANNELS_MAX = 1024
AUDIO_SUFFIXES = frozenset(
    {".3gp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".flac", ".m4a", ".mka", ".mkv"}
    | {".mov", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".wav", ".webm", ".wma"}
)

# "fast" is LQ and not QQ: QQ only interpolates, so what lies above the new Nyquist folds back onto speech.
QUALITY = {"best": "VHQ", "fast": "LQ"}

_PIECE = 2**13  # values decoded at once, over all channels; what a failing decoder loses of the seconds it reports
_SLACK_S = 0.25  # encoder delay and padding: a lossy file may hold this much less than its header counts
_FORMATS = "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,avi,caf,flac,matroska,mov,mp3,mpeg,mpegts,ogg,w64,wav"
_PLANES_MAX = 8  # PyAV 18 reads memory that is not its own where each of more channels has its own plane
_TORN = "its last page does not end the stream"
_ADVICE = "Copy the file again, or cut it with ffmpeg."


@dataclass(frozen=True, slots=True)
class Info:
    """What the header says. `duration_s` is None where the container does not say; `format` is the container's name."""

    duration_s: float | None
    rate_hz: int
    channels: int
    format: str


@dataclass(frozen=True, slots=True)
class _Recording:
    """An opened file: its header, and its sound as mono pieces of any length at `info.rate_hz`."""

    info: Info
    pieces: Iterator[Samples]


class _DecodingError(Exception):
    """The decoder gave up here; how bad that is depends on what the container promised."""


def stream(
    path: str | Path,
    rate_hz: int = 16_000,
    *,
    resample: Literal["best", "fast"] = "best",
    block_s: float = 10.0,
) -> Iterator[Samples]:
    """Yield a recording as 1-D float32 blocks, channels averaged, at `rate_hz`; full scale is ±1.

    Every block but the last is `block_s` long (never under `SAMPLE_MIN` samples). `resample` picks soxr's quality and
    costs nothing when the rates agree. `AudioError` comes before the first block where the header shows the fault, and
    at the end of the stream where only decoding does (a recording cut off, no samples, under `SAMPLE_MIN` samples).
    """
    path = Path(path)
    length = 0
    with _open(path) as recording:
        mono = _checked(path, recording)
        at_rate = _resampled(mono, recording.info.rate_hz, rate_hz, QUALITY[resample])
        for block in _blocks(at_rate, max(SAMPLE_MIN, round(block_s * rate_hz))):
            length += len(block)
            if length >= SAMPLE_MIN:
                yield block
    if length < SAMPLE_MIN:
        raise _error(
            path,
            f"is too short: {length} samples at {rate_hz} Hz, and {SAMPLE_MIN} are the least that can be heard. "
            "Record longer, or leave it out.",
        )


def load(path: str | Path, rate_hz: int = 16_000, *, resample: Literal["best", "fast"] = "best") -> Samples:
    """A whole recording as one float32 array [samples]. For short ones; see `stream` for the terms and the errors."""
    return np.concatenate(list(stream(path, rate_hz, resample=resample)))


def probe(path: str | Path) -> Info:
    """The header of a recording, undecoded. `AudioError` where `stream` would raise before its first block."""
    with _open(Path(path)) as recording:
        return recording.info


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given, folders replaced by the audio files under them, sorted; each file once, hidden ones left out.

    `AudioError` for a path that does not exist and for a folder without a file in `AUDIO_SUFFIXES`.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise _error(path, "does not exist. Check the spelling.")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(
            file for file in path.rglob("[!.]*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
        )
        if not inside:
            raise _error(path, "holds no audio file. Name a folder with " + ", ".join(sorted(AUDIO_SUFFIXES)) + ".")
        found += inside
    return list(dict.fromkeys(found))


def normalize(samples: Samples) -> Samples:
    """Zero mean, unit variance: (x - mean) / sqrt(var + 1e-7), float32 [samples] in and out.

    Bit for bit what transformers' `Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm` gives for one recording.
    """
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)


def is_silent(samples: Samples) -> bool:
    """Whether the RMS around the mean is below `SILENCE_DBFS` (full scale is 1). No samples are silent."""
    return samples.size == 0 or float(samples.std(dtype=np.float64)) < 10 ** (SILENCE_DBFS / 20)


def _error(path: Path, message: str) -> AudioError:
    name = str(path)
    return AudioError(f"{name if name.isprintable() else repr(name)}: {' '.join(message.split())}")


def _cut_off(path: Path, why: str, have_s: float) -> AudioError:
    return _error(path, f"is cut off: {why}, {have_s:.1f} s could be decoded. {_ADVICE}")


# --- the stations of the stream ---------------------------------------------------------------------------------------


def _checked(path: Path, recording: _Recording) -> Iterator[Samples]:
    """Pass the pieces on; refuse NaN and infinity where they stand, and at the end what is missing."""
    rate_hz, promised_s = recording.info.rate_hz, recording.info.duration_s
    length, failure = 0, ""
    try:
        for piece in recording.pieces:
            if not np.isfinite(piece).all():
                at_s = (length + int(np.argmin(np.isfinite(piece)))) / rate_hz
                raise _error(path, f"holds a sample that is not a number at {at_s:.2f} s. Export it again.")
            length += len(piece)
            yield piece
    except _DecodingError as reason:
        failure = str(reason)
    have_s = length / rate_hz
    if promised_s is not None and have_s < promised_s - _SLACK_S:
        raise _cut_off(path, f"its header promises {promised_s:.1f} s", have_s)
    if failure:
        raise _error(path, f"cannot be decoded after {have_s:.1f} s ({failure}). {_ADVICE}")
    if not length:
        raise _error(path, "holds no samples. Record it again, or leave it out.")


def _resampled(pieces: Iterator[Samples], from_hz: int, to_hz: int, quality: str) -> Iterator[Samples]:
    if from_hz == to_hz:
        yield from pieces
        return
    resampler = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality=quality)
    for piece in pieces:
        yield resampler.resample_chunk(piece)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _blocks(pieces: Iterator[Samples], size: int) -> Iterator[Samples]:
    """The same samples in blocks of exactly `size`; the last may be shorter, and is never empty."""
    held: list[Samples] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count < size:
            continue
        joined = np.concatenate(held)
        whole = count - count % size
        yield from joined[:whole].reshape(-1, size)
        held, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(held)


# --- opening ----------------------------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[_Recording]:
    """Choose the decoder by the first bytes, never by the name, and refuse what the header shows to be wrong."""
    if path.is_dir():
        raise _error(path, "is a folder, not a recording. Name a file in it.")
    with ExitStack() as closing:
        try:
            file = closing.enter_context(path.open("rb"))
        except FileNotFoundError:
            raise _error(path, "does not exist. Check the spelling.") from None
        except OSError as refusal:
            raise _error(path, f"cannot be opened ({refusal.strerror}). Check who may read it.") from None
        magic = file.read(4)
        if not magic:
            raise _error(path, "is empty (0 bytes). Copy the file again.")
        recording = _open_sndfile(path, file, closing) if magic in (b"RIFF", b"RF64", b"fLaC") else None
        recording = recording or _open_ffmpeg(path, file, closing)
        _refuse_absurd(path, recording.info.rate_hz, recording.info.channels)
        yield recording


def _refuse_absurd(path: Path, rate_hz: int, channels: int) -> None:
    low, high = RATE_RANGE_HZ
    if not (low <= rate_hz <= high and 1 <= channels <= CHANNELS_MAX):
        raise _error(
            path,
            f"has an absurd header: {rate_hz} Hz, {channels} channels (a recording has {low} to {high} Hz and "
            f"1 to {CHANNELS_MAX} channels). Export it again.",
        )


def _open_sndfile(path: Path, file: BinaryIO, closing: ExitStack) -> _Recording | None:
    """WAV or FLAC; None where FFmpeg should try: another format in RIFF, a strange codec, a header without a length."""
    if wav := containers.wav_header(file):
        _refuse_absurd(path, wav.rate_hz, wav.channels)
    try:
        sound = closing.enter_context(soundfile.SoundFile(path))
    except soundfile.LibsndfileError:
        return None
    if not 0 < sound.frames < 2**62:
        return None
    have_s = sound.frames / sound.samplerate
    if wav and wav.claim > 1:
        raise _cut_off(path, f"its header promises {have_s * wav.claim:.1f} s", have_s)
    return _Recording(Info(have_s, sound.samplerate, sound.channels, sound.format.lower()), _sndfile_pieces(sound))


def _sndfile_pieces(sound: soundfile.SoundFile) -> Iterator[Samples]:
    frames = max(1, _PIECE // sound.channels)
    try:
        while len(piece := sound.read(frames, dtype="float32", always_2d=True)):
            yield piece.mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise _DecodingError(error.error_string) from None


def _open_ffmpeg(path: Path, file: BinaryIO, closing: ExitStack) -> _Recording:
    import av

    torn, mp3_frames = containers.ogg_is_open_ended(file), containers.mp3_frames(file)
    # Of FFmpeg's formats some, playlists above all, open other files and addresses: only these, and only this file.
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    try:
        container = closing.enter_context(av.open(f"file:{path}", "r", metadata_errors="ignore", options=options))
    except (av.FFmpegError, ValueError) as error:
        if torn:
            raise _cut_off(path, _TORN, 0.0) from None
        raise _error(path, f"is not audio, or its index is cut off ({_reason(error)}). Copy it again.") from None
    if torn:
        raise _cut_off(path, _TORN, (container.duration or 0) / 1e6)
    track = container.streams.audio[0] if container.streams.audio else None
    if track is None or track.codec_context is None:
        what = "has no audio stream" if track is None else "is in a codec that FFmpeg cannot decode"
        raise _error(path, f"{what} ({container.format.long_name}). Name a recording with sound.")
    rate_hz, channels = track.codec_context.sample_rate, track.codec_context.channels
    if channels > _PLANES_MAX and track.codec_context.format.is_planar:
        raise _error(path, f"has {channels} channels in a codec of which {_PLANES_MAX} can be read. Convert it to WAV.")
    info = Info(containers.stated_s(container, mp3_frames), rate_hz, channels, container.format.name.split(",")[0])
    return _Recording(info, _ffmpeg_pieces(container, rate_hz))


def _ffmpeg_pieces(container: Any, rate_hz: int) -> Iterator[Samples]:
    """The first audio stream. A packet that fails is passed over where sound follows it and little is lost in all."""
    import av

    failure, lost_s = "", 0.0
    try:
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                failure = _reason(error)
                lost_s += float((packet.duration or 0) * packet.time_base)
                if lost_s > _SLACK_S:
                    break
                continue
            for frame in frames:
                if frame.sample_rate != rate_hz:
                    raise _DecodingError(f"its sample rate changes from {rate_hz} to {frame.sample_rate} Hz")
                if frame.format.is_planar and frame.layout.nb_channels > _PLANES_MAX:
                    raise _DecodingError(f"its channels grow to {frame.layout.nb_channels}")
                yield _mono(frame)
            if frames and packet.size:
                failure = ""
    except av.FFmpegError as error:
        failure = _reason(error)
    if failure:
        raise _DecodingError(failure)


def _mono(frame: Any) -> Samples:
    """An FFmpeg frame, planar or interleaved, integer or float, as the average of its channels in ±1."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        values = values.astype(np.float32) - 128
        return (values.mean(axis=0) / 128).astype(np.float32)
    scale = 1 if values.dtype.kind == "f" else 2.0 ** (8 * values.dtype.itemsize - 1)
    return (values.mean(axis=0, dtype=np.float64) / scale).astype(np.float32)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
