"""Read any recording as a stream of mono float32 blocks at the sample rate a model expects.

Decoding, validation, resampling and blocking run chunk by chunk, so that memory does not grow with the recording. The
channels are averaged, or one is selected; an excerpt of a recording can be streamed too.

Damaged recordings raise an error instead of being read in part: the decoded duration is compared with the one that the
container states. Containers that state none (MP3 without a Xing header, ADTS AAC, CAF, W64, live WebM, WAV written to a
pipe) can only be rejected if they end inside a frame. The audio is not trimmed, denoised or changed in volume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
import soxr

from mowa.data.audio import decoders, mixing
from mowa.data.audio.decoders import (
    DURATION_TOLERANCE_S,
    AudioBytes,
    AudioDecoder,
    AudioInfo,
    AudioInput,
    ChannelMixer,
    DecodingError,
    Samples,
    audio_error,
    mix_to_mono,
    truncated_error,
    warn_once,
)
from mowa.data.audio.mixing import ChannelMix, fit_channels, stack_mean
from mowa.types import Preprocessing

MIN_SAMPLES = 400  # receptive field of wav2vec2: fewer samples give no frame
SILENCE_DBFS = -80.0
AUDIO_SUFFIXES = frozenset(
    {".3gp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".flac", ".m4a", ".mka", ".mkv"}
    | {".mov", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".sph", ".wav", ".webm", ".wma"}
)

# "fast" is LQ, not QQ: QQ only interpolates, which aliases what lies above the new Nyquist frequency onto speech.
RESAMPLE_QUALITY = {"best": "VHQ", "fast": "LQ"}


def stream_audio(
    source: str | Path | AudioBytes,
    rate_hz: int = 16_000,
    *,
    resample: Literal["best", "fast"] = "best",
    block_s: float = 10.0,
    channel: int | None = None,
    offset_s: float = 0.0,
    duration_s: float | None = None,
) -> Iterator[Samples]:
    """Yield a recording as float32 blocks [n] at `rate_hz`, full scale ±1.

    resample    quality of soxr's resampler; unused if the rates are equal
    block_s     length of every block but the last, at least `MIN_SAMPLES` samples
    channel     channel to read; None averages all channels
    offset_s, duration_s  excerpt to read; what follows it is not decoded

    Raises AudioError before the first block if the header shows that the recording cannot be read, and at the end if
    only decoding shows it: the recording is cut off, ends inside the excerpt, or has fewer than `MIN_SAMPLES` samples.
    """
    source = _to_input(source)
    length = 0
    with decoders.open_audio(source, offset_s) as decoder:
        _validate_channel(source, decoder.info, channel)
        mono = _decode(source, decoder, _channel_mixer(decoder.info.channels, channel))
        if offset_s or duration_s is not None:
            mono = _excerpt(source, mono, decoder, offset_s, duration_s)
        if channel is None and decoder.info.channels > 1:
            size = mixing.block_size(decoder.info.rate_hz, decoder.info.channels)
            mono = map(ChannelMix(source, decoder.info.rate_hz).mix, _rechunk(mono, size))
        resampled = _resample(mono, decoder.info.rate_hz, rate_hz, RESAMPLE_QUALITY[resample])
        for block in _rechunk(resampled, max(MIN_SAMPLES, round(block_s * rate_hz))):
            length += len(block)
            if length >= MIN_SAMPLES:
                yield block
        for warning in decoder.timeline.warnings() if decoder.timeline else ():
            warn_once(source, warning + ".")
    if length < MIN_SAMPLES:
        raise audio_error(
            source,
            f"is too short: {length} samples at {rate_hz} Hz; at least {MIN_SAMPLES} are needed. Leave it out.",
        )


def load_audio(
    source: str | Path | AudioBytes,
    rate_hz: int = 16_000,
    *,
    resample: Literal["best", "fast"] = "best",
    channel: int | None = None,
    offset_s: float = 0.0,
    duration_s: float | None = None,
) -> Samples:
    """Return a whole, short recording as float32 [n]. Arguments and errors are those of `stream_audio`."""
    blocks = stream_audio(source, rate_hz, resample=resample, channel=channel, offset_s=offset_s, duration_s=duration_s)
    return np.concatenate(list(blocks))


def probe_audio(source: str | Path | AudioBytes) -> AudioInfo:
    """Read the header of a recording. Raises AudioError where `stream_audio` would before its first block."""
    with decoders.open_audio(_to_input(source)) as decoder:
        return decoder.info


def find_distinct_channels(source: str | Path | AudioBytes, candidates: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the channels (of all, or of `candidates`) without those that equal an earlier one, or its inverse.

    A recording is decoded only until all its channels differ.
    """
    source = _to_input(source)
    with decoders.open_audio(source) as decoder:
        for channel in candidates or ():
            _validate_channel(source, decoder.info, channel)
        channels = sorted(set(range(decoder.info.channels) if candidates is None else candidates))
        equal = {(one, other, sign) for one, other in combinations(channels, 2) for sign in (1, -1)}
        if equal:
            for chunk in _decode(source, decoder, partial(fit_channels, channels=decoder.info.channels)):
                equal = {
                    (one, other, sign)
                    for one, other, sign in equal
                    if np.array_equal(chunk[:, one], sign * chunk[:, other])
                }
                if not equal:
                    break
    return tuple(sorted(set(channels) - {later for _, later, _ in equal}))


