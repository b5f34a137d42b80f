"""`mowa bench`: benchmark models, engines and dtypes on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mowa.cli import output
from mowa.engines.registry import ENGINES
from mowa.errors import ModelError

if TYPE_CHECKING:
    from mowa.evaluation.bench import BenchResult
    from mowa.evaluation.text_bench import TextBenchResult

COLUMNS = ("model", "engine", "dtype", "MB", "RAM MB", "load s", "median s", "RTFx", "agreement")
TEXT_COLUMNS = ("model", "engine", "dtype", "MB", "RAM MB", "load s", "prefill tokens/s", "decode tokens/s")


# fmt: off
@click.command(short_help="Benchmark models, engines and dtypes on this machine.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--engine", "engines", multiple=True, metavar="NAME",
              help=f"Inference engine, {', '.join(ENGINES.names())}; repeatable."
              " [default: pytorch; for an export, its own]")
@click.option("--dtype", "dtypes", multiple=True, metavar="NAME",
              help="Compute dtype, float32, bfloat16, int8 or auto; repeatable. [default: auto]")
@click.option("--data", metavar="SOURCE",
              help="Recordings to run; transcripts are needed for error rates. [default: a bundled sample]")
@click.option("--split", default="", help="Split of --data.")
@click.option("--max-samples", type=click.IntRange(min=0), default=20, show_default=True,
              help="Maximum number of recordings (0 = all).")
@click.option("--throughput", is_flag=True,
              help="Measure the real-time factor with 1 and all threads, batch sizes 1 and 4.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Plot size, speed and error rate; models off the Pareto front are faded.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE.json",
              help="Write the measurements as JSON.")
def bench(
    models: tuple[str, ...], engines: tuple[str, ...], dtypes: tuple[str, ...], data: str | None, split: str,
    max_samples: int, throughput: bool, plot: Path | None, out: Path | None,
) -> int:
    # fmt: on
    """Measure latency, throughput, memory and size of each MODEL (alias, folder, Hub id or export), each in its own
    process. For language models it measures the speed over the prompt (prefill) and of each later token (decode)."""
    import mowa
    from mowa.evaluation.plot import plot_bench, require_matplotlib
    from mowa.evaluation.report import throughput_grid
    from mowa.evaluation.text_bench import TextBenchResult, is_text_bench

    if plot is not None:
        require_matplotlib()
        if is_text_bench(models):
            raise ModelError("--plot is for speech models: omit it for language models")
    grid = throughput_grid() if throughput else ()
    with output.stage_progress() as on_progress:
        results = mowa.bench(
            models, engines=engines, dtypes=dtypes, data=data, split=split, max_samples=max_samples, throughput=grid,
            on_progress=on_progress,
        )  # fmt: skip
    texts = [one for one in results if isinstance(one, TextBenchResult)]
    speech = [one for one in results if not isinstance(one, TextBenchResult)]
    if texts:
        output.print_table(TEXT_COLUMNS, [_text_cells(one) for one in texts])
    else:
        _print(speech)
    _write_json(results, out)
    if plot is not None:
        plot_bench(speech, plot)
        click.echo(f"\n{plot}")
    if not any(result.rtf for result in speech) and not any(result.decode_tokens_per_s for result in texts):
        raise ModelError("none of the models could be run")
    return 2 if any(result.error for result in results) else 0


def _print(results: Sequence[BenchResult]) -> None:
    with_wer = any(result.error_rates for result in results)
    output.print_table([*COLUMNS, *(["WER %"] if with_wer else [])], [_cells(result, with_wer) for result in results])
    for result in results:
        for line in output.throughput_lines(result.name, result.throughput):
            click.echo(line)


def _write_json(results: Sequence[BenchResult | TextBenchResult], out: Path | None) -> None:
    from mowa.evaluation.bench import results_to_dict
    from mowa.io.atomic import atomic_write

    if out is not None:
        atomic_write(out, json.dumps(results_to_dict(results), ensure_ascii=False, indent=1) + "\n")


def _text_cells(result: TextBenchResult) -> list[str]:
    if result.error:
        return [result.model, result.engine, result.dtype, *["–"] * 4, f"failed: {result.error}"]
    return [
        result.model, result.engine, result.dtype, f"{result.size_bytes / 1e6:.1f}",
        f"{result.peak_memory_bytes / 1e6:.0f}", f"{result.load_s:.1f}", f"{result.prefill_tokens_per_s:.0f}",
        f"{result.decode_tokens_per_s:.1f}",
    ]  # fmt: skip


def _cells(result: BenchResult, with_wer: bool) -> list[str]:
    if result.error:
        return [result.model, result.engine, *["–"] * 6, f"failed: {result.error}"]
    cells = [
        result.model, result.engine, result.dtype, f"{result.size_bytes / 1e6:.1f}",
        f"{result.peak_memory_bytes / 1e6:.0f}", f"{result.load_s:.1f}", f"{result.latency_s:.3f}",
        f"{1 / result.rtf:.1f}", f"{result.agreement:.1%}",
    ]  # fmt: skip
    return cells + ([f"{result.error_rates.wer:.1%}" if result.error_rates else "–"] if with_wer else [])
