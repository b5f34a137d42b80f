"""Measure quantization-aware training, distillation to half the depth, and Core ML exports of pl-tiny.

    python -m benchmarks.compress qat [--human FOLDER]     # 350 steps, then int4-weight against pl-tiny in float32
    python -m benchmarks.compress distill                  # 500 steps, three of six layers
    python -m benchmarks.compress coreml                   # every scheme, compared with PyTorch
    python -m benchmarks.compress qat --steps 2            # a check, two minutes

The data are those of `make model`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import mowa
from benchmarks import record
from benchmarks.quantize import SET_TAG, write_manifest
from benchmarks.speech_sets import prepare, read_people, read_set
from benchmarks.tables import markdown
from benchmarks.views import VIEWS
from mowa.evaluation import report as reports
from mowa.io.manifest import find_manifest
from mowa.quantization.schemes import parse_scheme

COREML_SCHEMES = {"float32": "", "fp16": "16", "int8-weight": "16", "int8-static": "17", "int4-weight": "18"}
TRAIN_RECORDINGS, LAYERS, DISTILL_EPOCHS = 3_000, 3, 1.25
RTF_ROUNDS = 5


def train_for_int4(given: argparse.Namespace) -> list[record.Row]:
    data = prepare()
    steps = {} if given.steps is None else {"max_steps": given.steps}
    run = mowa.train("recipes/qat.yaml", out=given.folder / "qat", data=given.train, dev=given.dev, **steps)
    sets = {"300, synthetic, ten other voices": read_set(data / "unseen.jsonl")}
    if given.human:
        sets["179 of people"] = read_people(given.human)
    manifest = write_manifest(given.folder / "qat.jsonl", sets)
    config = reports.ReportConfig(
        schemes=(parse_scheme("int4-weight"),), formats=("onnx",), data=str(manifest), group_by=SET_TAG,
        keep_failed=True, baseline="pl-tiny",
    )  # fmt: skip
    report = reports.build_report(run.model, config)
    rows = []
    for name, group in next(one for one in report.rows if one.scheme == "int4-weight").by_group.items():
        change = group.error_rate_change
        low, high = change.wer_interval
        wer = group.error_rates.wer
        estimate = {"value": round(change.wer, 4), "low": round(low, 4), "high": round(high, 4)}
        rows.append(
            {"recordings": name, "float32_wer": round(wer / (1 + change.wer), 4), "wer": round(wer, 4),
             "wer_change": estimate}
        )  # fmt: skip
    return rows


def distill(given: argparse.Namespace) -> list[record.Row]:
    data = prepare()
    source = Path(given.train)
    train = source.with_name(f"train{TRAIN_RECORDINGS}.jsonl")  # paths in it are relative
    with source.open(encoding="utf-8") as lines:
        train.write_text("".join(islice(lines, TRAIN_RECORDINGS)), encoding="utf-8")
    steps: dict[str, Any] = {"epochs": DISTILL_EPOCHS} if given.steps is None else {"max_steps": given.steps}
    run = mowa.distill(
        "pl-tiny", LAYERS, out=given.folder / "half", data=str(train), dev=given.dev,
        test=str(data / "unseen.jsonl"), **steps,
    )  # fmt: skip
    nets = {"teacher": mowa.load("pl-tiny"), "student": run.model}
    rtf = real_time_factors(nets)
    rows: list[record.Row] = []
    for name, model in nets.items():
        metrics = mowa.evaluate(model, str(data / "unseen.jsonl")).metrics
        found = {key: interval(metrics[key]) for key in ("wer", "cer")}
        parameters = sum(weight.numel() for weight in model.net.parameters()) / 1e6
        layers = model.net.config.num_hidden_layers
        rows.append(
            {"net": name, "parameters_m": round(parameters, 1), "layers": layers, **found, "rtf": round(rtf[name], 4)}
        )
    return rows


def interval(estimate: Any) -> dict[str, float]:
    return {key: round(getattr(estimate, key), 4) for key in ("value", "low", "high")}


def real_time_factors(nets: dict[str, Any]) -> dict[str, float]:
    """Return each model's median real-time factor in float32 on 15 s of the bundled recording; they take turns."""
    import torch

    from mowa.data import audio
    from mowa.io.hub import SAMPLE_CLIP

    rate = nets["teacher"].preprocessing.rate_hz
    clip = np.resize(audio.load_audio(SAMPLE_CLIP, rate), 15 * rate)
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    with torch.inference_mode():
        for _ in range(RTF_ROUNDS):
            for name, model in nets.items():
                inputs = torch.from_numpy(audio.preprocess(clip, model.preprocessing))[None]
                began = time.perf_counter()
                model.net(inputs)
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) / 15 for name, found in seconds.items()}


def export_coreml(given: argparse.Namespace) -> list[record.Row]:
    rows: list[record.Row] = []
    for scheme, ios in COREML_SCHEMES.items():
        out = given.folder / f"coreml-{scheme}"
        artifact = mowa.export(
            "pl-tiny", "coreml", out, scheme="" if scheme == "float32" else scheme, calibration_data=given.dev,
            lengths_s=(5.0, 10.0, 20.0),
        )  # fmt: skip
        row: record.Row = {"scheme": scheme, "size_mb": round(artifact.size_bytes / 1e6)}
        if scheme == "float32":
            verified = find_manifest(out).sections["verification"]
            row["max_abs_diff"] = round(verified["max_abs_diff"], 5)
        else:
            assert artifact.agreement is not None
            row |= {"frame_agreement": round(artifact.agreement, 4), "ios": ios}
        rows.append(row)
    return rows


PARTS = {"qat": (train_for_int4, "qat"), "distill": (distill, "distill"), "coreml": (export_coreml, "export-coreml")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--human", type=Path, help="a folder with transcripts.tsv")
    parser.add_argument("--steps", type=int, help="training steps, for a check that records nothing")
    parser.add_argument("--train", default="build/pl-tiny/train.jsonl")
    parser.add_argument("--dev", default="build/pl-tiny/dev.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("build/compress"))
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json; '' for none")
    given = parser.parse_args()
    measure, name = PARTS[given.part]
    rows = measure(given)
    print(markdown(VIEWS[name]["table"], rows))
    default = name if given.steps is None else ""
    record.write(default if given.record is None else given.record, rows)


if __name__ == "__main__":
    main()
