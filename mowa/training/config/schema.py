"""Convert YAML to frozen dataclasses, key by key, and list a dataclass's options for the CLI and the reference page.

The options themselves are declared in `ctc`, `causal` and `shared`, each once, beside its default. `from_dict` reads a
tree of plain values, `to_yaml` writes one, `iter_options` lists the leaves.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from mowa.errors import MissingDependency, RecipeError
from mowa.io.atomic import atomic_write

Kind = TypeVar("Kind")
UNLIMITED = "full"  # how YAML spells an infinite number
_NEEDED = "recipes need pyyaml: pip install 'mowa[train]'"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    unlimited: bool = False,
) -> Any:
    """Declare a dataclass field with its default, one line of help, its choices and its range.

    With `unlimited`, the number may be infinite, which YAML spells `full`.

    For lists and pairs, choices and range apply to each member.
    """
    about = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "unlimited": unlimited}
    return dataclasses.field(default=default, metadata=about)


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        RecipeError: the file is missing, is not YAML, or repeats a key.
        MissingDependency: pyyaml is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise MissingDependency(_NEEDED) from None

    class UniqueKeyLoader(yaml.SafeLoader):  # the stock loader silently keeps the last of two equal keys
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if not isinstance(key, yaml.ScalarNode):
                    raise RecipeError(f"{path}: a key is a list or mapping (line {key.start_mark.line + 1})")
                if key.value in seen:
                    raise RecipeError(f"{path}: duplicate key {key.value} (line {key.start_mark.line + 1}); keep one")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-13-45, not UTF-8
        raise RecipeError(f"{path}: invalid YAML ({' '.join(str(error).split())})") from None


def to_yaml(value: Any) -> str:
    """Return a dataclass as YAML with every option spelled out; `from_dict` reads it back to an equal value."""
    try:
        import yaml
    except ImportError:
        raise MissingDependency(_NEEDED) from None

    class Dumper(yaml.SafeDumper):
        pass

    def represent_str(dumper: Any, data: str) -> Any:  # unquoted Unicode line breaks do not survive a round trip
        quoted = any(sign in data for sign in "\x85\u2028\u2029")
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style='"' if quoted else None)

    def represent_float(dumper: Any, data: float) -> Any:
        if data == math.inf:
            return dumper.represent_scalar("tag:yaml.org,2002:str", UNLIMITED)
        return yaml.SafeDumper.represent_float(dumper, data)

    Dumper.add_representer(str, represent_str)
    Dumper.add_representer(float, represent_float)
    written: str = yaml.dump(to_tree(value), Dumper=Dumper, allow_unicode=True, sort_keys=False, width=120)
    return written


def to_tree(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain values, with every option; `from_dict` reads it back to an equal value."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value)))  # tuples become lists
    return tree


def write_yaml(value: Any, path: Path) -> None:
    """Write `to_yaml(value)` to a file atomically; other processes of a run may be reading it."""
    atomic_write(path, to_yaml(value))


def from_dict(cls: type[Kind], tree: Any, where: str, *, defaults: Any = None) -> Kind:
    """Build the dataclass `cls` from a tree of plain values.

    Keys that the tree omits take their value from `defaults`, or else the default of the class.

    Raises:
        RecipeError: a key is unknown, missing or has a bad value; the message holds its path and the closest valid key.
    """
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: expected keys and values, found {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise RecipeError(f"{where}: unknown key {key}; {_nearest(str(key), cls)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {name: field_default(field, defaults) for name, field in fields.items()}
    missing = [name for name, value in values.items() if value is dataclasses.MISSING and name not in tree]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} is missing")
    for key, found in tree.items():
        value = _value(hints[key], found, f"{where}: {key}", values[key])
        if value == () and values[key] is dataclasses.MISSING:
            raise RecipeError(f"{where}: {key}: empty; at least one is required")
        _validate(fields[key], value, f"{where}: {key}")
        values[key] = value
    return cls(**values)


def field_default(field: Any, defaults: Any = None) -> Any:
    """Return a field's value in `defaults`, or else its own default (dataclasses.MISSING where it has none)."""
    if defaults is not None:
        return getattr(defaults, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _nearest(key: str, kind: Any) -> str:
    """Suggest the key that was probably meant, here or in a nested section."""
    hints = typing.get_type_hints(kind)
    if near := difflib.get_close_matches(key, hints, 1, 0.75):
        return f"did you mean {near[0]}?"
    below = {leaf.path[-1]: ": ".join(leaf.path) for leaf in iter_options(kind)}
    if near := difflib.get_close_matches(key, below, 1, 0.8):
        return f"did you mean {below[near[0]]}?"
    return f"known: {', '.join(hints)}"


def _validate(field: Any, value: Any, where: str) -> None:
    """Check choices and range, for each member of a tuple."""
    choices, minimum, maximum = (field.metadata.get(key) for key in ("choices", "minimum", "maximum"))
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float) and math.isinf(one) and not field.metadata.get("unlimited"):
            raise RecipeError(f"{where}: expected a finite number, found {UNLIMITED if one > 0 else one}")
        if choices and one not in choices:
            near = difflib.get_close_matches(str(one), choices, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(choices)}"
            raise RecipeError(f"{where}: {one!r} is not a valid choice; {hint}")
        if minimum is not None and one < minimum:
            raise RecipeError(f"{where} is {one}; it must be at least {minimum}")
        if maximum is not None and one > maximum:
            raise RecipeError(f"{where} is {one}; it must be at most {maximum}")


