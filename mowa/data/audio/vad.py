"""Detect speech, and split long recordings at silences so that no word is cut.

`SileroVAD` runs the ONNX model of Silero VAD (https://github.com/snakers4/silero-vad, MIT) in onnxruntime, without
torch. The model takes 16 kHz; audio of other rates is resampled for it, frame by frame. `split_windows` tiles a stream
with windows: cores that end in silence, each with context on both sides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mowa.data.audio import MIN_SAMPLES, Samples
from mowa.errors import MissingDependency

RATE_HZ = 16_000
FRAME_SAMPLES = 512  # samples per probability at this rate: 32 ms
CONTEXT_SAMPLES = 64  # samples of the previous frame that the network takes again
SILENCE_THRESHOLD = 0.35  # Silero's own segmenter ends speech below this probability (decode.stream has the same)
MIN_TAIL_S = 1.0  # a shorter rest of the recording is added to the last window
RESAMPLE_ZEROS = 16  # zero crossings of the sinc on each side, where audio is resampled for the detector

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a recording to transcribe at once: a core with context around it.

    samples      float32 [n], beginning at sample `start` of the recording
    core_start, core_end  the core [core_start, core_end); the rest is context that other windows transcribe
    is_last      whether the recording ends with this window
    speech_prob  highest speech probability inside the core
    """

    samples: Samples
    start: int
    core_start: int
    core_end: int
    is_last: bool
    speech_prob: float


