"""The figures in README and docs are those of benchmarks/results."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import benchmarks
from benchmarks import figures, record, tables

ROWS = [
    {"arm": "stock", "s_per_s": [0.4, 0.2, 0.5], "wer": 0.1},
    {"arm": "ours", "s_per_s": [0.1, 0.1, 0.1], "wer": {"value": 0.125, "low": 0.1, "high": 0.15}},
]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one recorded result and a README that shows it."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/speed.py", "--data", "/elsewhere/people"])
    record.write("speed", ROWS, rounds=3)
    page = "# Speed\n\nBefore.\n\n<!-- figures: speed table -->\n<!-- /figures -->\n\nAfter.\n"
    (tmp_path / "README.md").write_text(page)
    return tmp_path


def test_the_figures_of_this_repository_are_up_to_date() -> None:
    assert figures.run(record.ROOT, check=True) == []


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_every_benchmark_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_every_result_says_how_it_was_measured() -> None:
    for path in record.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert {"command", "commit", "date", "machine", "versions", "rounds", "rows"} <= set(result), path.name
        assert result["rows"], path.name
        assert result.get("transcribed") or result["versions"], path.name
        assert path.read_text() == record.to_json(result), f"{path.name} is not as record.write writes it"


def test_pages_are_filled_in_once_and_pass_the_check(tree: Path) -> None:
    assert figures.run(tree, check=False) == []
    page = (tree / "README.md").read_text()
    assert "| ours | [0.1, 0.1, 0.1] |" in page
    assert page.startswith("# Speed\n\nBefore.\n")
    assert page.endswith("\n\nAfter.\n")
    assert "Medians of 3 rounds" in page
    assert figures.run(tree, check=True) == []
    figures.run(tree, check=False)
    assert (tree / "README.md").read_text() == page


def test_an_unfilled_marker_fails_the_check(tree: Path) -> None:
    assert "stale" in figures.run(tree, check=True)[0]


@pytest.mark.parametrize("where", ["page", "result"])
def test_a_changed_number_fails_the_check(tree: Path, where: str) -> None:
    figures.run(tree, check=False)
    path = tree / ("README.md" if where == "page" else "results/speed.json")
    path.write_text(path.read_text().replace("0.4", "0.3", 1))
    assert figures.run(tree, check=True) == ["README.md: figures are stale; run python -m benchmarks.figures"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("speed table", "sped table", "results/sped.json does not exist"),
        ("speed table", "speed chart", "speed has no view chart"),
        ("speed table", "speed", "malformed"),
        ("<!-- /figures -->", "", "not closed"),
    ],
)
def test_a_marker_that_cannot_be_filled_fails_the_check(tree: Path, old: str, new: str, problem: str) -> None:
    page = tree / "README.md"
    page.write_text(page.read_text().replace(old, new))
    for check in (True, False):
        problems = figures.run(tree, check=check)
        assert len(problems) == 1
        assert problem in problems[0]


def test_a_result_that_no_page_shows_fails_the_check(tree: Path) -> None:
    figures.run(tree, check=False)
    record.write("other", ROWS)
    assert figures.run(tree, check=True) == ["benchmarks/results/other.json is shown on no page"]


def test_the_recorded_command_has_no_paths_of_this_machine(tree: Path) -> None:
    assert record.read("speed")["command"] == "python -m benchmarks.speed --data people"


def test_a_view_shows_medians_the_spread_and_ratios_by_round() -> None:
    stock = {"arm": "stock"}
    columns = (
        tables.Column("arm", tables.text("arm")),
        tables.Column("s", tables.number("s_per_s", 2, spreads=True)),
        tables.Column("×", tables.ratio("s_per_s", stock, 1, inverse=True, spreads=True)),
        tables.Column("WER", tables.interval("wer")),
    )
    assert tables.markdown(tables.Table(columns), ROWS).splitlines()[2:] == [
        "| stock | 0.40 (0.20–0.50) | 1.0 (1.0–1.0) | 10.0 |",
        "| ours | 0.10 (0.10–0.10) | 4.0 (2.0–5.0) | 12.5 (10.0–15.0) |",
    ]


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(2.65, 1, "2.7"), (0.285, 2, "0.29"), (-0.04, 1, "0.0"), (-1.25, 1, "−1.3"), (7, 0, "7")],
)
def test_halves_round_up_and_zero_has_no_sign(value: float, digits: int, shown: str) -> None:
    assert tables.rounded(value, digits) == shown


def test_transcribed_results_are_marked_in_their_caption() -> None:
    result = {"commit": "abc1234", "date": "2026-11-23", "machine": {}, "transcribed": True, "reproduce": "make it"}
    assert tables.caption(result) == (
        "Measured at commit abc1234 (2026-11-23); transcribed from the documentation of that commit. "
        "Measure again: `make it`."
    )
