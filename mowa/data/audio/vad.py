"""Where people speak, and where a long recording may be cut so that no word is.

Speech is found by Silero VAD (github.com/snakers4/silero-vad, MIT), its ONNX for whole sequences run by onnxruntime
without torch. `windows` tiles a stream with cores that end in silence, each with sound around it for the model to see
past its edges.

This file knows nothing of files, models or text: it takes samples and gives probabilities and cuts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mowa.data.audio import MIN_SAMPLES, Samples
from mowa.errors import AudioError, MissingDependency

RATE_HZ = 16_000
FRAME_SAMPLES = 512  # samples per probability: 32 ms
CONTEXT_SAMPLES = 64  # samples of the block before that the network sees again
SILENCE_THRESHOLD = 0.35  # below this Silero's own segmenter lets a stretch of speech end
MIN_TAIL_S = 1.0  # less than this after a cut is no window of its own

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a recording to decode at once.

    `samples` float32 [n] begins at sample `start` of the recording. What belongs to this window alone is the core, from
    `core_start` to before `core_end`; around it lies context that the neighbours decode. `speech` is the highest
    probability of speech inside the core, and `last` says that the recording ends with it.
    """

    samples: Samples
    start: int
    core_start: int
    core_end: int
    is_last: bool
    speech_prob: float