class SileroVAD:
    """Silero VAD over one stream. Keeps the network's state and the incomplete frame between calls.

    frame_samples  samples per probability: 32 ms

    Raises MissingDependency if the model file of silero-vad is not installed.
    """

    def __init__(self, rate_hz: int = RATE_HZ) -> None:
        import onnxruntime

        self.frame_samples = round(FRAME_SAMPLES * rate_hz / RATE_HZ)
        self._filters = None if rate_hz == RATE_HZ else _resampling_filters(self.frame_samples)
        self._raw = np.zeros(0, np.float32)  # audio at `rate_hz` that the resampler takes again, or for the first time
        if self._filters is not None:
            self._raw = np.zeros(self._filters.shape[1] - self.frame_samples, np.float32)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # frames are too small for threads
        self._net = onnxruntime.InferenceSession(_model_file(), options, providers=["CPUExecutionProvider"])
        self._state = [np.zeros((1, 1, 128), np.float32)] * 2
        self._buffer = np.zeros(CONTEXT_SAMPLES, np.float32)  # context, then the samples of the incomplete frame

    @property
    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """The state as arrays, which can be assigned to another detector."""
        state = {"h": self._state[0], "c": self._state[1], "buffer": self._buffer}
        return state if self._filters is None else state | {"raw": self._raw}

    @state.setter
    def state(self, state: dict[str, npt.NDArray[np.float32]]) -> None:
        self._state, self._buffer = [state["h"], state["c"]], state["buffer"]
        self._raw = state.get("raw", self._raw)

    def feed(self, samples: Samples) -> Probabilities:
        """Return the speech probability of each frame of 32 ms that these samples complete: [n] → [frames].

        How a stream is split into calls changes the probabilities by rounding only.
        """
        buffered = np.concatenate([self._buffer, self._resample(samples)])
        count = (len(buffered) - CONTEXT_SAMPLES) // FRAME_SAMPLES
        if not count:
            self._buffer = buffered
            return np.zeros(0, np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(buffered, CONTEXT_SAMPLES + FRAME_SAMPLES)
        frames = frames[::FRAME_SAMPLES][:count]
        inputs = {"input": np.ascontiguousarray(frames), "h": self._state[0], "c": self._state[1]}
        probabilities, *self._state = self._net.run(None, inputs)
        self._buffer = buffered[count * FRAME_SAMPLES :].copy()
        return np.asarray(probabilities, np.float32)

    def _resample(self, samples: Samples) -> Samples:
        """Return whole frames at 16 kHz."""
        if self._filters is None:
            return samples
        raw, length = np.concatenate([self._raw, samples]), self._filters.shape[1]
        count = max(0, (len(raw) - length) // self.frame_samples + 1)
        self._raw = raw[count * self.frame_samples :].copy()
        if not count:
            return np.zeros(0, np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(raw, length)[:: self.frame_samples][:count]
        return np.asarray((frames @ self._filters.T).ravel(), np.float32)


def _resampling_filters(frame_samples: int) -> npt.NDArray[np.float32]:
    """Return filters [512, n + frame_samples] that interpolate a frame and the n samples before it at 512 points.

    They are sincs with a Kaiser window, which delay by n / 2 samples: 1 to 2 ms. Unlike a resampler, they have no state
    but samples, which live streams can save.
    """
    ratio = max(1.0, frame_samples / FRAME_SAMPLES)
    reach = round(RESAMPLE_ZEROS * ratio)
    points = np.arange(FRAME_SAMPLES) * frame_samples / FRAME_SAMPLES + reach
    distance = points[:, None] - np.arange(frame_samples + 2 * reach)
    shape = np.i0(8.0 * np.sqrt(np.maximum(0.0, 1 - (distance / reach) ** 2)))
    filters = np.sinc(0.95 * distance / ratio) * np.where(np.abs(distance) <= reach, shape, 0.0)
    return np.asarray(filters / filters.sum(axis=1, keepdims=True), np.float32)


def split_windows(
    blocks: Iterable[Samples], rate_hz: int, *, max_window_s: float = 20.0, context_s: float = 2.0, hop: int = 320
) -> Iterator[Window]:
    """Tile a stream of float32 blocks [n] with windows, in order. A stream without samples gives none.

    The cores tile the recording. Each is at most `max_window_s` long (the last one `MIN_TAIL_S` more) and ends in the
    middle of the longest silence in its second half. The context on both sides is `context_s`, at least one hop and one
    receptive field, and shorter only at the ends of the recording. `start`, `core_start` and `core_end` are multiples
    of `hop` (except the end of the recording), so that frame t of a window is frame start/hop + t of the recording.
    Memory: about `max_window_s` + 2 `context_s` of audio and one block.

    Raises ValueError if `max_window_s` < 1.
    """
    if max_window_s < 1:
        raise ValueError(f"max_window_s is {max_window_s}: it must be at least 1 s")
    longest = round(max_window_s * rate_hz) // hop * hop
    context = max(round(context_s * rate_hz), hop + MIN_SAMPLES)
    context += -context % hop
    tail = max(round(MIN_TAIL_S * rate_hz), hop + MIN_SAMPLES)

    buffer = _Buffer(rate_hz)
    core = 0

    def cut(core_end: int, last: bool = False) -> Window:
        start = max(0, core - context)
        samples = buffer.samples(start, min(core_end + context, buffer.end))
        return Window(samples, start, core, core_end, last, float(buffer.speech(core, core_end).max()))

    def cut_all(ahead: int) -> Iterator[Window]:
        """Yield windows while more than the longest core and `ahead` samples are buffered."""
        nonlocal core
        while buffer.end - core > longest + ahead:
            core_end = _quietest(buffer, core + longest // 2, core + longest, hop)
            yield cut(core_end)
            core = core_end
            buffer.forget(core - context)

    for block in blocks:
        buffer.add(block)
        yield from cut_all(max(tail, context))
    buffer.finish()
    yield from cut_all(tail)
    if buffer.end > core:
        yield cut(buffer.end, last=True)


class _Buffer:
    """The part [start, end) of a recording in memory, in samples, with the speech probability of each frame."""

    def __init__(self, rate_hz: int) -> None:
        self.start = self.end = 0
        self._chunks: list[Samples] = []
        self._speech = np.zeros(0, np.float32)
        self._first_frame = 0
        self._detector = SileroVAD(rate_hz)
        self.frame_samples = self._detector.frame_samples

    def add(self, chunk: Samples) -> None:
        self._chunks.append(chunk)
        self.end += len(chunk)
        self._speech = np.concatenate([self._speech, self._detector.feed(chunk)])

    def finish(self) -> None:
        """Complete the last frame with silence."""
        silence = np.zeros(-self.end % self.frame_samples, np.float32)
        self._speech = np.concatenate([self._speech, self._detector.feed(silence)])

    def samples(self, start: int, end: int) -> Samples:
        self._chunks = [np.concatenate(self._chunks)]
        return self._chunks[0][start - self.start : end - self.start].copy()

    def speech(self, start: int, end: int) -> Probabilities:
        """Return the speech probabilities of the frames that overlap [start, end)."""
        first, last = start // self.frame_samples, -(-end // self.frame_samples)
        return self._speech[first - self._first_frame : last - self._first_frame]

    def forget(self, before: int) -> None:
        before = max(before, self.start)
        self._chunks = [self.samples(before, self.end)]
        self.start = before
        self._speech = self._speech[before // self.frame_samples - self._first_frame :]
        self._first_frame = before // self.frame_samples


def _quietest(buffer: _Buffer, start: int, end: int, hop: int) -> int:
    """Return the multiple of `hop` in (start, end] in the middle of the longest silence, or of the quietest frame."""
    speech = buffer.speech(start, end)
    quiet = speech < SILENCE_THRESHOLD
    if not quiet.any():
        quiet = speech == speech.min()
    edges = np.flatnonzero(np.diff(np.r_[0, quiet, 0]))
    runs, run_ends = edges[::2], edges[1::2]
    longest = int(np.argmax(run_ends - runs))
    frame = buffer.frame_samples
    middle = start // frame * frame + int(runs[longest] + run_ends[longest]) * frame // 2
    return min(max(round(middle / hop) * hop, (start // hop + 1) * hop), end)


def _model_file() -> Path:
    package = importlib.util.find_spec("silero_vad")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(folder) / "data" / "silero_vad_16k_sequence.onnx").is_file():
            return file
    raise MissingDependency("the Silero VAD model is not installed. Install it: pip install 'silero-vad>=6.2.3'")
