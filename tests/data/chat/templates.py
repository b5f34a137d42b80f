"""Recipes of fine-tuning as hypothesis draws them: a value for every knob, made from what the schema says of it."""

import dataclasses
import typing

from hypothesis import strategies as st

from mowa.training.config import schema
from mowa.training.config.ctc import CTCRecipe

LEAVES = tuple(schema.iter_options(CTCRecipe))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHARES = st.floats(0, 1)

# What the schema says of a knob alone is too little where it depends on others, or is checked by hand.
OWN = {
    "train": st.sampled_from(["head", "adapters", "lora", "encoder", "all"]) | st.integers(1, 48).map("top-{}".format),
    "qat_group": st.sampled_from([32, 64, 128]),
    "data.shortest_s": st.floats(0, 5),
    "data.longest_s": st.floats(6, 60),
    "lora.where": st.lists(st.sampled_from(["attention", "mlp"]), min_size=1, unique=True),
    "optimise.epochs": st.floats(0.1, 1000),
    "optimise.warmup": st.floats(0, 0.5),
    "optimise.hold": st.floats(0, 0.5),
    "augment.speed": st.tuples(st.floats(0.1, 1), st.floats(1, 10)).map(list),
    **{f"augment.{name}": SHARES for name in ("room", "equalise", "telephone", "noise", "gaps")},
    **{
        f"augment.{name}": st.tuples(st.floats(-90, 0), st.floats(0, 90)).map(list)
        for name in ("snr_db", "loudness_db")
    },
    **{f"masks.{name}": SHARES for name in ("time", "features")},
    **{f"masks.{name}": st.integers(1, 100) for name in ("time_span", "features_span")},
}


def parts(splits=TEXT):
    """Recordings, with shares for all of them or for none."""

    def of(shares):
        part = st.fixed_dictionaries({"path": TEXT.filter(bool), "split": splits, "share": shares})
        return st.lists(part, min_size=1, max_size=3)

    return of(st.just(0.0)) | of(st.floats(0.01, 1))


def values(leaf):
    """What may stand in YAML for one knob."""
    origin, members = typing.get_origin(leaf.hint), typing.get_args(leaf.hint)
    if leaf.dotted in OWN:
        return OWN[leaf.dotted]
    if origin is tuple and dataclasses.is_dataclass(members[0]):
        return parts() if leaf.default is dataclasses.MISSING else parts() | st.just([])
    if leaf.choices:
        one = st.sampled_from(leaf.choices)
        return st.lists(one, max_size=2) if origin is tuple else one
    if origin is tuple:
        return st.lists(st.floats(leaf.least, leaf.most), min_size=2, max_size=2)
    if origin is dict:
        return st.dictionaries(TEXT.filter(bool), TEXT, max_size=3)
    if leaf.hint is float:
        return st.floats(leaf.least, 1e6 if leaf.most is None else leaf.most)
    if leaf.hint is int:
        return st.integers(leaf.least, leaf.most)
    return st.booleans() if leaf.hint is bool else TEXT


@st.composite
def trees(draw):
    """Dotted path → value, for every knob: a recipe that says everything."""
    turns = {leaf.dotted: draw(values(leaf)) for leaf in LEAVES}
    if turns["distil.layers"] or turns["qat"] != "none":
        turns |= {"train": "all", "vocabulary": "keep", "batch.layout": "packed"}
    return turns


def another(leaf):
    """A value of one knob that is not its default, and that the others' defaults allow."""
    if leaf.hint is bool:
        return not leaf.default
    if leaf.choices:
        found = next(word for word in leaf.choices if word not in (leaf.default, *_several(leaf.default)[:1]))
        return [found] if isinstance(leaf.default, tuple) else found
    kind = typing.get_origin(leaf.hint) or leaf.hint
    if kind is tuple:
        numbers = isinstance(leaf.default, tuple) and leaf.default
        return [number * 0.99 for number in leaf.default] if numbers else [{"path": "other.jsonl", "split": "test"}]
    if kind is dict:
        return {"ё": "е", ",": "=", "\\": ""}
    if kind is str:
        return "lora" if leaf.dotted == "train" else "another"
    return leaf.default + 1 if kind is int else round(leaf.default * 0.9 + 0.05, 6)


def _several(value):
    return value if isinstance(value, tuple) else ()
