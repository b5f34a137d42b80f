"""Record from a microphone as a live audio source, through PortAudio (the package `sounddevice`).

The microphone is opened at the requested sample rate, or at its own if it rejects that. Audio counts as recorded when
PortAudio delivers it; the latency before that is unknown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from mowa.data.audio.mixing import LIVE_HALF_LIFE_S, ChannelMix, stack_mean
from mowa.data.inputs.source import BLOCK_S, AudioChunk, AudioChunks, AudioSource
from mowa.errors import AudioError, MissingDependency

TIMEOUT_S = 3.0  # a microphone that delivers nothing for this long is considered unplugged


@dataclass(frozen=True, slots=True)
class Microphone:
    """An input device. `rate_hz` is its preferred sample rate, `default` whether it is the system's default."""

    number: int
    name: str
    channels: int
    rate_hz: int
    default: bool


def list_microphones() -> list[Microphone]:
    """Return all input devices. Raises MissingDependency without sounddevice or PortAudio."""
    sounddevice = _import_sounddevice()
    try:
        default, devices = sounddevice.default.device[0], sounddevice.query_devices()
    except sounddevice.PortAudioError as error:
        raise AudioError(f"PortAudio cannot list the microphones ({_error_reason(error)})") from None
    return [
        Microphone(number, one["name"], one["max_input_channels"], round(one["default_samplerate"]), number == default)
        for number, one in enumerate(devices)
        if one["max_input_channels"] > 0
    ]


def open_microphone(device: str | None = None) -> AudioSource:
    """Return a source that records from the default microphone, or from the one with this number or (part of a) name.

    Raises MissingDependency without sounddevice or PortAudio, and AudioError if there is no such microphone. The stream
    raises AudioError if the microphone is in use or unplugged; it does not end otherwise.
    """
    sounddevice = _import_sounddevice()
    microphones = list_microphones()
    if not microphones:
        raise AudioError("no microphone found. Connect one, or pipe audio in: ffmpeg … | mowa listen -")
    if device is not None:
        selected = _select(device, microphones)
    else:
        selected = next((one for one in microphones if one.default), microphones[0])
    return AudioSource(
        f"microphone {selected.name}",
        lambda rate_hz: _record(sounddevice, selected, rate_hz),
        pausable=False,
        finite=False,
    )


def _select(device: str, microphones: list[Microphone]) -> Microphone:
    exact = [one for one in microphones if device in (str(one.number), one.name)]
    matches = exact or [one for one in microphones if device.lower() in one.name.lower()]
    if len(matches) == 1:
        return matches[0]
    problem = f"{len(matches)} microphones match {device!r}" if matches else f"no microphone {device!r}"
    listed = "; ".join(f"{one.number} {one.name}" for one in matches or microphones)
    raise AudioError(f"{problem}. Choose by number: {listed}")


def _record(sounddevice: Any, device: Microphone, rate_hz: int) -> AudioChunks:
    from_hz, channels = _negotiate(sounddevice, device, rate_hz)
    queue: SimpleQueue[AudioChunk | None] = SimpleQueue()  # stays short: its reader never waits for anything else
    mix = ChannelMix(f"microphone {device.name}", from_hz, LIVE_HALF_LIFE_S)
    ended_s = 0.0  # end of the last delivered audio, by the clock of the device

    def callback(sound: np.ndarray, count: int, when: Any, status: Any) -> None:
        nonlocal ended_s
        duration_s = count / from_hz
        lost_s = max(duration_s, when.inputBufferAdcTime - ended_s) if status.input_overflow and ended_s else 0.0
        ended_s = when.inputBufferAdcTime + duration_s
        queue.put(AudioChunk(mix.mix(stack_mean(sound, channels)), from_hz, time.monotonic(), lost_s))

    received_s = 0.0
    try:
        with sounddevice.InputStream(
            samplerate=from_hz,
            blocksize=round(BLOCK_S * from_hz),
            device=device.number,
            channels=channels,
            dtype="float32",
            callback=callback,
            finished_callback=lambda: queue.put(None),
        ):
            while (chunk := queue.get(timeout=TIMEOUT_S)) is not None:
                received_s += len(chunk.samples) / from_hz
                yield chunk
    except Empty:
        pass
    except sounddevice.PortAudioError as error:
        problem = f"broke off after {received_s:.1f} s" if received_s else "cannot be opened; is it in use?"
        raise AudioError(f"microphone {device.name}: {problem} ({_error_reason(error)})") from None
    raise AudioError(f"microphone {device.name}: no more audio after {received_s:.1f} s. Is it unplugged?")


def _negotiate(sounddevice: Any, device: Microphone, rate_hz: int) -> tuple[int, int]:
    """Return a sample rate and a number of channels that the device accepts, preferably `rate_hz` and one."""
    reason = ""
    for channels in (1, min(2, device.channels)):
        for from_hz in (rate_hz, device.rate_hz):
            try:
                sounddevice.check_input_settings(
                    device=device.number, channels=channels, dtype="float32", samplerate=from_hz
                )
            except sounddevice.PortAudioError as error:
                reason = _error_reason(error)
            else:
                return from_hz, channels
    raise AudioError(f"microphone {device.name}: cannot be opened; is it in use? ({reason})")


def _error_reason(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())


def _import_sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError:
        raise MissingDependency("microphones need sounddevice: pip install 'mowa[live]'") from None
    except OSError:  # its wheels contain PortAudio for macOS and Windows only
        raise MissingDependency("microphones need the PortAudio library: apt-get install libportaudio2") from None
    return sounddevice
