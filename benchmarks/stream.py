"""What listening live costs and how late it is: per mode and chunk, beside offline and beside naive windows. One run.

    python benchmarks/stream.py [--clips 60] [--data build/pl-tiny/unseen.jsonl …] [--json FILE] [--skip hour xlsr many]
    python benchmarks/stream.py --clips 12 --minutes 2 --skip xlsr      # two or three minutes

Recordings are fed in pieces of 20 ms with a pause of 1 s after each, one after another through one stream, as a
microphone would. Shown are, for each way of hearing:

- latency: how much later than its sound a frame can be final at worst, computing left aside;
- compute: time that one feed took in which the net was run, median and 95th percentile;
- delay: from the end of a word (where the offline engine has it) to the moment it is final, on a clock in which sound
  takes its time and computing its own; median and 95th percentile;
- errors against the texts, and how many times those of the same recordings heard offline;
- real-time factor, speech and pauses taken together.

Then: an hour of speech through one stream (memory, real-time factor and drift of times), ten streams at once, and a net
of the size of XLSR-53 with random weights in windows, beside transformers' pipeline over the same windows and over all
that was heard so far.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
from transcribe import EXAMPLE, checkpoint

import mowa
from mowa import hardware
from mowa.data import audio
from mowa.data.manifests import examples as sources
from mowa.decode.stream import EndpointConfig
from mowa.engines import streaming
from mowa.engines.pytorch import PyTorchEngine
from mowa.engines.streaming import StreamingConfig
from mowa.tasks.metrics import error_rates

PIECE = 320
PAUSE_S = 1.0
WAYS = {
    "cached, 0.32 s + 0": StreamingConfig("cached", 0.32, lookahead_s=0.0),
    "cached, 0.32 s + 0.16": StreamingConfig("cached", 0.32, lookahead_s=0.16),
    "cached, 0.32 s + 0.32": StreamingConfig("cached", 0.32, lookahead_s=0.32),
    "cached, 0.64 s + 0.32": StreamingConfig("cached", 0.64, lookahead_s=0.32),
    "cached, 1.28 s + 0.32": StreamingConfig("cached", 1.28, lookahead_s=0.32),
    "window, 0.64 s + 0.64": StreamingConfig("window", 0.64, 4.0, 0.64),
    "window, 1.28 s + 1.28": StreamingConfig("window", 1.28, 4.0, 1.28),
}


@dataclass(slots=True)
class Heard:
    """What one way of hearing came to."""

    texts: list[str] = field(default_factory=list)
    spent_s: list[float] = field(default_factory=list)  # of feeds in which the net was run
    all_s: float = 0.0
    sound_s: float = 0.0
    delays_s: list[float] = field(default_factory=list)


def recordings(source: str, count: int) -> list[tuple[np.ndarray, str]]:
    examples = list(sources.list_examples(source))
    chosen = np.random.default_rng(0).permutation(len(examples))[:count]
    return [(audio.load_audio(examples[i].audio), examples[i].text) for i in chosen]


def hear(
    engine: PyTorchEngine,
    how: StreamingConfig,
    clips: list[tuple[np.ndarray, str]],
    ends: list[list[tuple[str, float]]],
) -> Heard:
    """All recordings through one stream. `ends`: for each, its words and where they end, as heard offline."""
    stream, out = streaming.stream(engine, how), Heard()
    pause, ready_s = np.zeros(int(PAUSE_S * 16_000), np.float32), 0.0
    for (sound, _), words in zip(clips, ends, strict=True):
        begun_s, found = stream.received_s, []
        fed = np.concatenate([sound, pause])
        for start in range(0, len(fed), PIECE):
            before, clock = stream.state.frames_decoded + len(stream.state.stable_ids), time.perf_counter()
            events = stream.feed(fed[start : start + PIECE])
            spent = time.perf_counter() - clock
            out.all_s += spent
            ready_s = max(ready_s, stream.received_s) + spent  # a feed waits for its sound and for the feed before
            if stream.state.frames_decoded + len(stream.state.stable_ids) != before:
                out.spent_s.append(spent)
            found += [(w.text, w.end_s - begun_s, ready_s - begun_s) for e in events if e.is_final for w in e.words]
        found += [(w.text, w.end_s - begun_s, ready_s - begun_s) for e in stream.flush() if e.is_final for w in e.words]
        out.texts.append(" ".join(text for text, _, _ in found))
        out.delays_s += delays(found, words)
        out.sound_s += len(fed) / 16_000
    return out


def delays(found: list[tuple[str, float, float]], words: list[tuple[str, float]]) -> list[float]:
    """From where each word ends to when it was final, of words that are in both and end within half a second."""
    out = []
    for text, end_s, ready_s in found:
        near = [other for same, other in words if same == text and abs(other - end_s) < 0.5]
        if near:
            out.append(ready_s - min(near, key=lambda other: abs(other - end_s)))
    return out


def offline(
    engine: PyTorchEngine, clips: list[tuple[np.ndarray, str]]
) -> tuple[list[str], list[list[tuple[str, float]]]]:
    texts, ends = [], []
    for sound, _ in clips:
        soundfile.write("/tmp/stream-clip.wav", sound, 16_000, "FLOAT")
        heard = mowa.transcribe("/tmp/stream-clip.wav", engine)
        texts.append(heard.text)
        ends.append([(word.text, word.end_s) for word in heard.words])
    return texts, ends


def quantile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


def table(engine: PyTorchEngine, sets: list[str], count: int) -> dict[str, Any]:
    """pl-tiny, every way over every set."""
    out: dict[str, Any] = {}
    for source in sets:
        clips, name_of = recordings(source, count), Path(source).name
        said = [text for _, text in clips]
        texts, ends = offline(engine, clips)
        base = error_rates(said, texts)
        print(f"\n{name_of}: {len(clips)} recordings, offline WER {base['wer']:.1%}, CER {base['cer']:.1%}\n")
        print(
            "| how | latency s | compute ms p50 / p95 | delay s p50 / p95 | WER | × offline | CER | real-time factor |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name, how in WAYS.items():
            heard = hear(engine, how, clips, ends)
            rates = error_rates(said, heard.texts)
            row = {
                "latency_s": streaming.create_streaming_encoder(engine, how).latency_s,
                "compute_s": [quantile(heard.spent_s, share) for share in (0.5, 0.95)],
                "delay_s": [quantile(heard.delays_s, share) for share in (0.5, 0.95)],
                "wer": rates["wer"],
                "cer": rates["cer"],
                "offline": base,
                "rtf": heard.all_s / heard.sound_s,
            }
            out[f"{name_of}: {name}"] = row
            compute, delay = row["compute_s"], row["delay_s"]
            print(
                f"| {name} | {row['latency_s']:.2f} | {compute[0] * 1e3:.0f} / {compute[1] * 1e3:.0f} "
                f"| {delay[0]:.2f} / {delay[1]:.2f} | {rates['wer']:.1%} | {rates['wer'] / base['wer']:.2f} "
                f"| {rates['cer']:.1%} | {row['rtf']:.3f} |",
                flush=True,
            )
    return out


def hour(engine: PyTorchEngine, minutes: float) -> None:
    """The bundled sample, a pause, the sample, …: memory and speed by the minute, and whether times run away."""
    sound = np.concatenate([audio.load_audio(EXAMPLE), np.zeros(16_000, np.float32)])
    turn_s = len(sound) / 16_000
    for name in ("cached, 0.32 s + 0.16", "window, 1.28 s + 1.28"):
        stream, spent, memory, at = streaming.stream(engine, WAYS[name]), [0.0], [], 0
        starts: dict[str, list[float]] = {}
        while stream.received_s < minutes * 60:
            piece = np.take(sound, range(at, at + PIECE), mode="wrap")
            clock = time.perf_counter()
            events = stream.feed(piece)
            spent[-1] += time.perf_counter() - clock
            for word in (word for event in events if event.is_final for word in event.words):
                starts.setdefault(word.text, []).append(word.start_s % turn_s)
            at += PIECE
            if stream.received_s >= (len(memory) + 1) * 60:
                memory.append(resident())
                spent.append(0.0)
        often = max(starts, key=lambda text: len(starts[text]))
        apart = median(starts[often][-9:]) - median(starts[often][:9])
        print(
            f"{name}: {len(memory)} minutes; memory {memory[0]} MB after the first, at most {max(memory)}, {memory[-1]}"
            f" in the end; real-time factor {spent[min(1, len(memory) - 1)] / 60:.3f} in the second minute, "
            f"{spent[len(memory) - 1] / 60:.3f} in the last; '{often}' is {apart * 1e3:+.0f} ms from where it was",
            flush=True,
        )


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


def many(engine: PyTorchEngine, streams: int, seconds: float) -> None:
    """So many streams at once, each in a thread that feeds as sound would come; how far the last falls behind."""
    sound, behind = audio.load_audio(EXAMPLE), [0.0] * streams
    torch.set_num_threads(1)  # streams are the parallel work
    begun = time.monotonic() + 1

    def run(index: int) -> None:
        stream, at = streaming.stream(engine, WAYS["cached, 0.32 s + 0.16"]), 0
        offset = index * 0.032
        while at < seconds * 16_000:
            at += 1600
            due = begun + offset + at / 16_000
            time.sleep(max(0.0, due - time.monotonic()))
            stream.feed(np.take(sound, range(at - 1600, at), mode="wrap"))
            behind[index] = max(behind[index], time.monotonic() - due) if at > 16_000 else 0.0

    cpu = time.process_time()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    busy = (time.process_time() - cpu) / seconds
    torch.set_num_threads(hardware.cpu_count())
    print(
        f"{streams} streams at once for {seconds:.0f} s: the worst was {max(behind):.2f} s behind at its worst, "
        f"{busy:.2f} of {hardware.cpu_count()} cores busy"
    )


XLSR_S = 30.0
NAIVE = """
import json, sys, time
import numpy as np, soundfile, torch
from transformers import pipeline
folder, sound, chunk, left, right = sys.argv[1], *sys.argv[2:]
chunk, left, right = float(chunk), float(left), float(right)
samples, _ = soundfile.read(sound, dtype="float32")
run = pipeline("automatic-speech-recognition", model=folder)
run(samples[:16000])
out = {}
for name in ("windows", "growing"):
    clock = time.perf_counter()
    for k in range(1, int(len(samples) / 16000 / chunk) + 1):
        end = min(len(samples), int((k * chunk + right) * 16000))
        begin = 0 if name == "growing" else max(0, int(((k - 1) * chunk - left) * 16000))
        run(samples[begin:end].copy())
    out[name] = (time.perf_counter() - clock) / (len(samples) / 16000)
