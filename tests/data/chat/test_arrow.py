"""Tables with a schema hold the same conversations as JSON Lines: nulls that fill up their objects are none of them."""

import json

import pytest

from mowa.data.chat import conversations

datasets = pytest.importorskip("datasets")


def row(tools=(), **arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    schemas = [{"type": "function", "function": {"name": "f", "parameters": {"properties": one}}} for one in tools]
    return {"messages": turns, "tools": schemas}


ANSWER = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Warsaw"}], "tools": []}
OBJECTS = [
    row([{"city": {"type": "string"}}, {"ticker": {"type": "string", "enum": ["A"]}}], city="X"),
    row(ticker="Y", options={"a": 1}),
    row(options={"b": [{"c": 1}, {"d": 2}]}),
    row(),
    ANSWER,
]
MIXED = [row(value="X", missing=None), row(value=3), row(value={"deep": None, "more": [None]}), ANSWER]


def read(path, split=""):
    return conversations.read_conversations(path, split).samples


@pytest.mark.parametrize("rows", [OBJECTS, MIXED], ids=["objects", "mixed"])
@pytest.mark.parametrize("source", ["json", "list"])
def test_parquet_and_saved_data_sets_hold_the_conversations_of_json_lines(tmp_path, rows, source):
    """Nulls of the JSON stay where datasets keeps them, which is in columns of mixed types."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    expected = read(tmp_path / "a.jsonl")
    if source == "json":
        data = datasets.Dataset.from_json(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    else:
        data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "a.parquet") == expected
    assert read(tmp_path / "saved") == expected
    assert read(tmp_path / "splits", "train") == expected


def test_parquet_without_the_features_of_datasets(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(OBJECTS[:3]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in OBJECTS[:3]))
    assert read(tmp_path / "a.parquet") == read(tmp_path / "a.jsonl")


def test_a_stream_from_the_hub_holds_the_conversations_of_json_lines(tmp_path, monkeypatch):
    build = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda name, config=None, *, revision=None: build(str(tmp_path / "repo"), cache_dir=str(tmp_path / "hf")),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo" / "data").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in MIXED))
    data = datasets.Dataset.from_list(MIXED, on_mixed_types="use_json")
    data.to_parquet(tmp_path / "repo/data/train-00000-of-00001.parquet")
    assert read("hub:owner/name") == read(tmp_path / "a.jsonl")


def test_texts_beside_paths_do_not_hide_conversations(tmp_path):
    """Columns that a corpus of speech would have are no reason to read those alone."""
    rows = [{"path": "a.wav", "text": "x", **ANSWER}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    found = conversations.read_conversations(tmp_path / "saved")
    assert found.dataset_format.name == "messages"
    assert set(found.unused) == {"path", "text"}
