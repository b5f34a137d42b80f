"""Nets as listeners of live streams (`decode.stream`): in chunks with a memory, or through a window that slides.

- `cached`, for nets trained with chunks (`train`, `streaming`): of every frame the keys and values are kept, so what
  was before is never computed again; `right_s` of sound after each chunk is heard with it and once more with the next.
  What is said of a chunk is what the net says of the whole utterance under `chunks.chunked`. A frame can be final
  `chunk_s`, `right_s` and the front end's reach after its sound. Where a net has absolute positions, or sees everything
  to its left, an utterance is gone on with anew after `RENEW_S`, with `OVERLAP_S` heard again.
- `window`, for all nets: of every chunk the net hears `left_s` before it and `right_s` after it. What the front end
  makes of the sound is made once and kept, where it does not look beyond a frame's own samples; the rest is computed
  anew for every chunk. A frame can be final `chunk_s` + `right_s` after its sound.

Samples are normalised as they come (`data.level`), not by what nobody has heard yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mowa import machine
from mowa.data import audio, level
from mowa.data.speech import SpeechDetector
from mowa.decode.stream import RULES, Arrays, Listener, Rules, Samples, Scores, Stream
from mowa.engines import choose, native
from mowa.engines.native import Native
from mowa.engines.onnx import Onnx
from mowa.engines.protocol import Engine, frames, hop
from mowa.engines.transcription import DEFAULT, exported
from mowa.errors import ModelError
from mowa.families import chunks, streaming
from mowa.families.chunks import Trained
from mowa.families.streaming import Shape, Stock
from mowa.loading.speech import load
from mowa.nouns import Model

RENEW_S, OVERLAP_S = 20.0, 1.92
GROW = 256  # frames for which room is made at a time
Numbers = NDArray[np.float32]


class Step(Protocol):
    """One chunk, as `streaming.hear` has it, in arrays."""

    shape: Shape

    def __call__(
        self, sound: Samples, position: int, cache: Numbers, low: Numbers
    ) -> tuple[Scores, Numbers, Numbers]: ...


@dataclass(frozen=True, slots=True)
class Live:
    """How a stream is heard. `auto` is cached for a net that was trained for it, and window for others.

    `chunk_s` is how much is heard at a time (None: 0.32 s cached, 1.28 s in windows), `left_s` what is seen before that
    (None: as in training, or 4 s in windows), `right_s` what is heard after it, and again with the next chunk (None:
    the most that it was trained with, up to a chunk, or 1.28 s in windows: the positional convolution of wav2vec2
    looks 1.26 s ahead).
    """

    mode: Literal["auto", "cached", "window"] = "auto"
    chunk_s: float | None = None
    left_s: float | None = None
    right_s: float | None = None


CACHED_CHUNK_S, WINDOW_CHUNK_S, WINDOW_LEFT_S, WINDOW_RIGHT_S = 0.32, 1.28, 4.0, 1.28


def stream(model: str | Model | Engine | None = None, how: Live = Live(), rules: Rules = RULES) -> Stream:
    """A live stream that a model hears: an alias, a folder, a hub id, what `load` or `engine` gave; None is pl-tiny.

    ModelError where the model or the engine cannot hear so. Streams over one engine share its weights, and may be fed
    in as many threads as there are streams; each has a detector and a memory of its own.
    """
    if model is None or isinstance(model, str):
        folder = exported(model or DEFAULT)
        model = load(model or DEFAULT) if folder is None else choose.artifact(folder).engine
    engine = native.engine(model) if isinstance(model, Model) else model
    return Stream(listener(engine, how), SpeechDetector() if rules.detect else None, rules)


def listener(engine: Engine, how: Live = Live()) -> Listener:
    """What hears for `stream`; may be shared by many of them, in any threads."""
    frame_s = hop(engine.config) / engine.preprocessing.rate_hz
    trained, mode = chunks.trained_for(engine.config), how.mode
    if mode == "auto":
        mode = "cached" if trained and _step(engine) is not None else "window"
    chunk_s = how.chunk_s or (CACHED_CHUNK_S if mode == "cached" else WINDOW_CHUNK_S)
    size = round(chunk_s / frame_s)
    if size < 1 or min(how.left_s or 0, how.right_s or 0) < 0:
        raise ModelError(f"chunk_s is {chunk_s:g}: a chunk is {frame_s:g} s at least, and no time is below 0")
    if mode == "cached":
        left, ahead = (None if s is None else round(s / frame_s) for s in (how.left_s, how.right_s))
        return _cached(engine, trained, size, left, ahead)
    left_s = WINDOW_LEFT_S if how.left_s is None else how.left_s
    right_s = WINDOW_RIGHT_S if how.right_s is None else how.right_s
    left, right = (math.ceil(round(s / frame_s, 6) / size) * size for s in (left_s, right_s))
    if isinstance(engine, Native) and engine.config.feat_extract_norm == "layer":
        return Window(engine, size, left, right)
    return Rewound(engine, size, left, right)


def _cached(engine: Engine, trained: Trained | None, size: int, left: int | None, ahead: int | None) -> Cached:
    name = engine.origin.name
    if trained is None:
        raise ModelError(
            f"{name} was not trained to hear in chunks (no {chunks.TRAINED!r} in its config): use --mode window,"
            " or train it with `streaming` in the recipe"
        )
    step = _step(engine)
    if step is None:
        raise ModelError(f"the {engine.name} engine has no memory for {name}: use --mode window, or --engine native")
    most = max((one for one in trained.ahead if one <= size), default=0)
    return Cached(engine, step, size, trained.left if left is None else left, most if ahead is None else ahead)


def _step(engine: Engine) -> Step | None:
    """What computes one chunk for `engine`; None where it cannot hear in chunks."""
    if isinstance(engine, Native) and not chunks.refused(engine.model.net):
        return _Native(engine)
    return _Onnx(engine) if isinstance(engine, Onnx) and engine.chunk is not None else None


class _Native:
    def __init__(self, engine: Native) -> None:
        self._engine, self._parts = engine, engine.plan or Stock(engine.model.net)
        self.shape = streaming.shape(engine.model.net)

    def __call__(self, sound: Samples, position: int, cache: Numbers, low: Numbers) -> tuple[Scores, Numbers, Numbers]:
        device = self._engine.device
        with torch.inference_mode(), machine.matmul_precision(self._engine.precision.matmul):
            heard, kept, below = (torch.from_numpy(one).to(device) for one in (sound, cache, low))
            logits, made, below = streaming.hear(self._parts, heard, position, kept, below)
            scores = torch.log_softmax(logits, -1)
            return scores.cpu().numpy(), made.float().cpu().numpy(), below.float().cpu().numpy()


class _Onnx:
    def __init__(self, engine: Onnx) -> None:
        self._graph = engine.chunk
        given = {one.name: one.shape for one in self._graph.get_inputs()}
        layers, _, _, heads, width = given["cache"]
        self._names = list(given)
        self.shape = Shape(layers, heads, width, *given.get("low", (0, 0)))

    def __call__(self, sound: Samples, position: int, cache: Numbers, low: Numbers) -> tuple[Scores, Numbers, Numbers]:
        given = (sound, np.array([position]), np.ascontiguousarray(cache), low)
        logits, made, *below = self._graph.run(None, dict(zip(self._names, given, strict=False)))
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits, made, below[0] if below else np.zeros((len(logits), 0), np.float32)


class _Chunked:
    """What all listeners share: samples normalised as they come, and frames counted in chunks of `size`."""

    def __init__(self, engine: Engine, size: int, ahead: int) -> None:
        self.engine, self.size = engine, size
        self.vocabulary, self.rate_hz = engine.vocabulary, engine.preprocessing.rate_hz
        self.hop = hop(engine.config)
        self.reach = chunks.reach(engine.config)
        self.latency_s = ((size + ahead) * self.hop + self.reach - self.hop) / self.rate_hz

    def _fresh(self, memory: Arrays | None) -> Arrays:
        known = level.Level.typical(rate_hz=self.rate_hz) if memory is None else level.Level(*memory["level"].tolist())
        return {"level": _numbers(known), "raw": np.zeros(0, np.float32), "sound": np.zeros(0, np.float32)}

    def _normalised(self, memory: Arrays, samples: Samples, last: bool) -> Arrays:
        """The memory with the samples in it: those that a level is known for are `sound`, the rest `raw`."""
        raw = np.concatenate([memory["raw"], samples])
        whole = len(raw) if last else len(raw) // level.BLOCK * level.BLOCK
        ready, raw = raw[:whole], raw[whole:]
        if self.engine.preprocessing.normalize:
            ready, now = level.normalised(ready, level.Level(*memory["level"].tolist()), self.rate_hz)
            memory = memory | {"level": _numbers(now)}
        return memory | {"raw": raw, "sound": np.concatenate([memory["sound"], ready])}

    def _none(self) -> Scores:
        return np.zeros((0, len(self.vocabulary)), np.float32)


class Cached(_Chunked):
    """Chunk after chunk, with keys and values of what was before; `left` frames of it are seen, None: all. The `ahead`
    frames that are heard with a chunk are made again with the next one."""

    def __init__(self, engine: Engine, step: Step, size: int, left: int | None, ahead: int) -> None:
        super().__init__(engine, size, ahead)
        self._step, self.left, self.ahead = step, left, ahead
        frame_s = self.hop / self.rate_hz
        endless = left is not None and step.shape.low > 0
        self._renew = None if endless else int(RENEW_S / frame_s) // size * size
        self._overlap = math.ceil(OVERLAP_S / frame_s / size) * size

    def begin(self, memory: Arrays | None) -> Arrays:
        """counts: frames that the cache holds, and frames that there were."""
        return self._fresh(memory) | self._blank() | {"tape": np.zeros(0, np.float32)}

    def hear(self, memory: Arrays, samples: Samples, *, last: bool) -> tuple[Arrays, Scores, Scores]:
        """As `Listener.hear`. tape: the sound of the last frames that stay, to begin anew with."""
        memory = self._normalised(memory, samples, last)
        sound, found, unsure = memory["sound"], [], self._none()
        whole = self.size * self.hop
        wanted = whole + self.ahead * self.hop + self.reach - self.hop
        while len(sound) >= (self.reach if last else wanted):
            if self._renew is not None and memory["counts"][1] >= self._renew:
                memory = self._renewed(memory, sound[: wanted - whole])
            memory, scores = self._one(memory, sound[:wanted])
            found.append(scores[: self.size])
            unsure = scores[self.size :]
            tape = np.concatenate([memory["tape"], sound[:whole]])
            memory["tape"], sound = tape[-self._overlap * self.hop :], sound[whole:]
        return (
            memory | {"sound": sound},
            np.concatenate(found) if found else self._none(),
            self._none() if last else unsure,
        )

    def _one(self, memory: Arrays, sound: Samples) -> tuple[Arrays, Scores]:
        """One chunk with what is heard ahead of it, and the memory after the chunk."""
        filled, position = memory["counts"].tolist()
        cache, low = memory["cache"], memory["low"]
        first = 0 if self.left is None else max(0, filled - self.left)
        scores, made, below = self._step(sound, position, cache[:, :, first:filled], low)
        count = min(len(scores), self.size)
        if filled + count > cache.shape[2]:
            kept = cache[:, :, first:filled]
            filled -= first
            room = -(-(filled + count) // GROW) * GROW + GROW
            cache = np.empty((*cache.shape[:2], room, *cache.shape[3:]), np.float32)
            cache[:, :, :filled] = kept
        cache[:, :, filled : filled + count] = made[:, :, :count]
        low = np.concatenate([low, below[:count]])[count:]
        return memory | {"cache": cache, "low": low, "counts": np.array([filled + count, position + count])}, scores

    def _blank(self) -> Arrays:
        one = self._step.shape
        return {
            "cache": np.zeros((one.layers, 2, 0, one.heads, one.width), np.float32),
            "low": np.zeros((one.low, one.wide), np.float32),
            "counts": np.zeros(2, np.int64),
        }

    def _renewed(self, memory: Arrays, after: Samples) -> Arrays:
        """A memory that begins with the last `OVERLAP_S`: positions and keys do not go on for ever."""
        tape, memory = memory["tape"], memory | self._blank()
        whole, sound = self.size * self.hop, np.concatenate([tape, after])
        for start in range(0, len(tape), whole):
            memory, _ = self._one(memory, sound[start : start + whole + len(after)])
        return memory


class Window(_Chunked):
    """The whole net over a window of frames for every chunk; what the front end makes of the sound is kept."""

    def __init__(self, engine: Native, size: int, left: int, right: int) -> None:
        super().__init__(engine, size, right)
        self._parts = engine.plan or Stock(engine.model.net)
        self._native, self.left, self.right = engine, left, right
        longest = getattr(engine.config, "absolute_positions", None)
        if longest is not None and left + size + right > longest:
            raise ModelError(
                f"{engine.origin.name} hears {longest * self.hop / self.rate_hz:g} s at once; a window has"
                f" {(left + size + right) * self.hop / self.rate_hz:g} s: make left_s or right_s smaller"
            )

    def begin(self, memory: Arrays | None) -> Arrays:
        wide = int(self.engine.config.conv_dim[-1])
        return self._fresh(memory) | {"features": np.zeros((0, wide), np.float32), "before": np.zeros(1, np.int64)}

    def hear(self, memory: Arrays, samples: Samples, *, last: bool) -> tuple[Arrays, Scores, Scores]:
        """As `Listener.hear`. before: of the features that are kept, how many are of frames that are final."""
        memory = self._normalised(memory, samples, last)
        sound, features, before = memory["sound"], memory["features"], int(memory["before"][0])
        whole, found, unsure = self.size * self.hop, [], self._none()
        while len(sound) >= whole + self.reach - self.hop:
            features = np.concatenate([features, self._features(sound[: whole + self.reach - self.hop])])
            sound = sound[whole:]
            if len(features) - before >= self.size + self.right:
                scores = self._above(features)
                found.append(scores[before : before + self.size])
                unsure = scores[before + self.size :]
                features = features[max(0, before + self.size - self.left) :]
                before = min(before + self.size, self.left)
        if last:
            if len(sound) >= self.reach:
                features = np.concatenate([features, self._features(sound)])
            if len(features) > before:
                found.append(self._above(features)[before:])
            unsure = self._none()
        memory = memory | {"sound": sound, "features": features, "before": np.array([before])}
        return memory, np.concatenate(found) if found else self._none(), unsure

    def _features(self, sound: Samples) -> NDArray[np.float32]:
        with torch.inference_mode(), machine.matmul_precision(self._native.precision.matmul):
            made: NDArray[np.float32] = self._parts.features(torch.from_numpy(sound)).float().cpu().numpy()
            return made

    def _above(self, features: NDArray[np.float32]) -> Scores:
        with torch.inference_mode(), machine.matmul_precision(self._native.precision.matmul):
            net = self._native.model.net
            like = next(net.base_model.feature_projection.parameters())
            (logits,) = self._parts.above([torch.from_numpy(features).to(like)])
            return torch.log_softmax(logits, -1).cpu().numpy()


class Rewound(_Chunked):
    """The whole engine over a window of samples for every chunk, each window normalised by itself."""

    def __init__(self, engine: Engine, size: int, left: int, right: int) -> None:
        super().__init__(engine, size, right)
        self.left, self.right = left, right

    def begin(self, memory: Arrays | None) -> Arrays:
        return {"sound": np.zeros(0, np.float32), "before": np.zeros(1, np.int64)}

    def hear(self, memory: Arrays, samples: Samples, *, last: bool) -> tuple[Arrays, Scores, Scores]:
        """As `Listener.hear`. before: of the sound that is kept, how many frames are final."""
        sound, before = np.concatenate([memory["sound"], samples]), int(memory["before"][0])
        found, unsure = [], self._none()
        while True:
            ready = before + self.size + self.right
            if len(sound) < ready * self.hop + self.reach - self.hop:
                break
            scores = self._emissions(sound[: ready * self.hop + self.reach - self.hop])
            found.append(scores[before : before + self.size])
            unsure = scores[before + self.size :]
            first = max(0, before + self.size - self.left)
            sound, before = sound[first * self.hop :], before + self.size - first
        if last:
            if frames(self.engine.config, len(sound)) > before:
                found.append(self._emissions(sound)[before:])
            unsure = self._none()
        memory = {"sound": sound, "before": np.array([before])}
        return memory, np.concatenate(found) if found else self._none(), unsure

    def _emissions(self, sound: Samples) -> Scores:
        clip = audio.normalize(sound) if self.engine.preprocessing.normalize else sound
        (scores,) = self.engine.emissions([clip.astype(np.float32)])
        return scores


def _numbers(known: level.Level) -> NDArray[np.float64]:
    return np.array([known.count, known.total, known.squares])