print(json.dumps(out))
"""


def xlsr(folder: Path) -> None:
    """XLSR's size in windows, beside transformers' pipeline at the same chunk and look-ahead."""
    how = StreamingConfig("window", 1.28, 4.0, 1.28)
    model, samples = checkpoint(folder / "model"), audio.load_audio(EXAMPLE)
    sound = np.take(samples, range(int(XLSR_S * 16_000)), mode="wrap")
    file = folder / "live.wav"
    soundfile.write(file, sound, 16_000)
    said = subprocess.run(
        [sys.executable, "-c", NAIVE, str(model), str(file), "1.28", "4.0", "1.28"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
    ).stdout  # fmt: skip
    naive = json.loads(said)
    windows, growing = naive["windows"], naive["growing"]
    print(f"\nXLSR's size, random weights, {XLSR_S:.0f} s of sound, {how}\n")
    print("| how | real-time factor | × cheaper than windows | × cheaper than growing |\n|---|---|---|---|")
    print(f"| transformers pipeline, the same windows | {windows:.2f} | 1 | {growing / windows:.2f} |")
    print(f"| transformers pipeline, all so far | {growing:.2f} | {windows / growing:.2f} | 1 |")
    for dtype in ("float32", "bfloat16", "int8"):
        engine = mowa.open_engine(mowa.load(str(model)), device="cpu", dtype=dtype)
        for warm in (True, False):
            stream = streaming.stream(engine, how, EndpointConfig(vad=False))
            clock = time.perf_counter()
            for start in range(0, len(sound) // (8 if warm else 1), PIECE):
                stream.feed(sound[start : start + PIECE])
            stream.close()
            spent = (time.perf_counter() - clock) / XLSR_S
        print(
            f"| mowa, {dtype} | {spent:.2f} | {windows / spent:.2f} | {growing / spent:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pl-tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clips", type=int, default=60, help="of each set")
    parser.add_argument("--data", nargs="+", default=["build/pl-tiny/unseen.jsonl"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--streams", type=int, default=10)
    parser.add_argument("--skip", nargs="+", choices=["table", "hour", "many", "xlsr"], default=[])
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{hardware.cpu_count()} cores, {options.model}, {options.dtype}")
    found: dict[str, Any] = {}
    engine = mowa.open_engine(mowa.load(options.model), device="cpu", dtype=options.dtype)
    if "table" not in options.skip:
        found = table(engine, [one for one in options.data if Path(one).exists()], options.clips)
    if "many" not in options.skip:
        many(engine, options.streams, 30)
    if "hour" not in options.skip:
        hour(engine, options.minutes)
    if "xlsr" not in options.skip:
        xlsr(options.folder)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