class SileroVAD:
    """Silero VAD over one 16 kHz stream. It keeps the network's state and the unfinished block between calls.

    `MissingPart` where silero-vad's model file is not installed.
    """

    def __init__(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # blocks are tiny: threads only cost
        self._net = onnxruntime.InferenceSession(_model_file(), options, providers=["CPUExecutionProvider"])
        self._state = [np.zeros((1, 1, 128), np.float32)] * 2
        self._buffer = np.zeros(CONTEXT_SAMPLES, np.float32)  # context, then the samples that do not fill a block yet

    @property
    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """All that it remembers, which another detector may be given."""
        return {"h": self._state[0], "c": self._state[1], "heard": self._buffer}

    @state.setter
    def state(self, state: dict[str, npt.NDArray[np.float32]]) -> None:
        self._state, self._buffer = [state["h"], state["c"]], state["heard"]

    def feed(self, samples: Samples) -> Probabilities:
        """The probability of speech in each block that these samples fill: float32 [blocks], in order, of 32 ms each.

        However a stream is split between calls, the same blocks get the same probabilities, up to rounding.
        """
        heard = np.concatenate([self._buffer, samples])
        count = (len(heard) - CONTEXT_SAMPLES) // FRAME_SAMPLES
        if not count:
            self._buffer = heard
            return np.zeros(0, np.float32)
        blocks = np.lib.stride_tricks.sliding_window_view(heard, CONTEXT_SAMPLES + FRAME_SAMPLES)[::FRAME_SAMPLES][
            :count
        ]
        inputs = {"input": np.ascontiguousarray(blocks), "h": self._state[0], "c": self._state[1]}
        speech, *self._state = self._net.run(None, inputs)
        self._buffer = heard[count * FRAME_SAMPLES :].copy()
        return np.asarray(speech, np.float32)


def split_windows(
    blocks: Iterable[Samples], rate_hz: int, *, max_window_s: float = 20.0, context_s: float = 2.0, hop: int = 320
) -> Iterator[Window]:
    """Tile a stream of 1-D float32 blocks with windows, in order; none for a stream without samples.

    Cores lie end to end from sample 0 to the last one. Each is at most `longest_s` long (the last one `TAIL_S` more)
    and ends in the middle of the longest silence among the last half of that. Context is `context_s` on both sides,
    never under one hop and one receptive field, and less only where the recording ends. `start`, `core_start` and
    `core_end` are multiples of `hop` (but for the end of the recording): frame t of a window is frame start/hop + t of
    the recording. Holds about `longest_s` + 2 `context_s` and one block in memory, however long the stream.

    `AudioError` unless `rate_hz` is 16000, the rate Silero VAD hears at; `ValueError` for `longest_s` under 1.
    """
    if rate_hz != RATE_HZ:
        raise AudioError(
            f"speech is found at {RATE_HZ} Hz, and this stream is {rate_hz} Hz. Stream it at {RATE_HZ} Hz."
        )
    if max_window_s < 1:
        raise ValueError(f"longest_s is {max_window_s}: a window holds 1 s or more")
    longest = round(max_window_s * rate_hz) // hop * hop
    context = max(round(context_s * rate_hz), hop + MIN_SAMPLES)
    context += -context % hop
    tail = max(round(MIN_TAIL_S * rate_hz), hop + MIN_SAMPLES)

    tape = _Tape()
    core = 0

    def cut(core_end: int, last: bool = False) -> Window:
        start = max(0, core - context)
        samples = tape.samples(start, min(core_end + context, tape.end))
        return Window(samples, start, core, core_end, last, float(tape.speech(core, core_end).max()))

    def cut_all(ahead: int) -> Iterator[Window]:
        """Cut while more than the longest core and `ahead` samples are on the tape."""
        nonlocal core
        while tape.end - core > longest + ahead:
            core_end = _quietest(tape, core + longest // 2, core + longest, hop)
            yield cut(core_end)
            core = core_end
            tape.forget(core - context)

    for block in blocks:
        tape.add(block)
        yield from cut_all(max(tail, context))
    tape.finish()
    yield from cut_all(tail)
    if tape.end > core:
        yield cut(tape.end, last=True)


class _Tape:
    """The stretch of a recording in memory: samples, and the probability of speech in each block of them.

    Positions are samples from the start of the recording. `start` and `end` bound what is held.
    """

    def __init__(self) -> None:
        self.start = self.end = 0
        self._pieces: list[Samples] = []
        self._speech = np.zeros(0, np.float32)
        self._first_block = 0
        self._detector = SileroVAD()

    def add(self, piece: Samples) -> None:
        self._pieces.append(piece)
        self.end += len(piece)
        self._speech = np.concatenate([self._speech, self._detector.feed(piece)])

    def finish(self) -> None:
        """Judge the last, unfinished block as if silence followed."""
        silence = np.zeros(-self.end % FRAME_SAMPLES, np.float32)
        self._speech = np.concatenate([self._speech, self._detector.feed(silence)])

    def samples(self, start: int, end: int) -> Samples:
        self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0][start - self.start : end - self.start].copy()

    def speech(self, start: int, end: int) -> Probabilities:
        """Of every block that touches the samples from `start` to before `end`."""
        return self._speech[start // FRAME_SAMPLES - self._first_block : -(-end // FRAME_SAMPLES) - self._first_block]

    def forget(self, before: int) -> None:
        before = max(before, self.start)
        self._pieces = [self.samples(before, self.end)]
        self.start = before
        self._speech = self._speech[before // FRAME_SAMPLES - self._first_block :]
        self._first_block = before // FRAME_SAMPLES


def _quietest(tape: _Tape, start: int, end: int, hop: int) -> int:
    """The multiple of `hop` in (start, end] in the middle of the longest quiet run, or of the quietest block."""
    speech = tape.speech(start, end)
    quiet = speech < SILENCE_THRESHOLD
    if not quiet.any():
        quiet = speech == speech.min()
    edges = np.flatnonzero(np.diff(np.r_[0, quiet, 0]))
    runs, run_ends = edges[::2], edges[1::2]
    longest = int(np.argmax(run_ends - runs))
    middle = start // FRAME_SAMPLES * FRAME_SAMPLES + int(runs[longest] + run_ends[longest]) * FRAME_SAMPLES // 2
    return min(max(round(middle / hop) * hop, (start // hop + 1) * hop), end)


def _model_file() -> Path:
    package = importlib.util.find_spec("silero_vad")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(folder) / "data" / "silero_vad_16k_sequence.onnx").is_file():
            return file
    raise MissingDependency("Silero VAD's model file is not installed. Install it: pip install 'silero-vad>=6.2.3'")
