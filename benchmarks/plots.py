"""Draw docs/pictures from the results: `python -m benchmarks.figures --plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.tables import median
from benchmarks.views.training import TRAINERS

COLORS = {"padded": "#888888", "packed": "#1f77b4", "unsloth": "#2ca02c", "mowa": "#d62728"}


def draw_all(folder: Path) -> None:
    """Redraw every picture whose result is there."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("quantize-pl-tiny", draw_quantize), ("finetune-speech-russian", draw_russian)):
        draw(record.read(name)["rows"], folder)
    rows = [row for row in record.read("train-text")["rows"] if "step_losses" in row]
    if rows:
        draw_losses(rows, folder)


def _axes(size: tuple[float, float], columns: int = 1) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained")
    for one in [axes] if columns == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.3)
    return figure, axes


def draw_quantize(rows: list[record.Row], folder: Path) -> None:
    """Size, speed and word errors of pl-tiny in every scheme, by format."""
    figure, axes = _axes((11, 4.5), 2)
    for axis, (kind, name) in zip(axes, (("onnx", "ONNX Runtime"), ("safetensors", "PyTorch")), strict=True):
        for index, row in enumerate(rows):
            change = row.get("synthetic_wer_change", {"value": 0.0})["value"] * 100
            place = median(row, f"{kind}_mb"), median(row, f"{kind}_speedup")
            dots = axis.scatter(*place, c=[change], cmap="viridis_r", vmin=0, vmax=10, s=70, edgecolors="black")
            axis.annotate(str(index + 1), place, xytext=(5, 5), textcoords="offset points", fontsize=9)
        axis.set(title=name, xlabel="size, MB", ylabel="speed relative to float32", xlim=(0, None), ylim=(0.6, None))
    figure.colorbar(dots, ax=axes, label="WER increase on synthetic speech, %")
    names = "   ".join(f"{index + 1} {row['scheme']}" for index, row in enumerate(rows))
    figure.supxlabel(names, fontsize=8)
    figure.savefig(folder / "quantize.png", dpi=90)


def draw_russian(rows: list[record.Row], folder: Path) -> None:
    """Word error rates of every method, with 95 % intervals, for both speakers."""
    figure, axis = _axes((6.5, 3.6))
    for offset, key, name in (
        (-0.2, "same_speaker", "speaker of the training data"),
        (0.2, "other_speaker", "another"),
    ):
        found = [row[f"{key}_wer"] for row in rows]
        below, above = ([abs(one[edge] - one["value"]) * 100 for one in found] for edge in ("low", "high"))
        places, heights = [index + offset for index in range(len(rows))], [one["value"] * 100 for one in found]
        axis.bar(places, heights, 0.38, yerr=[below, above], capsize=3, label=name)
    axis.set_xticks(range(len(rows)), [row["method"] for row in rows])
    axis.set(xlabel="method", ylabel="WER, %")
    axis.legend(frameon=False)
    figure.savefig(folder / "finetune-russian.png", dpi=90)


def draw_losses(rows: list[record.Row], folder: Path) -> None:
    """Training loss over the tokens seen, in the first round."""
    figure, axis = _axes((7, 4))
    for row in rows:
        seen = [sum(row["step_tokens"][: index + 1]) / 1000 for index in range(len(row["step_tokens"]))]
        axis.plot(seen, row["step_losses"], label=TRAINERS.get(row["arm"], row["arm"]), color=COLORS.get(row["arm"]))
    axis.set(xlabel="training tokens, thousands", ylabel="loss, nats per token")
    axis.legend(frameon=False)
    figure.savefig(folder / "train-text-losses.png", dpi=90)
