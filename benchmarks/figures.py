"""Generate the figures in README and docs from benchmarks/results.

    python -m benchmarks.figures            # rewrite what stands between the markers
    python -m benchmarks.figures --check    # exit with 1 where a page is stale or a marker names no recorded result
    python -m benchmarks.figures --plots    # redraw docs/pictures too

A marker names a result file and a view of it: `<!-- figures: transcribe clips -->` … `<!-- /figures -->`. The views
are in `views`; `table` of a result without views shows its rows as they stand. Markers on lines of their own hold a
table and its caption, markers inside a line hold words. Every file in results must be shown somewhere.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import record, tables
from benchmarks.views import VIEWS

PAGES = ("README.md", "docs/**/*.md", "projects/**/*.md", "mowa/assets/**/*.md")
OPEN, CLOSE = "<!-- figures:", "<!-- /figures -->"
MARKED = re.compile(rf"<!-- figures: *(?P<name>\S+) +(?P<view>\S+) *-->(?P<body>.*?){re.escape(CLOSE)}", re.DOTALL)


class FigureError(Exception):
    """A marker that cannot be filled in, or a result that no page shows."""


def render(name: str, view: str) -> tuple[str, list[str]]:
    """Return the Markdown of a view of results/`name`.json, and the names of all results it shows.

    Raises FigureError where there is no such result or view.
    """
    result = _read(name)
    chosen = VIEWS.get(name, {}).get(view)
    if chosen is None:
        if view != "table" or name in VIEWS:
            known = ", ".join(sorted(VIEWS.get(name, {"table": None})))
            raise FigureError(f"{name} has no view {view}; known: {known}")
        chosen = tables.verbatim(result["rows"])
    shown = [result, *map(_read, chosen.results)]
    rows = [row for one in shown for row in one["rows"]]
    try:
        if isinstance(chosen, tables.Sentence):
            return chosen.text(rows), [name, *chosen.results]
        body = tables.markdown(chosen, rows)
    except (LookupError, TypeError, ValueError) as wrong:
        raise FigureError(f"view {view} does not fit results/{name}.json: {wrong!r}") from wrong
    captions = dict.fromkeys([tables.caption(result), *(tables.caption(one, again=False) for one in shown[1:])])
    return f"\n\n{body}\n\n*{' '.join(captions)}*\n\n", [name, *chosen.results]


def _read(name: str) -> dict[str, Any]:
    try:
        return record.read(name)
    except FileNotFoundError:
        raise FigureError(f"benchmarks/results/{name}.json does not exist: record it, or correct the marker") from None


def update(page: str) -> tuple[str, set[str]]:
    """Return the text of a page with every marked part generated anew, and the names of the results it shows."""
    used: set[str] = set()

    def fill(match: re.Match[str]) -> str:
        body, names = render(match["name"], match["view"])
        used.update(names)
        return f"<!-- figures: {match['name']} {match['view']} -->{body}{CLOSE}"

    if len(MARKED.findall(page)) != page.count(OPEN) or page.count(OPEN) != page.count(CLOSE):
        raise FigureError(f"a marker is malformed or not closed: {OPEN} NAME VIEW --> … {CLOSE}")
    return MARKED.sub(fill, page), used


def pages(root: Path) -> list[Path]:
    return [path for pattern in PAGES for path in sorted(root.glob(pattern))]


def run(root: Path, *, check: bool) -> list[str]:
    """Rewrite the pages under `root`, or with `check` leave them. Return what is wrong, a line each."""
    problems, used = [], set()
    for path in pages(root):
        name, before = path.relative_to(root), path.read_text(encoding="utf-8")
        try:
            after, shown = update(before)
        except FigureError as wrong:
            problems.append(f"{name}: {wrong}")
            continue
        used |= shown
        if after != before and check:
            problems.append(f"{name}: figures are stale; run python -m benchmarks.figures")
        elif after != before:
            path.write_text(after, encoding="utf-8")
            print(f"updated {name}")
    if not problems:
        unused = sorted({path.stem for path in record.RESULTS.glob("*.json")} - used)
        problems += [f"benchmarks/results/{name}.json is shown on no page" for name in unused]
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something is wrong")
    parser.add_argument("--plots", action="store_true", help="redraw docs/pictures from the results (matplotlib)")
    options = parser.parse_args()
    if options.plots:
        from benchmarks import plots

        plots.draw_all(record.ROOT / "docs" / "pictures")
    problems = run(record.ROOT, check=options.check)
    print("\n".join(problems) or "figures are up to date", file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
