"""Rows of every dataset format become the same conversation; invalid rows are reported with their position."""

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mowa.data.chat import conversations, files
from mowa.data.chat.formats import detect_format
from mowa.data.chat.samples import Conversation, Document, Message
from mowa.errors import DataError
from tests.unprivileged import unprivileged

WHAT, WARSAW = Message("user", "What?"), Message("assistant", "Warsaw")
FORMATS = {
    "messages": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Warsaw"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Warsaw"}]},
    "alpaca": {"instruction": "What?", "input": "", "output": "Warsaw"},
    "prompt/completion": {"prompt": "What?", "completion": "Warsaw"},
    "prompt/response": {"prompt": "What?", "response": "Warsaw"},
    "question/answer": {"question": "What?", "answer": "Warsaw"},
}


def parse(*rows, **kwargs):
    return conversations.parse_rows(((f"row {number}", row) for number, row in enumerate(rows, 1)), "data", **kwargs)


def messages(*turns):
    return {"messages": [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]}


GOOD = messages(("user", "What?"), ("assistant", "Warsaw"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_dataset_format(name):
    found = parse(FORMATS[name])
    assert found.samples == (Conversation("1", (WHAT, WARSAW)),)
    assert found.dataset_format.name == detect_format([FORMATS[name]]).name == name
    assert str(found.dataset_format).startswith(f"{name} (")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_container(tmp_path, name, suffix):
    file, row = tmp_path / f"train{suffix}", FORMATS[name]
    if suffix == ".csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(row))
            writer.writeheader()
            writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    elif suffix == ".parquet":
        arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(arrow.Table.from_pylist([row]), file)
    else:
        file.write_text(json.dumps([row], indent=1) if suffix == ".json" else json.dumps(row) + "\n")
    for path in (file, tmp_path):
        assert conversations.read_conversations(path).samples == (Conversation("1", (WHAT, WARSAW)),)


def test_splits_of_a_folder(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"id": split, **GOOD}))
    assert conversations.read_conversations(tmp_path).samples[0].id == "train"
    assert conversations.read_conversations(tmp_path, "dev").samples[0].id == "validation"
    with pytest.raises(DataError, match="has no split test"):
        conversations.read_conversations(tmp_path, "test")


def test_text_files_are_documents(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("# Zażółć\n")
    (tmp_path / "a.txt").write_bytes("\ufeffgęślą\r\njaźń".encode())
    assert set(conversations.read_conversations(tmp_path / "a.txt")) == {Document("a", "gęślą\njaźń")}
    assert conversations.read_conversations(tmp_path / "deep").samples == (Document("b", "# Zażółć\n"),)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        conversations.read_conversations(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "x"},', "broken JSON"),
        ("a.json", '["x"]', "row 1 is not a JSON object"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl:2: broken JSON"),
        ("a.jsonl", "\n", "is empty"),
        ("a.parquet", "x", "not a parquet file"),
        ("a.pdf", "x", "not a supported file"),
    ],
)
def test_unreadable_files_raise(tmp_path, name, content, message):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        conversations.read_conversations(tmp_path / name, on_invalid="stop")


def test_a_broken_line_is_dropped_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n{"text": "y"}\n')
    data = conversations.read_conversations(tmp_path / "a.jsonl")
    assert [sample.text for sample in data] == ["x", "y"]
    ((count, first),) = data.dropped.values()
    assert count == 1
    assert "a.jsonl:2: broken JSON" in first


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.csv", "a.parquet"])
def test_files_without_read_permission_raise(tmp_path, name):
    (tmp_path / name).touch(0)
    with unprivileged(), pytest.raises(DataError, match=r"Permission denied"):
        conversations.read_conversations(tmp_path / name)


def test_no_such_file():
    with pytest.raises(DataError, match="or write hub:owner/name"):
        next(files.read_rows("owner/name"))


def test_tools_reasoning_and_text_parts():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "id": "one",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"},
            {"role": "assistant", "content": "Warsaw", "reasoning_content": "hm"},
        ],
    }
    (found,) = parse(row)
    assert found.tools == tuple(row["tools"])
    assert found.messages == (
        WHAT,
        Message("assistant", "", ({**call, "function": {"name": "f", "arguments": {"x": 1}}},)),
        Message("tool", "", name="f", tool_call_id="c1"),
        Message("assistant", "Warsaw", reasoning_content="hm"),
    )


def test_alpaca_with_all_columns():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Count.", "history": [["a", "b"]]}
    (found,) = parse(row)
    assert [(turn.role, turn.content) for turn in found.messages] == [
        ("system", "Count."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


def test_prompt_and_completion_as_messages():
    turns = GOOD["messages"]
    assert parse({"prompt": turns[:1], "completion": turns[1:]}).samples[0].messages == (WHAT, WARSAW)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (messages(("narrator", "x"), ("assistant", "y")), "unknown role"),
        (messages(("user", " \n"), ("assistant", "y")), "empty message"),
        (messages(("user", "x"), ("assistant", None)), "empty message"),
        (messages(("user", "x")), "no assistant message"),
        (messages(("user", "x"), ("assistant", 7)), "content is not text"),
        (messages(("user", [{"type": "image"}]), ("assistant", "x")), "content is not text"),
        (messages(("user", "\ud83d"), ("assistant", "x")), "invalid Unicode"),
        ({"messages": []}, "no messages"),
        ({"messages": "Hello"}, "messages is not a list"),
        ({"messages": ["Hello"]}, "a message is not an object"),
        ({"id": 5}, "missing columns"),
    ],
)
def test_invalid_rows_are_counted_or_raise(row, reason):
    found = parse(GOOD, GOOD, row)
    assert len(found) == 2
    assert found.num_rows == 3
    (found_reason, (count, first)), *more = found.dropped.items()
    assert (found_reason, count, more) == (reason, 1, [])
    assert first.startswith("row 3: ")
    with pytest.raises(DataError, match=f"row 3: {reason}.*on_invalid: drop"):
        parse(GOOD, GOOD, row, on_invalid="stop")
    with pytest.raises(DataError, match="2 of 3 rows are invalid"):
        parse(GOOD, row, row)


@pytest.mark.parametrize("other", [name for name in FORMATS if name != "messages"])
def test_two_formats_raise_with_a_row_of_each(other):
    with pytest.raises(DataError, match=r"two formats.*messages .* in row 1, .* in row 3"):
        parse(GOOD, GOOD, FORMATS[other])
    merged = {key: None for row in (GOOD, FORMATS[other]) for key in row}
    with pytest.raises(DataError, match="two formats"):
        detect_format([merged | GOOD, merged | FORMATS[other]])


def test_unknown_columns_are_listed():
    with pytest.raises(DataError, match=r"'prompt', 'chosen', 'rejected'.*Preference pairs"):
        parse({"prompt": "x", "chosen": "y", "rejected": "z"})


def test_warnings():
    twice = messages(("user", "x"), ("assistant", "y"), ("assistant", "z"), ("user", "bye"))
    assert set(parse(twice).warnings) == {"two assistant messages in a row", "ends without an answer"}


def test_ids_are_unique():
    assert [item.id for item in parse({"id": "a", **GOOD}, {"id": "a", **GOOD}, GOOD)] == ["a", "a-2", "3"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "type", "text"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # depends on how busy the machine is
@given(st.dictionaries(st.sampled_from(["messages", "conversations", "tools", "text", "prompt", "completion"]), JSON))
def test_any_row_is_parsed_or_raises_data_error(row):
    message = ""
    try:
        assert len(parse(row)) == 1
    except DataError as error:
        message = str(error)
    assert not message or "row 1" in message
