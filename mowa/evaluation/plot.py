"""Plot size, speed and error rate of benchmarked models; models off the Pareto front are faded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mowa.errors import MissingDependency
from mowa.evaluation.bench import BenchResult
from mowa.io.atomic import atomic_write


def require_matplotlib() -> None:
    """Raise MissingDependency without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependency("--plot needs matplotlib: pip install matplotlib") from None


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points; lower is better in every coordinate."""
    return [
        index
        for index, point in enumerate(points)
        if not any(
            all(theirs <= ours for theirs, ours in zip(other, point, strict=True)) and tuple(other) != tuple(point)
            for other in points
        )
    ]


def plot_bench(results: Sequence[BenchResult], path: Path) -> None:
    """Write a PNG. The colour is the word error rate if every case has one, else the agreement with the first case."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    shown = [row for row in results if row.rtf]
    sizes, speeds = [row.size_bytes / 1e6 for row in shown], [1 / row.rtf for row in shown]
    known = all(row.error_rates for row in shown)
    loss = [row.error_rates.wer * 100 if known and row.error_rates else -row.agreement * 100 for row in shown]
    best = pareto_front([(size, -speed, much) for size, speed, much in zip(sizes, speeds, loss, strict=True)])
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    dots = axis.scatter(
        sizes,
        speeds,
        c=[abs(one) for one in loss],
        cmap="viridis_r" if known else "viridis",
        alpha=[1.0 if index in best else 0.3 for index in range(len(shown))],  # type: ignore[arg-type]
        s=90,
        edgecolors="0.2",
    )
    keys = []
    for index, row in enumerate(shown):
        weight = "bold" if index in best else "normal"
        axis.annotate(
            f"{index + 1}", (sizes[index], speeds[index]), (6, 5), textcoords="offset points", fontsize=9, weight=weight
        )
        label = f"{index + 1}  {Path(row.model).name}, {row.engine} {row.dtype}"
        keys.append(Line2D([], [], linestyle="", label=label))
    axis.set(xlabel="size, MB", ylabel="RTFx (seconds of audio per second)")
    axis.set(xlim=(0, max(sizes) * 1.1), ylim=(0, max(speeds) * 1.1))
    axis.grid(color="0.93")
    axis.set_axisbelow(True)
    figure.legend(handles=keys, loc="outside right upper", frameon=False, fontsize=9, handlelength=0)
    what = "word error rate, %" if known else "top-1 agreement with the first, %"
    bar = figure.colorbar(dots, location="bottom", aspect=50, label=f"{what} (faded: not Pareto-optimal)")
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    atomic_write(path, buffer.getvalue())
