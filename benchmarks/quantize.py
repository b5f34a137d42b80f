"""Quantize a model with every scheme and measure what it costs: size, memory, speed, drift and word errors.

    python -m benchmarks.quantize [--human FOLDER]
    python -m benchmarks.quantize --random                                       # XLSR-53's size, random weights
    python -m benchmarks.quantize --clips 4 --schemes int8-dynamic --record ''   # a check, two minutes

This is `mowa quantize` over the synthetic test set (made where it is missing) and a folder of people, calibrated on the
synthetic dev set. Word errors are compared with those of float32 on the same clips. --random measures size, memory and
speed on twelve clips, and says little about accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mowa
from benchmarks import record
from benchmarks.speech_sets import prepare, read_people, read_set
from benchmarks.tables import markdown
from benchmarks.transcribe import checkpoint
from benchmarks.views import VIEWS
from mowa.evaluation import report as reports
from mowa.quantization.schemes import REPORT_SCHEMES, parse_scheme

FORMATS = ("onnx", "safetensors")
SET_TAG = "accent"  # the tag that tells the sets of recordings apart
RANDOM_CLIPS = 12


def write_manifest(path: Path, sets: dict[str, list[Any]]) -> Path:
    rows = [
        {"id": f"{name}-{index}", "audio": one.audio, "text": one.text, "duration_s": one.duration_s, SET_TAG: name}
        for name, examples in sets.items()
        for index, one in enumerate(examples)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def to_rows(report: Any, *, errors: bool) -> list[record.Row]:
    """One row per scheme, with the formats side by side."""
    rows: dict[str, record.Row] = {}
    for one in report.rows:
        row = rows.setdefault(one.scheme, {"scheme": one.scheme})
        if one.diff is None:
            row[f"{one.format}_refused"] = one.reason
            continue
        row |= {
            f"{one.format}_mb": round(one.size_bytes / 1e6, 1),
            f"{one.format}_ratio": round(one.size_ratio, 4),
            f"{one.format}_memory_mb": round(one.peak_memory_bytes / 1e6),
            f"{one.format}_speedup": round(one.speedup, 3),
        }
        if one.format != FORMATS[0]:
            continue
        row |= {"frame_agreement": round(one.diff.agreement, 5), "kl": round(one.diff.kl, 6)}
        if errors and one.scheme != "float32":
            for name, group in one.by_group.items():
                change = group.error_rate_change
                low, high = change.wer_interval
                row[f"{name}_wer_change"] = {
                    "value": round(change.wer, 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                }
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=[*REPORT_SCHEMES["ctc"], "int4-weight+gptq+asym"])
    parser.add_argument("--random", action="store_true", help="a network of XLSR-53's size instead of pl-tiny")
    parser.add_argument("--human", type=Path, help="a folder with transcripts.tsv")
    parser.add_argument("--clips", type=int, help="clips per set")
    parser.add_argument("--folder", type=Path, default=Path("build/quantize"))
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json; '' for none")
    options = parser.parse_args()
    result = "quantize-xlsr" if options.random else "quantize-pl-tiny"
    model = str(checkpoint(Path("build/bench/xlsr-random"))) if options.random else "pl-tiny"
    data, count = prepare(), options.clips or (RANDOM_CLIPS if options.random else None)
    sets = {"synthetic": read_set(data / "unseen.jsonl")[:count]}
    if options.human and not options.random:
        sets["people"] = read_people(options.human)[:count]
    manifest = write_manifest(options.folder / result / "data.jsonl", sets)
    config = reports.ReportConfig(
        schemes=tuple(map(parse_scheme, options.schemes)),
        formats=FORMATS,
        data=str(manifest),
        calibration=str(data / "dev.jsonl"),
        group_by=SET_TAG,
        keep_failed=True,
    )
    report = reports.build_report(mowa.load(model), config, options.folder / result / "models")
    rows = to_rows(report, errors=not options.random)
    print(markdown(VIEWS[result]["table"], rows))
    record.write(result if options.record is None else options.record, rows)


if __name__ == "__main__":
    main()
