"""Views of transcription results: error rates, speed, streaming, roofline."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.tables import (
    Cell,
    Column,
    Row,
    Sentence,
    Table,
    find,
    median,
    number,
    ratio,
    ratios,
    rounded,
    text,
)

ARMS = {
    "transformers-1": "transformers pipeline, float32",
    "transformers-4": "transformers pipeline, float32, batch 4",
    "transformers-8": "transformers pipeline, float32, batch 8",
    "transformers-bfloat16": "transformers pipeline, bfloat16",
    "pytorch-float32": "mowa, float32",
    "pytorch-bfloat16": "mowa, bfloat16",
    "pytorch-int8": "mowa, int8",
    "onnx-float32": "mowa, ONNX Runtime, float32",
    "onnx-int8": "mowa, ONNX Runtime, int8",
    "ctranslate2-float32": "CTranslate2, float32",
    "ctranslate2-int8": "CTranslate2, int8",
    "transformers-windows": "transformers pipeline, the same windows",
    "transformers-growing": "transformers pipeline, everything so far",
}


def real_time(row: Row, rows: list[Row]) -> str:
    return number("x_real_time", 1, spreads=True)(row | {"x_real_time": speeds(row)}, rows)


def speeds(row: Row) -> list[float]:
    """Seconds of audio per second, for each round."""
    found = row["s_per_s"]
    return [1 / one for one in (found if isinstance(found, list) else [found])]


def same_text(row: Row, _: list[Row]) -> str:
    return f"{row['same_text']} of {row['texts']}" if "same_text" in row else ""


def transcription(reference: Row) -> tuple[Column, ...]:
    """Columns of transcription speed, against one arm and nothing else."""
    return (
        Column("", text("arm", ARMS)),
        Column("× real time", real_time),
        Column("× transformers, float32", ratio("s_per_s", reference, 2, inverse=True, spreads=True)),
        Column("same text", same_text),
        Column("frames that agree", number("frame_agreement", 2, scale=100, unit=" %")),
        Column("peak MB", number("peak_mb")),
    )


def speed_claim(rows: list[Row]) -> str:
    """How many times as fast as transformers in float32 each dtype of the PyTorch engine is."""
    rows = [row for row in rows if row.get("set") == "clips"]
    base = find(rows, {"arm": "transformers-1"})

    def times(dtype: str) -> str:
        row = find(rows, {"arm": f"pytorch-{dtype}"})
        return rounded(statistics.median(ratios(row, base, "s_per_s", inverse=True)), 1)

    float32 = find(rows, {"arm": "pytorch-float32"})
    equal = " with the same text" if float32["same_text"] == float32["texts"] else ""
    return (
        f"{times('float32')} times as fast as transformers' pipeline in float32{equal}, "
        f"{times('bfloat16')} times in bfloat16 and {times('int8')} times in int8"
    )


def hours_per_hour(row: Row, _: list[Row]) -> str:
    return f"{1 / median(row, 's_per_s'):.0f}"


def relative_wer(row: Row, rows: list[Row]) -> str:
    base = find(rows, {"arm": "pytorch-float32"})
    shown = number("wer", 2, scale=100)(row, rows)
    return shown if row is base else f"{shown} ({(row['wer'] / base['wer'] - 1) * 100:+.1f} % relative)"


def corpus_hours(rows: list[Row]) -> str:
    """A small table: hours of audio per hour of one machine, for both sizes of model."""
    large, small = ([row for row in rows if ("recordings" in row) is tiny] for tiny in (False, True))
    lines = ["", "", "| model | float32 | bfloat16 | int8 |", "| --- | --- | --- | --- |"]
    for name, group in (("315 M parameters (XLSR-53's shape)", large), ("pl-tiny, 28 M parameters", small)):
        found = (find(group, {"arm": f"pytorch-{dtype}"}) for dtype in ("float32", "bfloat16", "int8"))
        lines.append(f"| {name} | " + " | ".join(hours_per_hour(row, group) for row in found) + " |")
    return "\n".join([*lines, "", ""])


def stream_mode(row: Row, _: list[Row]) -> str:
    return (
        row["mode"] if row["mode"] == "offline" else f"{row['mode']}, {row['chunk_s']:g} s + {row['lookahead_s']:g} s"
    )


def live_claim(rows: list[Row]) -> str:
    """Live and offline error rates of the default configuration, by set."""

    def rates(row: Row) -> str:
        return " / ".join(rounded(row[key] * 100, 1) for key in ("wer", "cer"))

    parts = []
    for name in dict.fromkeys(row["set"] for row in rows):
        live = find(rows, {"set": name, "mode": "cached", "chunk_s": 0.32, "lookahead_s": 0.32})
        offline = find(rows, {"set": name, "mode": "offline"})
        parts.append(f"{rates(live)} % on {name} recordings (offline {rates(offline)} %)")
    return " and ".join(parts).replace("people recordings", "recordings of people")


def pair(key: str, digits: int) -> Cell:
    def cell(row: Row, rows: list[Row]) -> str:
        found = [number(f"{key}_{name}", digits)(row, rows) for name in ("p50", "p95")]
        return " / ".join(found) if all(found) else ""

    return cell


def streaming(name: str) -> Table:
    columns = (
        Column("mode, chunk + look-ahead", stream_mode),
        Column("latency, s", number("latency_s", 2)),
        Column("compute, ms, p50 / p95", pair("compute_ms", 0)),
        Column("word delay, s, p50 / p95", pair("delay_s", 2)),
        Column("WER %", number("wer", 1, scale=100)),
        Column("× offline", ratio("wer", {"mode": "offline"}, 2)),
        Column("CER %", number("cer", 1, scale=100)),
        Column("real-time factor", number("rtf", 3)),
    )
    return Table(columns, {"set": name})


ERROR_RATES = (
    Column("recordings", text("recordings")),
    Column("clips", number("clips")),
    Column("minutes", number("minutes", 1)),
    Column("WER %", number("wer", 1, scale=100)),
    Column("CER %", number("cer", 1, scale=100)),
)
VIEWS: dict[str, dict[str, Any]] = {
    "error-rates": {
        "table": Table(
            (Column("model", text("model")), *ERROR_RATES, Column("in training text", number("leaked"))),
            results=("error-rates-whisper", "error-rates-peers"),
        ),
    },
    "transcribe": {
        "table": Table(transcription({"arm": "transformers-1"}), {"set": "clips"}),
        "claim": Sentence(speed_claim),
        "hours": Sentence(corpus_hours, ("transcribe-pl-tiny",)),
    },
    "transcribe-pl-tiny": {
        "table": Table(
            (
                Column("dtype", lambda row, _: row["arm"].removeprefix("pytorch-")),
                Column("other voices, WER %", number("unseen_wer", 2, scale=100)),
                Column("voices from training", number("seen_wer", 2, scale=100)),
                Column("people", number("people_wer", 2, scale=100)),
                Column("all, WER %", relative_wer),
                Column("all, CER %", number("cer", 2, scale=100)),
                Column("hours of audio per minute", lambda row, _: f"{1 / median(row, 's_per_s') / 60:.2f}"),
            )
        )
    },
    "transcribe-hour": {
        "table": Table(
            (
                Column("", text("arm", ARMS)),
                Column("audio, minutes", number("minutes")),
                Column("time, s", number("spent_s")),
                Column("peak, MB", number("peak_mb")),
            )
        )
    },
    "roofline": {
        "products": Table(
            (
                Column("product, G operations/s", text("shape")),
                *(Column(dtype, number(dtype)) for dtype in ("float32", "bfloat16", "int8")),
                Column("`nn.functional.linear`", number("torch")),
            ),
            {"table": "products"},
        ),
        "arithmetic": Table(
            (
                Column("part", text("part")),
                Column("G operations per second of audio", number("gops_per_s", 2)),
                Column("share", number("share", 1, scale=100, unit=" %")),
            ),
            {"table": "arithmetic"},
        ),
        "engines": Table(
            (
                Column("engine, dtype", text("engine")),
                Column("time, s", number("seconds", 3, spreads=True)),
                Column("G operations/s", number("gops")),
                Column("lower bound, s", number("bound_s", 3)),
                Column("share of peak", number("share", 0, scale=100, unit=" %")),
            ),
            {"table": "engines"},
        ),
    },
    "stream": {name: streaming(name) for name in ("synthetic", "people")} | {"live": Sentence(live_claim)},
    "stream-hour": {
        "table": Table(
            (
                Column("mode, chunk + look-ahead", stream_mode),
                Column("minutes", number("minutes")),
                Column("memory after the first minute, MB", number("first_memory_mb")),
                Column("in the end, MB", number("last_memory_mb")),
                Column("real-time factor, second minute", number("second_minute_rtf", 3)),
                Column("last minute", number("last_minute_rtf", 3)),
                Column("drift of word times, ms", number("drift_ms")),
            )
        )
    },
    "stream-parallel": {
        "table": Table(
            (
                Column("streams", number("streams")),
                Column("seconds", number("seconds")),
                Column("cores busy", number("cores_busy", 2)),
                Column("largest lag, s", number("max_lag_s", 2)),
            )
        )
    },
    "stream-xlsr": {
        "table": Table(
            (
                Column("", text("arm", ARMS)),
                Column("real-time factor", number("rtf", 2)),
                Column(
                    "× cheaper than the same windows", ratio("rtf", {"arm": "transformers-windows"}, 2, inverse=True)
                ),
                Column(
                    "× cheaper than everything so far", ratio("rtf", {"arm": "transformers-growing"}, 2, inverse=True)
                ),
            )
        )
    },
}
