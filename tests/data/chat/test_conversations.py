"""Rows of every shape become the same conversation, and what is none is said with where it stands."""

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mowa.data.chat import conversations, files
from mowa.data.chat.conversations import Conversation, Document, Message
from mowa.errors import DataError

WHAT, WARSAW = Message("user", "What?"), Message("assistant", "Warsaw")
SHAPES = {
    "messages": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Warsaw"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Warsaw"}]},
    "alpaca": {"instruction": "What?", "input": "", "output": "Warsaw"},
    "prompt/completion": {"prompt": "What?", "completion": "Warsaw"},
    "prompt/response": {"prompt": "What?", "response": "Warsaw"},
    "question/answer": {"question": "What?", "answer": "Warsaw"},
}


def gather(*rows, **how):
    return conversations.parse_rows(((f"row {number}", row) for number, row in enumerate(rows, 1)), "data", **how)


def messages(*turns):
    return {"messages": [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]}


GOOD = messages(("user", "What?"), ("assistant", "Warsaw"))


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_says_the_same(name):
    found = gather(SHAPES[name])
    assert found.samples == (Conversation("1", (WHAT, WARSAW)),)
    assert found.dataset_format.name == conversations.detect_format([SHAPES[name]]).name == name
    assert str(found.dataset_format).startswith(f"{name} (")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_container(tmp_path, name, suffix):
    file, row = tmp_path / f"train{suffix}", SHAPES[name]
    if suffix == ".csv":
        with file.open("w", newline="") as there:
            writer = csv.DictWriter(there, list(row))
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
    with pytest.raises(DataError, match="no split test"):
        conversations.read_conversations(tmp_path, "test")


def test_text_files_are_passages(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("# Zażółć\n")
    (tmp_path / "a.txt").write_bytes("\ufeffgęślą\r\njaźń".encode())
    assert set(conversations.read_conversations(tmp_path / "a.txt")) == {Document("a", "gęślą\njaźń")}
    assert conversations.read_conversations(tmp_path / "deep").samples == (Document("b", "# Zażółć\n"),)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        conversations.read_conversations(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"text": "x"},', "broken JSON"),
        ("a.json", '["x"]', "row 1: is JSON, but no object"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl:2: broken JSON"),
        ("a.jsonl", "\n", "is empty"),
        ("a.parquet", "x", "no parquet file"),
        ("a.pdf", "x", "nothing that can be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        conversations.read_conversations(tmp_path / name)


def test_no_such_file():
    with pytest.raises(DataError, match="say hub:owner/name"):
        next(files.read_rows("owner/name"))


def test_everything_a_row_may_hold():
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
    (found,) = gather(row)
    assert found.tools == tuple(row["tools"])
    assert found.messages == (
        WHAT,
        Message("assistant", "", ({**call, "function": {"name": "f", "arguments": {"x": 1}}},)),
        Message("tool", "", name="f", tool_call_id="c1"),
        Message("assistant", "Warsaw", reasoning_content="hm"),
    )


def test_alpaca_with_everything():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Count.", "history": [["a", "b"]]}
    (found,) = gather(row)
    assert [(turn.role, turn.content) for turn in found.messages] == [
        ("system", "Count."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


def test_prompt_and_completion_as_messages():
    turns = GOOD["messages"]
    assert gather({"prompt": turns[:1], "completion": turns[1:]}).samples[0].messages == (WHAT, WARSAW)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (messages(("narrator", "x"), ("assistant", "y")), "unknown role"),
        (messages(("user", " \n"), ("assistant", "y")), "empty turn"),
        (messages(("user", "x"), ("assistant", None)), "empty turn"),
        (messages(("user", "x")), "no turn of the assistant"),
        (messages(("user", "x"), ("assistant", 7)), "content that is no text"),
        (messages(("user", [{"type": "image"}]), ("assistant", "x")), "content that is no text"),
        (messages(("user", "\ud83d"), ("assistant", "x")), "broken Unicode"),
        ({"messages": []}, "no turns"),
        ({"messages": "Hello"}, "turns that are no list"),
        ({"messages": ["Hello"]}, "a turn that is no object"),
        ({"id": 5}, "the columns are missing"),
    ],
)
def test_bad_rows_are_counted_or_stop(row, reason):
    found = gather(GOOD, GOOD, row)
    assert len(found) == 2
    assert found.num_rows == 3
    (told, (count, first)), *more = found.dropped.items()
    assert (told, count, more) == (reason, 1, [])
    assert first.startswith("row 3: ")
    with pytest.raises(DataError, match=f"row 3: {reason}.*bad: drop"):
        gather(GOOD, GOOD, row, bad="stop")
    with pytest.raises(DataError, match="2 of 3 rows cannot be used"):
        gather(GOOD, row, row)


@pytest.mark.parametrize("other", [name for name in SHAPES if name != "messages"])
def test_two_shapes_are_named_with_a_row_of_each(other):
    with pytest.raises(DataError, match=r"two shapes.*messages .* in row 1, .* as in row 3"):
        gather(GOOD, GOOD, SHAPES[other])
    merged = {key: None for row in (GOOD, SHAPES[other]) for key in row}
    with pytest.raises(DataError, match="two shapes"):
        conversations.detect_format([merged | GOOD, merged | SHAPES[other]])


def test_unknown_columns_are_listed():
    with pytest.raises(DataError, match=r"'prompt', 'chosen', 'rejected'.*Pairs of better and worse"):
        gather({"prompt": "x", "chosen": "y", "rejected": "z"})


def test_what_is_allowed_is_noted():
    twice = messages(("user", "x"), ("assistant", "y"), ("assistant", "z"), ("user", "bye"))
    assert set(gather(twice).warnings) == {"two turns of the assistant in a row", "ends without an answer"}


def test_ids_are_told_apart():
    assert [item.id for item in gather({"id": "a", **GOOD}, {"id": "a", **GOOD}, GOOD)] == ["a", "a-2", "3"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "type", "text"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # how busy the machine is proves nothing
@given(st.dictionaries(st.sampled_from(["messages", "conversations", "tools", "text", "prompt", "completion"]), JSON))
def test_whatever_stands_in_a_row_is_read_or_refused_in_words(row):
    said = ""
    try:
        assert len(gather(row)) == 1
    except DataError as wrong:
        said = str(wrong)
    assert not said or "row 1" in said
