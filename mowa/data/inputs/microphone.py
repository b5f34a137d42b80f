"""Microphones as sources of live sound, through PortAudio (the package `sounddevice`).

It asks a microphone for the rate that is wanted, and takes its own where it refuses. What it cannot know is how long
the sound was on its way to us: a piece counts as recorded when PortAudio hands it over.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from mowa.data.inputs.source import BLOCK_S, AudioChunk, AudioChunks, AudioSource
from mowa.errors import AudioError, MissingDependency

TIMEOUT_S = 3.0  # a microphone that gives nothing for so long is gone


@dataclass(frozen=True, slots=True)
class Microphone:
    """A microphone: its number and name, channels, the rate that it prefers, whether it is the one that is taken."""

    number: int
    name: str
    channels: int
    rate_hz: int
    default: bool


def list_microphones() -> list[Microphone]:
    """Every microphone here. MissingPart without sounddevice or PortAudio."""
    sounddevice = _sounddevice()
    try:
        chosen, there = sounddevice.default.device[0], sounddevice.query_devices()
    except sounddevice.PortAudioError as wrong:
        raise AudioError(f"PortAudio cannot list the microphones ({_reason(wrong)})") from None
    return [
        Microphone(number, one["name"], one["max_input_channels"], round(one["default_samplerate"]), number == chosen)
        for number, one in enumerate(there)
        if one["max_input_channels"] > 0
    ]


def open_microphone(device: str | None = None) -> AudioSource:
    """The microphone of this number or name (a part of it will do), or the default one. It never ends by itself.

    At once: MissingPart without sounddevice or PortAudio, AudioError where there is no such microphone. Later:
    AudioError where it is taken by another program, or unplugged.
    """
    sounddevice = _sounddevice()
    there = list_microphones()
    if not there:
        raise AudioError("there is no microphone here. Plug one in, or pipe sound in: ffmpeg … | mowa listen -")
    found = _named(device, there) if device is not None else next((one for one in there if one.default), there[0])
    return AudioSource(
        f"microphone {found.name}",
        lambda rate_hz: _recorded(sounddevice, found, rate_hz),
        pausable=False,
        finite=False,
    )


def _named(device: str, there: list[Microphone]) -> Microphone:
    exact = [one for one in there if device in (str(one.number), one.name)]
    like = exact or [one for one in there if device.lower() in one.name.lower()]
    if len(like) == 1:
        return like[0]
    what = f"{len(like)} microphones are called {device!r}" if like else f"there is no microphone {device!r}"
    listed = "; ".join(f"{one.number} {one.name}" for one in like or there)
    raise AudioError(f"{what}: choose by number among {listed}")


def _recorded(sounddevice: Any, device: Microphone, rate_hz: int) -> AudioChunks:
    from_hz, channels = _accepted(sounddevice, device, rate_hz)
    came: SimpleQueue[AudioChunk | None] = SimpleQueue()  # never long: its reader waits for nobody
    ended_s = 0.0  # when, by the clock of the device, what was handed over last ended

    def take(sound: np.ndarray, count: int, when: Any, status: Any) -> None:
        nonlocal ended_s
        length_s = count / from_hz
        lost_s = max(length_s, when.inputBufferAdcTime - ended_s) if status.input_overflow and ended_s else 0.0
        ended_s = when.inputBufferAdcTime + length_s
        came.put(AudioChunk(sound.mean(axis=1), from_hz, time.monotonic(), lost_s))

    heard_s = 0.0
    try:
        with sounddevice.InputStream(
            samplerate=from_hz,
            blocksize=round(BLOCK_S * from_hz),
            device=device.number,
            channels=channels,
            dtype="float32",
            callback=take,
            finished_callback=lambda: came.put(None),
        ):
            while (piece := came.get(timeout=TIMEOUT_S)) is not None:
                heard_s += len(piece.samples) / from_hz
                yield piece
    except Empty:
        pass
    except sounddevice.PortAudioError as wrong:
        what = f"broke off after {heard_s:.1f} s" if heard_s else "cannot be opened; is another program using it?"
        raise AudioError(f"microphone {device.name}: {what} ({_reason(wrong)})") from None
    raise AudioError(f"microphone {device.name}: gives no sound any more after {heard_s:.1f} s. Is it plugged in?")


def _accepted(sounddevice: Any, device: Microphone, rate_hz: int) -> tuple[int, int]:
    """A rate and a number of channels that the device takes, at best what is wanted."""
    reason = ""
    for channels in (1, min(2, device.channels)):
        for from_hz in (rate_hz, device.rate_hz):
            try:
                sounddevice.check_input_settings(
                    device=device.number, channels=channels, dtype="float32", samplerate=from_hz
                )
            except sounddevice.PortAudioError as wrong:
                reason = _reason(wrong)
            else:
                return from_hz, channels
    raise AudioError(f"microphone {device.name}: cannot be opened; is another program using it? ({reason})")


def _reason(wrong: Exception) -> str:
    return " ".join(str(wrong.args[0] if wrong.args else wrong).split())


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError:
        raise MissingDependency("microphones need sounddevice: pip install 'mowa[live]'") from None
    except OSError:  # its wheels hold PortAudio for macOS and Windows alone
        raise MissingDependency("microphones need the library PortAudio: apt-get install libportaudio2") from None
    return sounddevice
