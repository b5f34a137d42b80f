"""Format recorded rows as Markdown: cells, tables, sentences, and the caption that says where the numbers come from."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

Row = dict[str, Any]
Cell = Callable[[Row, list[Row]], str]


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and what a row shows in it given the row and all rows of the table."""

    title: str
    cell: Cell


@dataclass(frozen=True)
class Table:
    """Columns over those rows that have all the values of `where`. `results` are further files whose rows follow."""

    columns: tuple[Column, ...]
    where: Row = field(default_factory=dict)
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sentence:
    """Words with figures in them, for a place inside a paragraph. `results` are further files whose rows follow."""

    text: Callable[[list[Row]], str]
    results: tuple[str, ...] = ()


def rounded(value: float, digits: int) -> str:
    """Format with `digits` decimals; halves round up, as in 2.65 → 2.7, whatever binary float holds them."""
    exact = Decimal(repr(round(float(value), 12))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{exact + 0:f}".replace("-", "−")  # + 0: no sign on zero


def values(found: Any) -> list[float]:
    """The rounds' values of an entry: a list as it stands, a single number or estimate as one round."""
    if isinstance(found, dict):
        found = found["value"]
    return [float(one) for one in found] if isinstance(found, list) else [float(found)]


def median(row: Row, key: str) -> float:
    return statistics.median(values(row[key]))


def spread(found: list[float], digits: int) -> str:
    """The median, with the lowest and the highest value where there is more than one round."""
    middle = rounded(statistics.median(found), digits)
    if len(found) == 1:
        return middle
    return f"{middle} ({rounded(min(found), digits)}–{rounded(max(found), digits)})"


def text(key: str, names: dict[str, str] | None = None) -> Cell:
    """A label, or what `names` calls it."""
    return lambda row, _: (names or {}).get(str(row.get(key, "")), str(row.get(key, "")))


def number(key: str, digits: int = 0, *, scale: float = 1.0, unit: str = "", spreads: bool = False) -> Cell:
    """The median over the rounds, times `scale`; empty where the row lacks the value."""

    def cell(row: Row, _: list[Row]) -> str:
        if row.get(key) is None:
            return ""
        found = [value * scale for value in values(row[key])]
        return (spread(found, digits) if spreads else rounded(statistics.median(found), digits)) + unit

    return cell


def interval(key: str, digits: int = 1, *, scale: float = 100.0, sign: bool = False) -> Cell:
    """An estimate with its 95 % interval; without one, the number alone."""

    def shown(value: float) -> str:
        return ("+" if sign and value >= 0 else "") + rounded(value * scale, digits)

    def cell(row: Row, _: list[Row]) -> str:
        found = row.get(key)
        if found is None:
            return ""
        if not isinstance(found, dict):
            return shown(statistics.median(values(found)))
        between = " to " if sign else "–"
        return f"{shown(found['value'])} ({shown(found['low'])}{between}{shown(found['high'])})"

    return cell


def ratio(key: str, reference: Row, digits: int = 2, *, inverse: bool = False, spreads: bool = False) -> Cell:
    """Round by round the row's value over that of the row with the values of `reference` (`inverse`: under it)."""

    def cell(row: Row, rows: list[Row]) -> str:
        if row.get(key) is None:
            return ""
        found = ratios(row, find(rows, reference), key, inverse=inverse)
        return spread(found, digits) if spreads else rounded(statistics.median(found), digits)

    return cell


def ratios(row: Row, base: Row, key: str, *, inverse: bool = False) -> list[float]:
    """`row`'s values over `base`'s, round by round; over the medians where the two have other numbers of rounds."""
    ours, theirs = values(row[key]), values(base[key])
    if len(ours) != len(theirs):
        ours, theirs = [statistics.median(ours)], [statistics.median(theirs)]
    return [b / a if inverse else a / b for a, b in zip(ours, theirs, strict=True)]


def find(rows: list[Row], wanted: Row) -> Row:
    """The row with all the values of `wanted`. Raises LookupError where there is none, or more than one."""
    found = [row for row in rows if matches(row, wanted)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows have {wanted}; one is needed")
    return found[0]


def matches(row: Row, wanted: Row) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def verbatim(rows: list[Row]) -> Table:
    """A table of the rows as they stand, a column per key: for transcribed tables of text."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return Table(tuple(Column(key.strip(), text(key)) for key in keys))


def markdown(table: Table, rows: list[Row]) -> str:
    chosen = [row for row in rows if matches(row, table.where)]
    if not chosen:
        raise LookupError(f"no row has {table.where}")
    lines = [[column.title for column in table.columns], ["---"] * len(table.columns)]
    lines += [[column.cell(row, chosen) for column in table.columns] for row in chosen]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def caption(result: dict[str, Any], *, again: bool = True) -> str:
    """Say where the figures come from: command, commit, date, machine, versions; `again`: how to measure them again."""
    place = machine(result["machine"])
    when = f"commit {result['commit']} ({result['date']}){place}"
    if result.get("transcribed"):
        command = f" Measure again: `{result['reproduce']}`." if again and result.get("reproduce") else ""
        return f"Measured at {when}; transcribed from the documentation of that commit.{command}"
    rounds = result["rounds"]
    runs = f"Medians of {rounds} rounds (lowest–highest). " if rounds > 1 else "One round. "
    packages = [f"{name} {version.split('+')[0]}" for name, version in result["versions"].items()]
    return f"{runs}`{result['command']}` at {when}; {', '.join(packages)}."


def machine(found: dict[str, Any]) -> str:
    if not found:
        return ""
    shown = f" on {found.get('gpu') or found['cpu']}, {found['cores']} cores"
    return shown + (f", {found['memory_gib']} GiB" if "memory_gib" in found else "")
