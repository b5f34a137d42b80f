"""A tree of plain values ⇄ frozen dataclasses, checked key by key; and the same knobs as flags and as a reference page.

What the knobs mean is not known here: `recipe` and `tuning` say it, each knob once, beside its default.
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
UNLIMITED = "full"  # how a number without an end is written
_NEEDED = "recipes need pyyaml: pip install 'mowa[train]'"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its default, one line of help, the words it takes if they are few, and its range.

    Of a list or pair, choices and range are those of each of its members.
    """
    about = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=about)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. RecipeError where it is none, or says a key twice; MissingPart without pyyaml."""
    try:
        import yaml
    except ImportError:
        raise MissingDependency(_NEEDED) from None

    class Once(yaml.SafeLoader):  # the stock one takes the last of two equal keys and says nothing
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key.value in seen:
                    raise RecipeError(f"{path}: {key.value} stands twice (line {key.start_mark.line + 1}): keep one")
                if isinstance(key, yaml.ScalarNode):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Once)
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(wrong).split())})") from None


def to_yaml(value: Any) -> str:
    """A dataclass → YAML that `tree` and `build` give it back from, every knob spelt out."""
    try:
        import yaml
    except ImportError:
        raise MissingDependency(_NEEDED) from None

    class Dumper(yaml.SafeDumper):
        pass

    def word(dumper: Any, data: str) -> Any:  # unquoted, the line ends of Unicode would be read back as others
        odd = any(sign in data for sign in "\x85\u2028\u2029")
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style='"' if odd else None)

    Dumper.add_representer(str, word)
    plain = json.loads(json.dumps(dataclasses.asdict(value)))  # tuples become lists
    written: str = yaml.dump(plain, Dumper=Dumper, allow_unicode=True, sort_keys=False, width=120)
    return written


def write_yaml(value: Any, path: Path) -> None:
    """`text` into a file, whole or not at all: several processes of a run may read it while it is written again."""
    atomic_write(path, to_yaml(value))


def from_dict(cls: type[Kind], tree: Any, where: str, *, defaults: Any = None) -> Kind:
    """A tree of plain values → `kind`. A wrong key or value: RecipeError with its path and the nearest right key.

    What the tree leaves out stands as in `standing`, or else as the class says.
    """
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: expected keys and values, found {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise RecipeError(f"{where}: {key} is no key here; {_nearest(str(key), cls)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {name: field_default(field, defaults) for name, field in fields.items()}
    missing = [name for name, value in values.items() if value is dataclasses.MISSING and name not in tree]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} is missing")
    for key, found in tree.items():
        value = _value(hints[key], found, f"{where}: {key}", values[key])
        if value == () and values[key] is dataclasses.MISSING:
            raise RecipeError(f"{where}: {key}: at least one is needed, found none")
        _validate(fields[key], value, f"{where}: {key}")
        values[key] = value
    return cls(**values)


def field_default(field: Any, defaults: Any = None) -> Any:
    """Where a dataclass's field stands unless it is turned: as in the value `within`, or else at its default."""
    if defaults is not None:
        return getattr(defaults, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _nearest(key: str, kind: Any) -> str:
    """The key that was meant: one of these, or one of the same name further down."""
    hints = typing.get_type_hints(kind)
    if near := difflib.get_close_matches(key, hints, 1):
        return f"did you mean {near[0]}?"
    below = {leaf.path[-1]: ": ".join(leaf.path) for leaf in iter_options(kind)}
    if near := difflib.get_close_matches(key, below, 1, 0.8):
        return f"did you mean {below[near[0]]}?"
    return f"known: {', '.join(hints)}"


def _validate(field: Any, value: Any, where: str) -> None:
    """Choices and range, of each member where there are several."""
    choices, least, most = (field.metadata.get(key) for key in ("choices", "minimum", "maximum"))
    for one in value if isinstance(value, tuple) else (value,):
        if choices and one not in choices:
            near = difflib.get_close_matches(str(one), choices, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(choices)}"
            raise RecipeError(f"{where}: {one!r} is none of them; {hint}")
        if least is not None and one < least:
            raise RecipeError(f"{where} is {one}; it must be at least {least}")
        if most is not None and one > most:
            raise RecipeError(f"{where} is {one}; it must be at most {most}")


def _value(hint: Any, value: Any, where: str, standing: Any = dataclasses.MISSING) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is UnionType or origin is typing.Union:
        if value is None and type(None) in parts:
            return None
        (hint,) = (part for part in parts if part is not type(None))
        return _value(hint, value, where, standing)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        known = dataclasses.is_dataclass(standing)
        tree = {} if value is None and known else value  # a group whose keys are all commented out
        return from_dict(typing.cast(type, hint), tree, where, defaults=standing if known else None)
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
            value = math.inf if value == UNLIMITED else float(value)  # YAML 1.1 reads 1e-4 as a word
    right = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
    if right and origin is None and not (wanted is float and math.isnan(value)):
        return value
    advice = "; write it as a list: [ ]" if origin is tuple and isinstance(value, str) else ""
    if wanted is str and isinstance(value, bool | int | float):
        advice = "; write it in quotes"  # no, on, 1: words in a language or a folder, but not in YAML
    raise RecipeError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}{advice}")


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One knob: its dotted path, what it takes, where it stands unless it is turned, and what it is for."""

    path: tuple[str, ...]
    hint: Any
    default: Any  # dataclasses.MISSING where it must be given
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def iter_options(cls: Any, *, prefix: tuple[str, ...] = (), defaults: Any = None) -> Iterator[OptionSpec]:
    """Every knob of a dataclass and of the dataclasses in it, in order. Defaults are those of `standing`, if given."""
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
    """A copy of `tree` in which each dotted path of `settings` has its value. RecipeError where a group is none."""
    out = dict(tree)
    for dotted, value in overrides.items():
        first, _, rest = dotted.partition(".")
        below = out.get(first)
        if rest and not isinstance(below, dict | None):
            raise RecipeError(f"{first}: expected keys and values, found {below!r}")
        out[first] = apply_overrides(below or {}, {rest: value}) if rest else value
    return out
