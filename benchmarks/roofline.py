"""The roofline of one processor and one net: what its matrix products can reach, what the net needs, what is reached.

    python benchmarks/roofline.py [--model build/bench/xlsr-random] [--seconds 10] [--onnx] [--rounds 5] [--json FILE]

Peak: the fastest product of a dtype, weights packed, over a few square sizes and the net's own shapes at that length.
Arithmetic: counted from the config, two operations for a multiplication and its addition; norms, GELU, softmax and sums
count nothing. Least time: every part at the peak of the dtype it is multiplied in, which for int8 is bfloat16 in the
front end, the positional convolution and attention, and float32 in the first convolution, the projection and the head.
Share: least time over the time that was measured. Engines take turns; shown is the median.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import mowa
from mowa import hardware
from mowa.engines import selection
from mowa.engines.protocol import num_frames
from mowa.kernels.prepacked_linear import PrepackedLinear, is_supported

KINDS = ("float32", "bfloat16", "int8")
SQUARES = (1024, 2048, 4096)
SMALL = ("first convolution", "projection", "head")  # float32 in int8, and in bfloat16 but for the last two
FRONT = ("convolutions", "positions", "attention")  # bfloat16 in int8


def arithmetic(config: Any, samples: int) -> dict[str, float]:
    """Operations of each part of the net over so many samples."""
    parts = {"first convolution": 0.0, "convolutions": 0.0}
    count, before = samples, 1
    for index, (width, kernel, stride) in enumerate(
        zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    ):
        count = (count - kernel) // stride + 1
        parts["convolutions" if index else "first convolution"] += 2 * count * kernel * before * width
        before = width
    d, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    grouped = d // config.num_conv_pos_embedding_groups
    parts["projection"] = 2 * count * before * d
    table = getattr(config, "absolute_positions", None) is not None  # looked up
    parts["positions"] = 0.0 if table else 2 * count * config.num_conv_pos_embeddings * grouped * d
    parts["linears"] = 2 * count * layers * (4 * d * d + 2 * d * inner)
    parts["attention"] = 4 * count * count * d * layers
    parts["head"] = 2 * count * d * config.vocab_size
    return parts


def part_kind(part: str, dtype: str) -> str:
    """The dtype in which a native engine of `dtype` multiplies a part."""
    if dtype == "float32" or part == "first convolution":
        return "float32"
    if dtype == "bfloat16":
        return "bfloat16"
    return "float32" if part in SMALL else "bfloat16" if part in FRONT else "int8"


def least(make: Callable[[], object], rounds: int) -> float:
    make()
    spent = []
    for _ in range(rounds):
        started = time.perf_counter()
        make()
        spent.append(time.perf_counter() - started)
    return min(spent)


def products(config: Any, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Operations a second of each kind at each shape (M × K × N)."""
    d, inner = config.hidden_size, config.intermediate_size
    shapes = [(size, size, size) for size in SQUARES]
    shapes += [(rows, d, d), (rows, d, 3 * d), (rows, d, inner), (rows, inner, d)]
    found: dict[str, dict[str, float]] = {}
    for m, k, n in shapes:
        weight = torch.randn(n, k)
        row = found.setdefault(f"{m} × {k} × {n}", {})
        for kind in filter(is_supported, KINDS):
            packed = PrepackedLinear(weight, None, kind)  # type: ignore[arg-type]
            x = torch.randn(m, k) if kind != "bfloat16" else torch.randn(m, k).bfloat16()
            if kind == "int8":  # the product alone, without making x narrow
                x8 = torch.randint(0, 255, (m, k), dtype=torch.uint8)
                args = packed._weight, packed._scales, packed._zeros, None, 1.0, 0, torch.float32, "none", [], "none"

                make = partial(torch.ops.onednn.qlinear_pointwise, x8, 0.02, 128, *args)
            else:
                make = partial(packed, x)
            row[kind] = 2 * m * k * n / least(make, rounds)
        wide = torch.randn(m, k)
        row["torch as it comes"] = 2 * m * k * n / least(partial(functional.linear, wide, weight), rounds)
    return found


def spent(model: str, seconds: float, rounds: int, with_onnx: bool) -> dict[str, float]:
    """Seconds each engine takes over one clip, the median; in turn."""
    clip = np.random.default_rng(0).standard_normal(int(seconds * 16_000)).astype(np.float32)
    arms: dict[str, Callable[[], object]] = {}
    stock = mowa.load(model).net
    arms["the net itself, float32"] = partial(stock, torch.from_numpy(clip)[None])
    named = [("pytorch", kind) for kind in KINDS] + ([("onnx", "float32"), ("onnx", "int8")] if with_onnx else [])
    for name, kind in named:
        engine = selection.select_engine(mowa.load(model), name=name, device="cpu", dtype=kind).engine
        arms[f"{name}, {kind}"] = partial(engine.emissions, [clip])
    took: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            if turn:
                took[name].append(time.perf_counter() - started)
    return {name: median(times) for name, times in took.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/bench/xlsr-random")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--onnx", action="store_true", help="ONNX Runtime too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hardware.enable_huge_pages()
    torch.set_num_threads(hardware.cpu_count())
    config = mowa.load(options.model).net.config
    samples = int(options.seconds * 16_000)
    rates = products(config, num_frames(config, samples), 4 * options.rounds)
    columns = [*KINDS, "torch as it comes"]
    features = " ".join(hardware.cpu_features())
    print(f"{hardware.cpu_name()}, {hardware.cpu_count()} cores ({features}), torch {torch.__version__}")
    print(f"\n| product, G operations/s | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for shape, row in rates.items():
        print(f"| {shape} | {' | '.join(f'{row[kind] / 1e9:.0f}' if kind in row else '' for kind in columns)} |")
    peaks = {kind: max(row.get(kind, 0.0) for row in rates.values()) for kind in KINDS}
    print(f"| peak | {' | '.join(f'{peaks[kind] / 1e9:.0f}' for kind in KINDS)} | |")
    parts = arithmetic(config, samples)
    per_s = {part: count / options.seconds / 1e9 for part, count in parts.items()}
    print("\n| G operations per second of audio | | share |\n|---|---|---|")
    for part, count in [*per_s.items(), ("all", sum(per_s.values()))]:
        print(f"| {part} | {count:.2f} | {count / sum(per_s.values()):.1%} |")
    took = spent(options.model, options.seconds, options.rounds, options.onnx)
    print(f"\n| {options.seconds:g} s of audio | s | G operations/s | least s | share of peak |\n|---|---|---|---|---|")
    for name, seconds in took.items():
        dtype = name.rpartition(", ")[2]
        bound = sum(count / (peaks[part_kind(part, dtype)] or np.inf) for part, count in parts.items())
        rate = sum(parts.values()) / seconds / 1e9
        print(f"| {name} | {seconds:.3f} | {rate:.0f} | {bound:.3f} | {bound / seconds:.0%} |")
    if options.json:
        options.json.write_text(json.dumps({"products": rates, "arithmetic": parts, "spent": took}, indent=1) + "\n")


if __name__ == "__main__":
    main()
