"""Views of quantization and export results."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import (
    Cell,
    Column,
    Row,
    Table,
    interval,
    number,
    text,
)


def quantized(*, errors: bool) -> Table:
    def size(kind: str) -> Cell:
        def cell(row: Row, rows: list[Row]) -> str:
            share = "" if row["scheme"] == "float32" else f" ({number(f'{kind}_ratio', 1, scale=100)(row, rows)} %)"
            return number(f"{kind}_mb", 1)(row, rows) + share

        return cell

    columns = [Column("scheme", lambda row, _: f"`{row['scheme']}`")]
    for kind, name in (("onnx", "ONNX"), ("safetensors", "safetensors")):
        columns += [
            Column(f"{name}, MB", size(kind)),
            Column("peak memory, MB", number(f"{kind}_memory_mb")),
            Column("speed", number(f"{kind}_speedup", 2)),
        ]
    columns += [
        Column("frames that agree", number("frame_agreement", 1, scale=100, unit=" %")),
        Column("KL", number("kl", 4)),
    ]
    if errors:
        columns += [
            Column("WER change, synthetic, %", interval("synthetic_wer_change", sign=True)),
            Column("WER change, people, %", interval("people_wer_change", sign=True)),
        ]
    return Table(tuple(columns))


_GGUF_ARMS = {
    "mowa": "mowa: checkpoint → Q4_K_M",
    "mowa-f16": "mowa: checkpoint → F16",
    "llama.cpp": "llama.cpp: F16 → Q4_K_M",
    "libgguf": "libgguf: the same types, nothing written",
    "load": "transformers loads the checkpoint",
}

VIEWS: dict[str, dict[str, Any]] = {
    "gguf": {
        "table": Table(
            (
                Column("two threads", lambda row, _: _GGUF_ARMS[row["arm"]]),
                Column("seconds", number("seconds", 1)),
                Column("peak memory above imports, MB", number("peak_mb")),
            )
        )
    },
    "quantize-pl-tiny": {
        "table": quantized(errors=True),
        "sizes": Table(
            (
                Column("pl-tiny", lambda row, _: f"`{row['scheme']}`"),
                Column("ONNX, both graphs, MB", number("onnx_mb", 1)),
                Column("safetensors, MB", number("safetensors_mb", 1)),
            )
        ),
    },
    "quantize-xlsr": {"table": quantized(errors=False)},
    "qat": {
        "table": Table(
            (
                Column("recordings", text("recordings")),
                Column("float32, WER %", number("float32_wer", 1, scale=100)),
                Column("int4 after training, WER %", number("wer", 1, scale=100)),
                Column("change, % (95 %)", interval("wer_change", sign=True)),
            )
        )
    },
    "export-coreml": {
        "table": Table(
            (
                Column("scheme", lambda row, _: f"`{row['scheme']}`"),
                Column("MB", number("size_mb")),
                Column("frames that agree with PyTorch", number("frame_agreement", 2, scale=100, unit=" %")),
                Column("largest difference, nats", number("max_abs_diff", 5)),
                Column("needs iOS", text("ios")),
            )
        )
    },
    "export-ctranslate2": {
        "table": Table(
            (
                Column("scheme", lambda row, _: f"`{row['scheme']}`"),
                Column("MB", number("size_mb")),
                Column("frames that agree with PyTorch", number("frame_agreement", 1, scale=100, unit=" %")),
                Column("largest difference, nats", number("max_abs_diff", 5)),
            )
        )
    },
}
