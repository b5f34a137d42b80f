"""Size, speed and errors of models as a picture: what no other is both smaller and faster than is on a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mowa.errors import MissingPart
from mowa.evaluate.bench import Row
from mowa.files import atomic_write


def parts() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingPart("pictures need matplotlib: pip install matplotlib") from None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (size, speed), those that none beats in both, by size."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, found = float("-inf"), []
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            found.append(index)
    return found


def draw(rows: Sequence[Row], file: Path) -> None:
    """A PNG. Colour is the word error rate where it was measured, else the share of frames that agree."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.rtf]
    points = [(row.size / 1e6, 1 / row.rtf) for row in shown]
    known = all(row.rates for row in shown)
    colours = [row.rates.wer * 100 if known and row.rates else row.agreeing * 100 for row in shown]
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    line = [points[index] for index in front(points)]
    axis.plot(*zip(*line, strict=True), color="0.7", linewidth=1, zorder=1)
    palette = "viridis_r" if known else "viridis"
    dots = axis.scatter(
        [x for x, _ in points], [y for _, y in points], c=colours, cmap=palette, s=70, zorder=2, edgecolors="0.3"
    )
    for row, (size, speed) in zip(shown, points, strict=True):
        said = f"{Path(row.model).name}, {row.engine} {row.dtype}"
        axis.annotate(said, (size, speed), textcoords="offset points", xytext=(7, 4), fontsize=8)
    axis.set(xlabel="size, MB", ylabel="seconds of sound heard in a second", xlim=(0, None), ylim=(0, None))
    axis.margins(0.2)
    axis.grid(color="0.93")
    figure.colorbar(dots, label="word error rate, %" if known else "frames that agree with the first, %")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    pyplot.close(figure)
    atomic_write(file, written.getvalue())
