"""Read recordings of any format and sample rate as mono float32, detect speech in them, and augment them.

Start with `reader` (`load_audio`, `stream_audio`, `probe_audio`), which this package re-exports; `decoders` chooses
between libsndfile and FFmpeg, `headers` reads the durations that containers state, `vad` detects speech and splits long
recordings at silences, `running_norm` normalizes live audio, `augment` degrades training audio.
"""

from mowa.data.audio.decoders import AudioBytes, AudioInfo, Samples
from mowa.data.audio.reader import (
    AUDIO_SUFFIXES,
    MIN_SAMPLES,
    SILENCE_DBFS,
    find_audio_files,
    find_distinct_channels,
    is_audio_file,
    is_silent,
    load_audio,
    normalize,
    preprocess,
    probe_audio,
    stream_audio,
)

__all__ = [
    "AUDIO_SUFFIXES",
    "MIN_SAMPLES",
    "SILENCE_DBFS",
    "AudioBytes",
    "AudioInfo",
    "Samples",
    "find_audio_files",
    "find_distinct_channels",
    "is_audio_file",
    "is_silent",
    "load_audio",
    "normalize",
    "preprocess",
    "probe_audio",
    "stream_audio",
]
