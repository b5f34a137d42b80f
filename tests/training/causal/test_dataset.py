"""What a run holds out, and what a recipe says about its data."""

import json

import pytest

from mowa import loading
from mowa.errors import DataError
from mowa.training.causal import dataset
from mowa.training.config import dispatch
from tests.training.causal import chats


def split(folder, model, **overrides):
    return dataset.load_splits(dispatch.parse(chats.recipe(folder, **overrides), "test"), model)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return loading.load(str(chats.model(tmp_path_factory.mktemp("causal") / "base")))


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pair(number, **columns):
    return {"prompt": f"what {number}", "completion": f"this {number}", **columns}


def ids(samples):
    return {sample.id for sample in samples}


def test_ids_with_a_number_sign_are_held_out_one_by_one(tmp_path, model):
    named = write(tmp_path / "named.jsonl", [pair(number, id=f"forum#{number}") for number in range(20)])
    plain = write(tmp_path / "plain.jsonl", [pair(number, id=f"forum-{number}") for number in range(20)])
    found, expected = (split(tmp_path, model, data__train=data) for data in (named, plain))
    assert len(found.dev["dev"]) == len(expected.dev["dev"]) == 4
    assert {one.replace("#", "-") for one in ids(found.dev["dev"])} == ids(expected.dev["dev"])


def test_equal_ids_in_two_sources_are_two_conversations(tmp_path, model):
    sources = [write(tmp_path / f"{name}.jsonl", [pair(f"{name} {n}") for n in range(10)]) for name in "ab"]
    found = split(tmp_path, model, data__train=sources, data__hold_out=0.05)
    assert (len(found.train), len(found.dev["dev"])) == (19, 1)


def test_most_rows_being_too_long_is_no_matter_of_held_out_sets(tmp_path, model):
    rows = [pair("word " * 200, id=f"n{number}") for number in range(19)] + [pair(1)]
    data = write(tmp_path / "long.jsonl", rows)
    with pytest.raises(DataError, match=r"long.jsonl: 19 of 20 rows are left out.*longer than 128 tokens"):
        split(tmp_path, model, data__train=data)
    with pytest.raises(DataError, match=r"long.jsonl: n0: longer than 128 tokens"):
        split(tmp_path, model, data__train=data, data__on_invalid="stop")
