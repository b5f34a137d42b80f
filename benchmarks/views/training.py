"""Views of fine-tuning results: what training brings, and what it costs."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import (
    Cell,
    Column,
    Row,
    Table,
    find,
    interval,
    number,
    ratio,
    text,
)


def finetuned(*sets: str) -> Table:
    columns = [
        Column("`method`", text("method")),
        Column("parameters, M", number("trainable_m", 2)),
        Column("minutes", number("minutes")),
    ]
    for name in sets:
        columns += [Column(f"{SETS[name]}: {rate.upper()} %", interval(f"{name}_{rate}")) for rate in ("wer", "cer")]
    return Table(tuple(columns))


def trained_text(*columns: Column) -> Table:
    return Table((Column("", text("arm", TRAINERS)), *columns))


def ours_over(key: str, reference: str, digits: int = 1) -> Cell:
    """How many times the value of `reference` is this row's, for the rows that are not the reference."""

    def cell(row: Row, rows: list[Row]) -> str:
        base = find(rows, {"arm": reference})
        return "" if row is base else ratio(key, {"arm": reference}, digits, inverse=True, spreads=True)(row, rows)

    return cell


def over_trainer(row: Row, rows: list[Row]) -> str:
    """mowa's speed over transformers' with the same method."""
    if row["side"] != "mowa":
        return ""
    reference = {"method": row["method"], "side": "transformers"}
    return ratio("audio_s_per_s", reference, 1, spreads=True)(row, rows)


TRAINERS = {
    "padded": "TRL, padded",
    "packed": "TRL, packed",
    "unsloth": "Unsloth",
    "unsloth-compiled": "Unsloth, compiled",
}
SETS = {"same_speaker": "the man", "other_speaker": "the woman", "telephone": "telephone", "clean": "clean"}
TOKENS = Column("tokens per second", number("tokens_per_s", spreads=True))
PEAK = Column("peak, GiB", number("peak_gib", 2))
TIMES = Column("mowa is × as fast", ours_over("tokens_per_s", "mowa"))
MEMORY = Column("mowa needs × the memory", ours_over("peak_gib", "mowa", 2))
VIEWS: dict[str, dict[str, Any]] = {
    "finetune-text": {
        "table": Table(
            (
                Column("", text("stage")),
                Column("answers right, % (95 %)", interval("answers_right")),
                Column("loss, nats per token", number("loss", 2)),
                Column("top token right", number("token_accuracy", 1, scale=100, unit=" %")),
                Column("same top token as unmerged", number("agreement", 2, scale=100, unit=" %")),
                Column("KL, nats", number("kl", 4)),
            )
        )
    },
    "train-text": {
        "table": trained_text(TOKENS, PEAK, Column("of it for training", number("training_gib", 2)), TIMES),
    },
    "before-after": {
        "table": Table(
            (
                Column("", text("measure")),
                Column("before, s", number("before", 1, spreads=True)),
                Column("after, s", number("after", 1, spreads=True)),
                Column("median ratio", number("median_ratio", 2)),
            )
        )
    },
    "train-text-2048": {"table": trained_text(TOKENS, PEAK, TIMES)},
    "train-text-vocabulary": {"table": trained_text(PEAK, MEMORY)},
    "finetune-speech-russian": {"table": finetuned("same_speaker", "other_speaker")},
    "finetune-speech-telephone": {"table": finetuned("telephone", "clean")},
    "train-speech": {
        "table": Table(
            (
                Column("`method`", text("method")),
                Column("", text("side", {"transformers": "transformers' Trainer"})),
                Column("seconds of audio per second", number("audio_s_per_s", 2, spreads=True)),
                Column("s per step", number("s_per_step", 1)),
                Column("peak, GiB", number("peak_gib", 2)),
                Column("mowa is × as fast", lambda row, rows: over_trainer(row, rows)),
            )
        )
    },
    "distill": {
        "table": Table(
            (
                Column("", text("net")),
                Column("parameters, M", number("parameters_m", 1)),
                Column("layers", number("layers")),
                Column("WER %", interval("wer")),
                Column("CER %", interval("cer")),
                Column("real-time factor", number("rtf", 3)),
            )
        )
    },
}
