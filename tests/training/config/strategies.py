"""Hypothesis strategies for CTC recipes: a value for every option, from its type, choices and range in the schema."""

import dataclasses
import typing

from hypothesis import strategies as st

from mowa.training.config import schema
from mowa.training.config.ctc import CTCRecipe

LEAVES = tuple(schema.iter_options(CTCRecipe))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FRACTIONS = st.floats(0, 1)
CAUSAL_ONLY = ("lora.modules_to_save", "lora.target_parameters")  # must be empty for speech
METHODS = ["head", "bottleneck", "lora", "encoder", "full"]

# Options whose type, choices and range say too little: they depend on others, or are checked by hand.
OWN = {
    "method": st.sampled_from(METHODS) | st.integers(1, 48).map("top-{}".format),
    "qat_group_size": st.sampled_from([32, 64, 128]),
    "data.min_duration_s": st.floats(0, 5),
    "data.max_duration_s": st.floats(6, 60),
    "streaming.chunk_s": st.lists(st.floats(0.02, 10), max_size=3),
    "streaming.lookahead_s": st.lists(st.floats(0, 2), min_size=1, max_size=3),
    "lora.target_modules": st.lists(st.sampled_from(["attention", "mlp"]), min_size=1, unique=True),
    **dict.fromkeys(CAUSAL_ONLY, st.just([])),
    "optimizer.epochs": st.floats(0.1, 1000),
    "optimizer.warmup_ratio": st.floats(0, 0.5),
    "optimizer.hold_ratio": st.floats(0, 0.5),
    "augment.speed": st.tuples(st.floats(0.1, 1), st.floats(1, 10)).map(list),
    **{f"augment.{name}": FRACTIONS for name in ("reverb", "equalize", "telephone", "noise", "gaps")},
    **{
        f"augment.{name}": st.tuples(st.floats(-90, 0), st.floats(0, 90)).map(list)
        for name in ("snr_db", "loudness_db")
    },
    **{f"spec_augment.{name}": FRACTIONS for name in ("mask_time_prob", "mask_feature_prob")},
    **{f"spec_augment.{name}": st.integers(1, 100) for name in ("mask_time_length", "mask_feature_length")},
}


def sources(splits=TEXT):
    """Data sources, with a share for all of them or for none."""

    def with_shares(shares):
        source = st.fixed_dictionaries({"path": TEXT.filter(bool), "split": splits, "share": shares})
        return st.lists(source, min_size=1, max_size=3)

    return with_shares(st.just(0.0)) | with_shares(st.floats(0.01, 1))


def values(leaf):
    """YAML values of one option."""
    origin, members = typing.get_origin(leaf.hint), typing.get_args(leaf.hint)
    if leaf.dotted in OWN:
        return OWN[leaf.dotted]
    if origin is tuple and dataclasses.is_dataclass(members[0]):
        return sources() if leaf.default is dataclasses.MISSING else sources() | st.just([])
    if leaf.choices:
        one = st.sampled_from(leaf.choices)
        return st.lists(one, max_size=2) if origin is tuple else one
    if origin is tuple:
        return st.lists(st.floats(leaf.minimum, leaf.maximum, allow_infinity=False), min_size=2, max_size=2)
    if origin is dict:
        return st.dictionaries(TEXT.filter(bool), TEXT, max_size=3)
    if leaf.hint is float:
        return st.floats(leaf.minimum, 1e6 if leaf.maximum is None else leaf.maximum, allow_infinity=False)
    if leaf.hint is int:
        return st.integers(leaf.minimum, leaf.maximum)
    return st.booleans() if leaf.hint is bool else TEXT


@st.composite
def trees(draw):
    """Dotted path → value for every option of a valid recipe."""
    drawn = {leaf.dotted: draw(values(leaf)) for leaf in LEAVES}
    if drawn["distillation.student_layers"] or drawn["qat"] != "none":
        drawn |= {"method": "full", "vocabulary": "keep", "batch.packing": True, "streaming.chunk_s": []}
    if drawn["streaming.chunk_s"]:
        drawn |= {"method": draw(st.sampled_from(["encoder", "full", "top-3"])), "batch.packing": False}
    else:
        drawn |= {"streaming.left_context_s": "full", "streaming.lookahead_s": [0.0]}
    return drawn


def another(leaf):
    """A value of one option that is not its default, and is valid with the other defaults."""
    if leaf.dotted in ("streaming.chunk_s", "streaming.lookahead_s"):
        return [0.32, 0.64]
    if leaf.dotted == "streaming.left_context_s":
        return 2.5
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
        return "lora" if leaf.dotted == "method" else "another"
    return leaf.default + 1 if kind is int else round(leaf.default * 0.9 + 0.05, 6)


def _several(value):
    return value if isinstance(value, tuple) else ()
