"""Open a network address (http, rtmp, rtp, srt, …) as a live audio source, decoded by FFmpeg."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mowa.data.audio.decoders import mix_to_mono
from mowa.data.inputs.source import AudioChunk, AudioChunks, AudioSource
from mowa.errors import AudioError

TIMEOUT_S = 10.0  # so long an address may give nothing


URL_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")


REALTIME_SCHEMES = frozenset({"rtp", "rtsp", "rtsps", "srt", "udp"})


_PROTOCOLS = ",".join((*URL_SCHEMES, "crypto", "data", "httpproxy", "srtp", "tls"))


def open_url(url: str) -> AudioSource:
    """Sound from a network, by HTTP, RTP and what else FFmpeg knows. AudioError at once for another kind of address."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    name = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without passwords and keys
    if scheme not in URL_SCHEMES:
        raise AudioError(f"{name}: is no address that sound comes from. Those begin with {', '.join(URL_SCHEMES)}.")

    def pieces(rate_hz: int) -> AudioChunks:
        return decode_stream(url, name, options={"protocol_whitelist": _PROTOCOLS}, timeout=(TIMEOUT_S, TIMEOUT_S))

    return AudioSource(name, pieces, pausable=scheme not in REALTIME_SCHEMES, finite=False)


def decode_stream(source: Any, name: str, *, options: dict[str, str] | None = None, **how: Any) -> AudioChunks:
    """What PyAV makes of an address, or of an object with `read`. Packets that cannot be decoded are lost."""
    import av

    have_s = 0.0
    options = {"analyzeduration": "100000"} | (options or {})  # µs of sound that are kept back; 5 s by default
    try:
        with av.open(source, "r", metadata_errors="ignore", options=options, **how) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: has no sound in it ({container.format.long_name})")
            for piece in _frames(container):
                have_s += piece.duration_s
                yield piece
    except av.ExitError:
        after = f", after {have_s:.1f} s of sound" if have_s else ". Is it sending?"
        raise AudioError(f"{name}: nothing came for {TIMEOUT_S:g} s{after}") from None
    except av.ProtocolNotFoundError:
        raise AudioError(f"{name}: the FFmpeg inside PyAV was built without such addresses") from None
    except (av.FFmpegError, OSError, ValueError) as wrong:
        reason = getattr(wrong, "strerror", None) or " ".join(str(wrong).split())
        broken = f"broke off after {have_s:.1f} s of sound" if have_s else "gives no sound"
        advice = ". Check the address." if isinstance(source, str) and not have_s else ""
        raise AudioError(f"{name}: {broken} ({reason}){advice}") from None


def _frames(container: Any) -> Iterator[AudioChunk]:
    import av

    lost_s = 0.0
    last: tuple[str, str, int] | None = None
    for packet in container.demux(container.streams.audio[0]):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            lost_s += float((packet.duration or 0) * (packet.time_base or 0))
            continue
        for frame in frames:
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            if kind != last:
                last, plain = kind, av.AudioResampler(format="flt")  # channels and rate stay
            for one in plain.resample(frame):
                values = one.to_ndarray().reshape(-1, one.layout.nb_channels).astype(np.float64)
                yield AudioChunk(mix_to_mono(values).astype(np.float32), one.sample_rate, time.monotonic(), lost_s)
                lost_s = 0.0
