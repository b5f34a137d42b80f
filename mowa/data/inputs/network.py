"""Open a URL (http, rtmp, rtp, srt, …) as a live audio source, decoded by FFmpeg."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mowa.data.audio import timestamps
from mowa.data.audio.mixing import LIVE_HALF_LIFE_S, ChannelMix, stack_mean
from mowa.data.audio.timestamps import Timeline
from mowa.data.inputs.source import AudioChunk, AudioChunks, AudioSource
from mowa.errors import AudioError

log = logging.getLogger("mowa")

TIMEOUT_S = 10.0  # without data
MAX_SILENCE_S = 10.0  # a longer hole in the timestamps is lost audio, which costs no time
URL_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
REALTIME_SCHEMES = frozenset({"rtp", "rtsp", "rtsps", "srt", "udp"})  # these cannot pause

# Playlists and session descriptions may refer to other URLs of these protocols, but not to local files.
_PROTOCOLS = ",".join((*URL_SCHEMES, "crypto", "data", "httpproxy", "srtp", "tls"))


def open_url(url: str) -> AudioSource:
    """Return a source that reads a URL. Raises AudioError if its scheme is not in `URL_SCHEMES`."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    name = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without passwords and keys
    if scheme not in URL_SCHEMES:
        raise AudioError(f"{name}: unsupported URL scheme {scheme!r}. Supported: {', '.join(URL_SCHEMES)}.")

    def open_stream(rate_hz: int) -> AudioChunks:
        return decode_stream(url, name, options={"protocol_whitelist": _PROTOCOLS}, timeout=(TIMEOUT_S, TIMEOUT_S))

    return AudioSource(name, open_stream, pausable=scheme not in REALTIME_SCHEMES, finite=False)


def decode_stream(source: Any, name: str, *, options: dict[str, str] | None = None, **kwargs: Any) -> AudioChunks:
    """Decode a URL or a readable object with PyAV; packets that cannot be decoded are counted as lost.

    Holes in the timestamps are silence (`data.audio.timestamps`), and lost audio beyond `MAX_SILENCE_S`; what else is
    wrong with them is logged at the end.
    `options` are FFmpeg's, `kwargs` those of `av.open`. Raises AudioError if the stream has no audio or breaks off.
    """
    import av

    decoded_s = 0.0
    options = {"analyzeduration": "100000"} | (options or {})  # µs of audio to probe, which delays it; default 5 s
    try:
        with av.open(source, "r", metadata_errors="ignore", options=options, **kwargs) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: has no audio stream ({container.format.long_name})")
            start_s, chained = timestamps.find_start_s(container), container.format.name == "ogg"
            timeline = Timeline(start_s, chained=chained, live=True)
            for chunk in _decode(container, timeline, name):
                decoded_s += chunk.duration_s
                yield chunk
            for warning in timeline.warnings():
                log.warning("%s: %s", name, warning)
    except av.ExitError:
        after = f" after {decoded_s:.1f} s of audio" if decoded_s else ". Is it sending?"
        raise AudioError(f"{name}: no data for {TIMEOUT_S:g} s{after}") from None
    except av.ProtocolNotFoundError:
        raise AudioError(f"{name}: the FFmpeg build in PyAV does not support this protocol") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        problem = f"broke off after {decoded_s:.1f} s of audio" if decoded_s else "cannot be decoded"
        advice = ". Check the URL." if isinstance(source, str) and not decoded_s else ""
        raise AudioError(f"{name}: {problem} ({reason}){advice}") from None


def _decode(container: Any, timeline: Timeline, name: str) -> Iterator[AudioChunk]:
    import av

    lost_s = 0.0
    last_format: tuple[str, str, int] | None = None
    has_timestamps = container.format.name in timestamps.FORMATS_WITH_TIMESTAMPS
    for packet in container.demux(container.streams.audio[0]):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            packet_s = float((packet.duration or 0) * (packet.time_base or 0))
            lost_s += packet_s
            timeline.place(None, packet_s)
            continue
        for frame in frames:
            timestamp_s = frame.time if has_timestamps else None
            hole_s = timeline.place(timestamp_s, frame.samples / frame.sample_rate)
            if hole_s > MAX_SILENCE_S:
                lost_s, hole_s = lost_s + hole_s, 0.0
            for count in timestamps.silence_pieces(hole_s, frame.sample_rate):
                yield AudioChunk(np.zeros(count, np.float32), frame.sample_rate, time.monotonic(), lost_s)
                lost_s = 0.0
            frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
            if frame_format != last_format:
                last_format, converter = frame_format, av.AudioResampler(format="flt")  # keeps channels and rate
                mix = ChannelMix(name, frame.sample_rate, LIVE_HALF_LIFE_S)
            for one in converter.resample(frame):
                channels = one.layout.nb_channels
                values = one.to_ndarray().reshape(-1, channels).astype(np.float64)
                yield AudioChunk(mix.mix(stack_mean(values, channels)), one.sample_rate, time.monotonic(), lost_s)
                lost_s = 0.0
