"""Read recordings of any format and rate as mono float32, and find speech in them.

Start with `reader` (`load_audio`, `stream_audio`, `probe_audio`), which this package re-exports; `decoders` picks
libsndfile or FFmpeg, `headers` checks how long a file claims to be, `vad` finds speech and splits long recordings at
silences, `running_norm` normalizes live audio, `augment` degrades training audio.
"""

from mowa.data.audio.decoders import AudioBytes, AudioInfo, Samples
from mowa.data.audio.reader import (
    AUDIO_SUFFIXES,
    MIN_SAMPLES,
    SILENCE_DBFS,
    find_audio_files,
    find_distinct_channels,
    is_silent,
    load_audio,
    normalize,
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
    "is_silent",
    "load_audio",
    "normalize",
    "probe_audio",
    "stream_audio",
]