def is_audio_file(path: str | PurePath) -> bool:
    """Return whether the suffix of `path` is in `AUDIO_SUFFIXES`; the file is not opened."""
    return PurePath(path).suffix.lower() in AUDIO_SUFFIXES


def find_audio_files(paths: Iterable[str | Path]) -> list[Path]:
    """Replace folders by the audio files under them, sorted, without hidden ones; other paths stay as they are.

    Each file is listed once. Raises AudioError for a path that does not exist and a folder without audio files.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise audio_error(path, "does not exist. Check the spelling.")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("[!.]*") if is_audio_file(file) and file.is_file())
        if not inside:
            suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
            raise audio_error(path, f"holds no audio file. Supported suffixes: {suffixes}.")
        found += inside
    return list(dict.fromkeys(found))


def normalize(samples: Samples) -> Samples:
    """Scale float32 [n] to zero mean and unit variance: (x - mean) / sqrt(var + 1e-7).

    Equal bit for bit to transformers' `Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm` for one recording.
    """
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)


def preprocess(samples: Samples, preprocessing: Preprocessing) -> Samples:
    """Return float32 [n] as the model takes it: normalized if `preprocessing` says so."""
    return normalize(samples) if preprocessing.normalize else samples


def is_silent(samples: Samples) -> bool:
    """Return whether the RMS around the mean is below `SILENCE_DBFS`. No samples are silent."""
    return samples.size == 0 or float(samples.std(dtype=np.float64)) < 10 ** (SILENCE_DBFS / 20)


# --- stages of the stream ---------------------------------------------------------------------------------------------


def _to_input(source: str | Path | AudioBytes) -> AudioInput:
    return source if isinstance(source, AudioBytes) else Path(source)


def _validate_channel(source: AudioInput, info: AudioInfo, channel: int | None) -> None:
    if channel is not None and not 0 <= channel < info.channels:
        available = f"{info.channels} channels, 0 to {info.channels - 1}" if info.channels > 1 else "one channel, 0"
        raise audio_error(source, f"has no channel {channel}: it has {available}. Choose one of those.")


def _channel_mixer(channels: int, channel: int | None) -> ChannelMixer:
    if channel is not None:
        return lambda values: fit_channels(values, channels)[:, channel]
    return mix_to_mono if channels == 1 else partial(stack_mean, channels=channels)


def _decode(source: AudioInput, decoder: AudioDecoder, mixer: ChannelMixer) -> Iterator[Samples]:
    """Yield the decoded chunks. Raises AudioError at a NaN or infinity, and at the end if audio is missing."""
    rate_hz, stated_s = decoder.info.rate_hz, decoder.info.duration_s
    length, failure = decoder.start_frame, ""
    try:
        for chunk in decoder.chunks(mixer):
            if not np.isfinite(chunk).all():
                at_s = (length + int(np.argmin(np.isfinite(chunk).reshape(len(chunk), -1).all(1)))) / rate_hz
                raise audio_error(source, f"holds a sample that is not a number at {at_s:.2f} s. Export it again.")
            length += len(chunk)
            yield chunk
    except DecodingError as error:
        failure = str(error)
    decoded_s = length / rate_hz + (decoder.timeline.ignored_s if decoder.timeline else 0.0)
    if stated_s is not None and decoded_s < stated_s - DURATION_TOLERANCE_S:
        raise truncated_error(source, f"its header promises {stated_s:.1f} s", decoded_s)
    if failure:
        raise decoders.decode_error(source, failure, decoded_s)
    if not length:
        raise audio_error(source, "holds no samples. Record it again, or leave it out.")


def _excerpt(
    source: AudioInput, chunks: Iterator[Samples], decoder: AudioDecoder, offset_s: float, duration_s: float | None
) -> Iterator[Samples]:
    """Yield the samples of the excerpt. Raises AudioError if the recording ends inside it."""
    rate_hz = decoder.info.rate_hz
    skip = round(offset_s * rate_hz) - decoder.start_frame
    left = None if duration_s is None else round(duration_s * rate_hz)
    for chunk in chunks:
        kept = chunk[max(0, skip) : None if left is None else max(0, skip) + left]
        skip -= len(chunk)
        if left is not None:
            left -= len(kept)
        if len(kept):
            yield kept
        if left == 0:
            return
    if skip > 0 or (left or 0) > DURATION_TOLERANCE_S * rate_hz:
        excerpt = f"from {offset_s:.1f} s" + ("" if duration_s is None else f" to {offset_s + duration_s:.1f} s")
        raise audio_error(source, f"ends inside the excerpt {excerpt}. Check the offset and the duration.")


def _resample(chunks: Iterator[Samples], from_hz: int, to_hz: int, quality: str) -> Iterator[Samples]:
    if from_hz == to_hz:
        yield from chunks
        return
    resampler = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality=quality)
    for chunk in chunks:
        yield resampler.resample_chunk(chunk)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _rechunk(chunks: Iterator[Samples], size: int) -> Iterator[Samples]:
    """Yield the same samples in blocks of exactly `size`; the last may be shorter, but is not empty."""
    buffer: list[Samples] = []
    count = 0
    for chunk in chunks:
        buffer.append(chunk)
        count += len(chunk)
        if count < size:
            continue
        joined = np.concatenate(buffer)
        whole = count - count % size
        yield from joined[:whole].reshape(-1, size, *joined.shape[1:])
        buffer, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(buffer)
