"""Roofline of one CPU and one network: what its matrix products reach, what the network needs, what is attained.

    python -m benchmarks.roofline [--model FOLDER] [--seconds 10] [--onnx] [--rounds 5]
    python -m benchmarks.roofline --seconds 1 --rounds 1 --record ''      # a check, a minute

Peak: the fastest product of a dtype with prepacked weights, over a few square sizes and the network's own shapes at
that length. Arithmetic: counted from the config, two operations per multiply-add; norms, GELU, softmax and additions
are not counted. Lower bound: every part at the peak of the dtype it is computed in; under int8 that is bfloat16 for the
front end, positional convolution and attention, and float32 for the first convolution, the projection and the head.
Share of peak: lower bound over measured time. The engines take turns, and medians are shown. The default network has
XLSR-53's shape and random weights.
"""

from __future__ import annotations

import argparse
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
from benchmarks import record
from benchmarks.tables import markdown
from benchmarks.transcribe import checkpoint
from benchmarks.views import VIEWS
from mowa import hardware
from mowa.engines import selection
from mowa.kernels.prepacked_linear import PrepackedLinear, is_supported
from mowa.models.ctc_encoder.geometry import frame_geometry, max_absolute_position

DTYPES = ("float32", "bfloat16", "int8")
SQUARES = (1024, 2048, 4096)
FLOAT32_PARTS = ("first convolution", "projection", "head")  # under int8; under bfloat16 the first convolution alone
BFLOAT16_PARTS = ("convolutions", "positions", "attention")  # under int8


def arithmetic(config: Any, samples: int) -> dict[str, float]:
    """Return the operations of each part of the network over `samples` samples."""
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
    table = max_absolute_position(config) is not None  # a lookup table
    parts["positions"] = 0.0 if table else 2 * count * config.num_conv_pos_embeddings * grouped * d
    parts["linears"] = 2 * count * layers * (4 * d * d + 2 * d * inner)
    parts["attention"] = 4 * count * count * d * layers
    parts["head"] = 2 * count * d * config.vocab_size
    return parts


def part_dtype(part: str, dtype: str) -> str:
    """The dtype in which the PyTorch engine of `dtype` computes a part."""
    if dtype == "float32" or part == "first convolution":
        return "float32"
    if dtype == "bfloat16":
        return "bfloat16"
    return "float32" if part in FLOAT32_PARTS else "bfloat16" if part in BFLOAT16_PARTS else "int8"


def fastest(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def measure_products(config: Any, rows: int, rounds: int) -> list[record.Row]:
    """Operations per second of each dtype at each shape (M × K × N), in units of 10⁹."""
    d, inner = config.hidden_size, config.intermediate_size
    shapes = [(size, size, size) for size in SQUARES]
    shapes += [(rows, d, d), (rows, d, 3 * d), (rows, d, inner), (rows, inner, d)]
    out = []
    for m, k, n in shapes:
        weight, giga = torch.randn(n, k), 2 * m * k * n / 1e9
        row: record.Row = {"table": "products", "shape": f"{m} × {k} × {n}"}
        for dtype in filter(is_supported, DTYPES):
            packed = PrepackedLinear(weight, None, dtype)  # type: ignore[arg-type]
            x = torch.randn(m, k) if dtype != "bfloat16" else torch.randn(m, k).bfloat16()
            if dtype == "int8":  # the product alone, without quantizing x
                x8 = torch.randint(0, 255, (m, k), dtype=torch.uint8)
                weights = packed._weight, packed._scale, packed._zero_points
                args = *weights, None, 1.0, 0, torch.float32, "none", [], "none"
                run = partial(torch.ops.onednn.qlinear_pointwise, x8, 0.02, 128, *args)
            else:
                run = partial(packed, x)
            row[dtype] = round(giga / fastest(run, rounds), 1)
        row["torch"] = round(giga / fastest(partial(functional.linear, torch.randn(m, k), weight), rounds), 1)
        out.append(row)
    peaks = {dtype: max(row[dtype] for row in out) for dtype in DTYPES if dtype in out[0]}
    return [*out, {"table": "products", "shape": "peak", **peaks}]


def measure_engines(model: str, seconds: float, rounds: int, with_onnx: bool) -> dict[str, list[float]]:
    """Seconds that each engine takes for one clip, by round; the engines take turns, after one round to warm up."""
    clip = np.random.default_rng(0).standard_normal(int(seconds * 16_000)).astype(np.float32)
    stock = mowa.load(model).net
    arms: dict[str, Callable[[], object]] = {"transformers' net, float32": partial(stock, torch.from_numpy(clip)[None])}
    named = [("pytorch", dtype) for dtype in DTYPES] + ([("onnx", "float32"), ("onnx", "int8")] if with_onnx else [])
    for name, dtype in named:
        engine = selection.select_engine(mowa.load(model), name=name, device="cpu", dtype=dtype).engine
        arms[f"{name}, {dtype}"] = partial(engine.emissions, [clip])
    times: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds + 1):
        for name, run in arms.items():
            started = time.perf_counter()
            run()
            if index:
                times[name].append(round(time.perf_counter() - started, 4))
    return times


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint instead of the random one")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--onnx", action="store_true", help="measure ONNX Runtime too")
    record.add_argument(parser, "roofline")
    options = parser.parse_args()
    hardware.enable_huge_pages()
    torch.set_num_threads(hardware.cpu_count())
    model = options.model or str(checkpoint(Path("build/bench/xlsr-random")))
    config = mowa.load(model).net.config
    samples = int(options.seconds * 16_000)
    products = measure_products(config, frame_geometry(config).num_frames(samples), 4 * options.rounds)
    peaks = {dtype: products[-1].get(dtype, np.inf) * 1e9 for dtype in DTYPES}
    counts = arithmetic(config, samples)
    total = sum(counts.values())
    parts: list[record.Row] = []
    for part, count in [*counts.items(), ("all", total)]:
        per_second = round(count / options.seconds / 1e9, 3)
        parts.append({"table": "arithmetic", "part": part, "gops_per_s": per_second, "share": round(count / total, 4)})
    engines: list[record.Row] = []
    for name, times in measure_engines(model, options.seconds, options.rounds, options.onnx).items():
        bound_s = sum(count / peaks[part_dtype(part, name.rpartition(", ")[2])] for part, count in counts.items())
        rate, share = total / median(times) / 1e9, bound_s / median(times)
        row = {"table": "engines", "engine": name, "seconds": times, "gops": round(rate), "bound_s": round(bound_s, 4)}
        engines.append(row | {"share": round(share, 3)})
    rows = [*products, *parts, *engines]
    for view in VIEWS["roofline"].values():
        print(f"\n{markdown(view, rows)}")
    record.write(options.record, rows, rounds=options.rounds, seconds=options.seconds)


if __name__ == "__main__":
    main()