def _value(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    """Convert one YAML value to the type `hint`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is UnionType or origin is typing.Union:
        if value is None and type(None) in parts:
            return None
        (hint,) = (part for part in parts if part is not type(None))
        return _value(hint, value, where, default)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        known = dataclasses.is_dataclass(default)
        tree = {} if value is None and known else value  # a section whose keys are all commented out
        return from_dict(typing.cast(type, hint), tree, where, defaults=default if known else None)
    if hint == tuple[float, ...] and (value == UNLIMITED or _is_number(value)):
        value = [value]  # a list of one number may be written without brackets
    if origin is tuple and parts[-1] is Ellipsis and isinstance(value, list | tuple):
        return tuple(_value(parts[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(parts):
        return tuple(_value(part, item, where) for part, item in zip(parts, value, strict=True))
    if origin is dict and isinstance(value, dict):
        of, to = parts
        return {_value(of, key, where): _value(to, item, f"{where}: {key}") for key, item in value.items()}
    wanted = origin or hint
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = math.inf if value == UNLIMITED else float(value)  # YAML 1.1 reads 1e-4 as a string
    valid = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
    if valid and origin is None and not (wanted is float and math.isnan(value)):
        return value
    advice = "; write it as a list: [ ]" if origin is tuple and isinstance(value, str) else ""
    if wanted is str and isinstance(value, bool | int | float):
        advice = "; put it in quotes"  # YAML reads no, on and 1 as other types
    raise RecipeError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}{advice}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One recipe option: its path, type, default, help, choices and range."""

    path: tuple[str, ...]
    hint: Any
    default: Any  # dataclasses.MISSING where the option is required
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def iter_options(cls: Any, *, prefix: tuple[str, ...] = (), defaults: Any = None) -> Iterator[OptionSpec]:
    """Yield the options of a dataclass and of its nested dataclasses, in order; `defaults` overrides their defaults."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, hint, default = (*prefix, field.name), hints[field.name], field_default(field, defaults)
        if dataclasses.is_dataclass(hint):
            yield from iter_options(hint, prefix=path, defaults=default if dataclasses.is_dataclass(default) else None)
            continue
        about = field.metadata
        yield OptionSpec(
            path,
            hint,
            default,
            about.get("help", ""),
            about.get("choices", ()),
            about.get("minimum"),
            about.get("maximum"),
        )


def apply_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `tree` with each dotted path of `overrides` set to its value.

    Raises:
        RecipeError: a path goes through a value that is not a section.
    """
    out = dict(tree)
    for dotted, value in overrides.items():
        first, _, rest = dotted.partition(".")
        below = out.get(first)
        if rest and not isinstance(below, dict | None):
            raise RecipeError(f"{first}: expected keys and values, found {below!r}")
        out[first] = apply_overrides(below or {}, {rest: value}) if rest else value
    return out
