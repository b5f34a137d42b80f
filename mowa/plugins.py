"""Values that mowa has by name (families, engines, export formats), and those that installed packages add.

A package adds a value by an entry point, whose name is that of the value. Names are read from package metadata; the
package itself is imported when its value is used.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar

from mowa.errors import ModelError

log = logging.getLogger("mowa")


class Named(Protocol):
    """A value with a name."""

    @property
    def name(self) -> str: ...


ValueT = TypeVar("ValueT", bound=Named)


@dataclass(frozen=True, slots=True)
class Registry(Generic[ValueT]):
    """Values of one kind by name: `builtins`, and those that entry points of `group` name, of other names.

    `label` is what errors call a value.
    """

    group: str
    label: str
    kind: type[ValueT]
    builtins: tuple[ValueT, ...]

    def names(self) -> tuple[str, ...]:
        """Return the names of all values, built-in ones first, without importing other packages."""
        return tuple(dict.fromkeys([*(one.name for one in self.builtins), *(p.name for p in self._entry_points())]))

    def find(self, name: str) -> ValueT | None:
        """Return the value called `name`; None if there is none, or if the package that adds it fails."""
        for one in self.builtins:
            if one.name == name:
                return one
        loaded = [self._load(point) for point in self._entry_points() if point.name == name]
        return next((one for one in loaded if one is not None), None)

    def get(self, name: str) -> ValueT:
        """Return the value called `name`. Raises ModelError, with the closest match, if there is none."""
        if (found := self.find(name)) is not None:
            return found
        close = difflib.get_close_matches(name, names := self.names(), 1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(names)}"
        raise ModelError(f"unknown {self.label} {name!r}: {hint}")

    def all(self) -> tuple[ValueT, ...]:
        """Return all values, built-in ones first. A package that fails is skipped with a warning."""
        return tuple(one for name in self.names() if (one := self.find(name)) is not None)

    def _entry_points(self) -> Iterable[EntryPoint]:
        return entry_points(group=self.group)

    def _load(self, point: EntryPoint) -> ValueT | None:
        found: list[ValueT] = []

        def register(value: object) -> None:
            if not isinstance(value, self.kind):
                raise TypeError(f"expected {self.kind.__name__}, found {type(value).__name__}")
            if value.name != point.name:
                raise ValueError(f"the entry point is called {point.name!r} and the value {value.name!r}")
            found.append(value)

        load_entry_point(point, register)
        return found[0] if found else None


def load_entry_point(point: EntryPoint, register: Callable[[object], object]) -> None:
    """Import what an entry point names and register it; if either fails, log a warning."""
    try:
        register(point.load())
    except (Exception, SystemExit) as error:  # third-party code may raise anything, or exit
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        owner = point.dist.name if point.dist else point.name
        log.warning("skipping the %s of %s (%s): %s", point.group.removeprefix("mowa."), owner, point.value, reason)


def import_function(path: str) -> Callable[..., Any]:
    """Import a function that is named "module:function"."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
