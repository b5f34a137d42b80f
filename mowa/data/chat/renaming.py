"""Give columns, keys of turns and roles of a data set the names that mowa reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mowa.data.chat.formats import KNOWN_COLUMNS, parse_json
from mowa.data.chat.rows import MESSAGE_KEYS, ROLE_ALIASES
from mowa.errors import DataError


@dataclass(frozen=True)
class Renaming:
    """Names of a data set. `columns` maps a name that mowa reads to the data set's, `roles` a role to one of ours.

    Raises DataError for names and roles that mowa does not read.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    _found: set[str] = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = KNOWN_COLUMNS | {key for keys in MESSAGE_KEYS.values() for key in keys}
        for name in self.columns:
            if name not in known:
                raise DataError(f"data.columns: unknown name {name!r}; known: {', '.join(sorted(known))}")
            if others := [
                other for other, theirs in self.columns.items() if theirs == self.columns[name] and other != name
            ]:
                raise DataError(f"data.columns: {name} and {others[0]} are both mapped to {self.columns[name]}")
        for role, ours in self.roles.items():
            if ours not in ROLE_ALIASES:
                raise DataError(f"data.roles: {role}: {ours!r} is none of system, user, assistant and tool")

    def rename(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row with the names that mowa reads, in itself and in its turns."""
        if not self.columns:
            return fields
        return {name: self._rename_turns(value) for name, value in self._renamed(fields)}

    def raise_missing(self, source: str, first: Mapping[str, Any]) -> None:
        """Raise DataError if a column of the data set was in no row; `first` is a row to list."""
        for ours, theirs in self.columns.items():
            if theirs not in self._found:
                there = ", ".join(map(str, first))
                raise DataError(
                    f"{source}: data.columns: no row has {theirs}, which {ours} is mapped to; row 1 has: {there}"
                )

    def _renamed(self, fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        ours = {theirs: name for name, theirs in self.columns.items()}
        self._found.update(name for name in fields if name in ours)
        replaced = {ours[name] for name in fields if name in ours}
        for name, value in fields.items():
            yield ours.get(name, f"{name} (not mapped)" if name in replaced else name), value

    def _rename_turns(self, value: Any) -> Any:
        value = parse_json(value) if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            return value
        return [dict(self._renamed(one)) for one in value]
