"""Any recording, as a stream of mono float32 blocks at the rate a model asks for.

A three-hour file never sits in memory: decode → check → resample → cut into equal blocks, piece by piece. Which
decoder reads what is `decoders`' affair. Channels are averaged, or one is heard; a part of a recording is a stream too.

A damaged recording is refused, never half read: what was decoded is held against what the container promised. Those
that promise nothing (MP3 without a Xing header, ADTS AAC, CAF, W64, live WebM, a WAV from a pipe) can be refused only
where they break inside a frame.

This file knows nothing of models, speech or text, and it mends nothing: no repair, trimming, denoising or volume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import soxr

from mowa.data.audio import decoders
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
)

MIN_SAMPLES = 400  # the receptive field of wav2vec2: fewer samples than this give no frame
SILENCE_DBFS = -80.0
AUDIO_SUFFIXES = frozenset(
    {".3gp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".flac", ".m4a", ".mka", ".mkv"}
    | {".mov", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".wav", ".webm", ".wma"}
)

# "fast" is LQ and not QQ: QQ only interpolates, so what lies above the new Nyquist folds back onto speech.
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
    """Yield a recording as 1-D float32 blocks at `rate_hz`, full scale ±1: its channels averaged, or one `channel`.

    Every block but the last is `block_s` long (never under `SAMPLE_MIN` samples). `resample` picks soxr's quality and
    costs nothing when the rates agree. `begin_s` and `length_s` choose a part; what comes after it is not looked at.
    `AudioError` comes before the first block where the header shows the fault, and at the end of the stream where only
    decoding does (a recording cut off or ending inside the part, no samples, under `SAMPLE_MIN` samples).
    """
    source = _named(source)
    length = 0
    with decoders.open_audio(source, offset_s) as recording:
        _refuse_channel(source, recording.info, channel)
        mono = _checked(source, recording, mix_to_mono if channel is None else lambda values: values[:, channel])
        if offset_s or duration_s is not None:
            mono = _part(source, mono, recording, offset_s, duration_s)
        at_rate = _resampled(mono, recording.info.rate_hz, rate_hz, RESAMPLE_QUALITY[resample])
        for block in _blocks(at_rate, max(MIN_SAMPLES, round(block_s * rate_hz))):
            length += len(block)
            if length >= MIN_SAMPLES:
                yield block
    if length < MIN_SAMPLES:
        raise audio_error(
            source,
            f"is too short: {length} samples at {rate_hz} Hz, and {MIN_SAMPLES} are the least that can be heard. "
            "Record longer, or leave it out.",
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
    """A whole recording as one float32 array [samples]. For short ones; see `stream` for the terms and the errors."""
    how = {"channel": channel, "begin_s": offset_s, "length_s": duration_s}
    return np.concatenate(list(stream_audio(source, rate_hz, resample=resample, **how)))  # type: ignore[arg-type]


def probe_audio(source: str | Path | AudioBytes) -> AudioInfo:
    """The header of a recording, undecoded. `AudioError` where `stream` would raise before its first block."""
    with decoders.open_audio(_named(source)) as recording:
        return recording.info


def find_distinct_channels(source: str | Path | AudioBytes, candidates: Sequence[int] | None = None) -> tuple[int, ...]:
    """Those of the channels (all, or `among`) that say something of their own: of twins, to the bit, only the first.

    A recording whose channels differ is read only up to where they do.
    """
    source = _named(source)
    with decoders.open_audio(source) as recording:
        for channel in candidates or ():
            _refuse_channel(source, recording.info, channel)
        channels = sorted(set(range(recording.info.channels) if candidates is None else candidates))
        twins = set(combinations(channels, 2))
        if twins:
            for piece in _checked(source, recording, lambda values: values):
                twins = {(one, other) for one, other in twins if np.array_equal(piece[:, one], piece[:, other])}
                if not twins:
                    break
    return tuple(sorted(set(channels) - {late for _, late in twins}))


def _named(source: str | Path | AudioBytes) -> AudioInput:
    return source if isinstance(source, AudioBytes) else Path(source)


def find_audio_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given, folders replaced by the audio files under them, sorted; each file once, hidden ones left out.

    `AudioError` for a path that does not exist and for a folder without a file in `AUDIO_SUFFIXES`.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise audio_error(path, "does not exist. Check the spelling.")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(
            file for file in path.rglob("[!.]*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
        )
        if not inside:
            raise audio_error(
                path, "holds no audio file. Name a folder with " + ", ".join(sorted(AUDIO_SUFFIXES)) + "."
            )
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


# --- the stations of the stream ---------------------------------------------------------------------------------------


def _refuse_channel(source: AudioInput, info: AudioInfo, channel: int | None) -> None:
    if channel is not None and not 0 <= channel < info.channels:
        there = f"{info.channels} channels, 0 to {info.channels - 1}" if info.channels > 1 else "one channel, 0"
        raise audio_error(source, f"has no channel {channel}: it has {there}. Name one of those.")


def _checked(source: AudioInput, recording: AudioDecoder, pick: ChannelMixer) -> Iterator[Samples]:
    """Pass the pieces on; refuse NaN and infinity where they stand, and at the end what is missing."""
    rate_hz, promised_s = recording.info.rate_hz, recording.info.duration_s
    length, failure = recording.start_frame, ""
    try:
        for piece in recording.chunks(pick):
            if not np.isfinite(piece).all():
                at_s = (length + int(np.argmin(np.isfinite(piece).reshape(len(piece), -1).all(1)))) / rate_hz
                raise audio_error(source, f"holds a sample that is not a number at {at_s:.2f} s. Export it again.")
            length += len(piece)
            yield piece
    except DecodingError as reason:
        failure = str(reason)
    have_s = length / rate_hz
    if promised_s is not None and have_s < promised_s - DURATION_TOLERANCE_S:
        raise truncated_error(source, f"its header promises {promised_s:.1f} s", have_s)
    if failure:
        raise decoders.decode_error(source, failure, have_s)
    if not length:
        raise audio_error(source, "holds no samples. Record it again, or leave it out.")


def _part(
    source: AudioInput, pieces: Iterator[Samples], recording: AudioDecoder, begin_s: float, length_s: float | None
) -> Iterator[Samples]:
    """The samples from `begin_s` on, as many as `length_s` has; refused where the recording ends before them."""
    rate_hz = recording.info.rate_hz
    skip = round(begin_s * rate_hz) - recording.start_frame
    left = None if length_s is None else round(length_s * rate_hz)
    for piece in pieces:
        kept = piece[max(0, skip) : None if left is None else max(0, skip) + left]
        skip -= len(piece)
        if left is not None:
            left -= len(kept)
        if len(kept):
            yield kept
        if left == 0:
            return
    if skip > 0 or (left or 0) > DURATION_TOLERANCE_S * rate_hz:
        asked = f"{begin_s:.1f} s" + ("" if length_s is None else f" to {begin_s + length_s:.1f} s")
        raise audio_error(
            source, f"ends inside the part from {asked} that was asked for. Check where the part should be."
        )


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
