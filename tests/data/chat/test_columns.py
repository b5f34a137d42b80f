"""Every column is used or reported, under the names of the field or those that a recipe maps."""

import gzip
import json

import pytest

from mowa.data.chat import conversations
from mowa.data.chat.samples import Conversation, Message
from mowa.errors import DataError
from tests.data.chat.test_conversations import FORMATS, GOOD, parse

WHAT, WARSAW = Message("user", "What?"), Message("assistant", "Warsaw")
TALK = (WHAT, WARSAW)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What?", "context": "Poland", "answer": "Warsaw"},
        {"prompt": "What?", "context": "Poland", "completion": "Warsaw"},
        {"prompt": "What?", "input": "Poland", "response": "Warsaw"},
        {"instruction": "What?", "context": "Poland", "response": "Warsaw"},
        {"user": "What?", "context": "Poland", "assistant": "Warsaw"},
    ],
)
def test_the_context_of_a_question_follows_it(row):
    found = parse(row)
    assert found.samples[0].messages == (Message("user", "What?\n\nPoland"), WARSAW)
    assert not found.unused


@pytest.mark.parametrize("name", [*FORMATS, "text", "user/assistant"])
def test_columns_that_are_not_used_are_reported_in_every_shape(name):
    others = {"text": {"text": "Warsaw"}, "user/assistant": {"user": "What?", "assistant": "Warsaw"}}
    row = (FORMATS | others)[name] | {"id": "a", "source": "web", "title": "", "score": None, "tags": [], "split": "x"}
    found = parse(row, row | {"quality": 0})
    assert found.dataset_format.name == name
    assert found.unused == {"source": (2, "row 1"), "quality": (1, "row 2")}


def test_keys_of_turns_that_are_not_used_are_reported():
    turns = [
        {"role": "user", "content": "What?", "mood": "bad"},
        {"role": "assistant", "content": "Warsaw", "refs": [1]},
    ]
    assert parse({"messages": turns}).unused == {"messages[].mood": (1, "row 1"), "messages[].refs": (1, "row 1")}
    both = parse({"prompt": turns[:1], "completion": turns[1:], "input": "Poland"})
    assert list(both.unused) == ["input", "prompt[].mood", "completion[].refs"]


@pytest.mark.parametrize(
    "row",
    [
        {"user": "What?", "assistant": "Warsaw"},
        {"human": "What?", "bot": "Warsaw"},
        {"conversations": [{"user": "What?", "assistant": "Warsaw"}]},
        {"conversations": [{"human": "What?", "gpt": "Warsaw"}]},
        {"messages": [{"question": "What?", "answer": "Warsaw"}]},
        {"messages": [{"speaker": "user", "text": "What?"}, {"speaker": "assistant", "text": "Warsaw"}]},
        {"dialog": [{"speaker": "Human", "text": "What?"}, {"speaker": "AI", "text": "Warsaw"}]},
        {"messages": [{"role": None, "from": "human", "value": "What?"}, {"from": "gpt", "value": "Warsaw"}]},
        {"question": "What?", "answers": ["Warsaw"]},
        {"question": "What?", "answers": {"text": ["Warsaw"], "answer_start": [0]}},
    ],
)
def test_pairs_and_other_names_of_turns(row):
    found = parse(row)
    assert found.samples == (Conversation("1", TALK),)
    assert not found.unused


def test_pairs_in_a_row_are_turns_in_order():
    (found,) = parse(
        {"messages": [{"system": "Be kind.", "user": "a", "assistant": "b"}, {"user": "c", "assistant": "d"}]}
    )
    assert [(turn.role, turn.content) for turn in found.messages] == [
        ("system", "Be kind."),
        *(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    ]


def test_of_several_answers_the_first_is_used_and_the_others_are_reported():
    found = parse({"question": "What?", "answer": ["", "Warsaw", "Varsovie"]})
    assert found.samples[0].messages == TALK
    assert found.unused == {"answer[1:]": (1, "row 1")}
    assert parse(GOOD, {"messages": GOOD["messages"]}).unused == {}


@pytest.mark.parametrize(("answer", "text"), [(42, "42"), (-1.5, "-1.5"), (0, "0"), ([7, 8], "7")])
def test_answers_may_be_numbers(answer, text):
    assert parse({"question": "How many?", "answer": answer}).samples[0].messages[-1].content == text


@pytest.mark.parametrize("answer", [[], {"text": [], "answer_start": []}, float("nan"), [None]])
def test_no_answer_is_invalid(answer):
    question = {"question": "What?", "answer": "Warsaw"}
    assert len(parse(question, question, {"question": "What?", "answer": answer})) == 2


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"author": "x", "body": "y"}, r"no role \(message 1; its keys: author, body\)"),
        ({"role": "user", "body": "y"}, r"no content \(message 1; its keys: role, body\)"),
        ({"role": "narrator", "content": "y"}, "message 1 has 'narrator'; known: system.*data.roles"),
        (
            {"role": "assistant", "tool_calls": [{"tool": "f"}]},
            r"a tool call without a function name \(message 1; its keys: tool\)",
        ),
    ],
)
def test_a_refusal_names_the_keys_that_were_there(turn, message):
    with pytest.raises(DataError, match=message):
        parse({"messages": [turn]}, on_invalid="stop")


def test_a_function_call_of_an_assistant_is_a_tool_call():
    """OpenAI's older name of a single tool call."""
    call = {"name": "f", "arguments": '{"x": 1}'}
    (found,) = parse({"messages": [WHAT_TURN, {"role": "assistant", "content": None, "function_call": call}]})
    assert found.messages[1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},)


WHAT_TURN = {"role": "user", "content": "What?"}


def test_own_names_of_columns_and_roles():
    row = {"log": [{"who": "caller", "says": "What?"}, {"who": "agent", "says": "Warsaw"}], "messages": "other"}
    columns, roles = {"messages": "log", "role": "who", "content": "says"}, {"caller": "user", "agent": "assistant"}
    found = parse(row, columns=columns, roles=roles)
    assert found.samples == (Conversation("1", TALK),)
    assert list(found.unused) == ["messages (not mapped)"]
    table = {"log": json.dumps(row["log"])}
    assert parse(table, columns=columns, roles=roles).samples == found.samples
    pairs = {"messages": [{"caller": "What?", "agent": "Warsaw"}]}
    assert parse(pairs, roles=roles).samples == found.samples
    assert parse({"q": "What?", "a": "Warsaw"}, columns={"question": "q", "answer": "a"}).samples == found.samples


def test_own_names_that_lead_nowhere_are_errors():
    with pytest.raises(
        DataError, match=r"data.columns: no row has logs, which tools is mapped to; row 1 has: messages"
    ):
        parse(GOOD, columns={"tools": "logs"})
    with pytest.raises(DataError, match=r"data.columns: unknown name 'mesages'"):
        parse(GOOD, columns={"mesages": "log"})
    with pytest.raises(DataError, match=r"data.roles: agent: 'clerk' is none of system, user, assistant and tool"):
        parse(GOOD, roles={"agent": "clerk"})


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.json.gz", "train.csv.gz", "train-00000-of-00001.jsonl.gz"])
def test_compressed_files(tmp_path, name):
    text = "prompt,completion\nWhat?,Warsaw\n" if ".csv" in name else json.dumps(FORMATS["prompt/completion"]) + "\n"
    with gzip.open(tmp_path / name, "wt") as file:
        file.write(text)
    for path in (tmp_path / name, tmp_path):
        assert conversations.read_conversations(path).samples == (Conversation("1", TALK),)
    assert conversations.read_conversations(tmp_path, "train").samples == (Conversation("1", TALK),)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged or cut off"):
        conversations.read_conversations(tmp_path / name)


def test_ids_are_unique_whatever_rows_are_called():
    names = ["a", "a", "a-2", "a", "a-3", "#", "#"]
    found = [sample.id for sample in parse(*({"id": name, **GOOD} for name in names))]
    assert len(set(found)) == len(names)
    assert found[:2] == ["a", "a-2"]


def test_two_names_of_one_column_are_an_error():
    with pytest.raises(
        DataError, match=r"data\.columns: (prompt and question|question and prompt) are both mapped to q"
    ):
        parse({"q": "What?", "a": "Warsaw"}, columns={"question": "q", "prompt": "q", "answer": "a"})


def test_messages_of_a_prompt_and_of_its_completion_may_be_json_text():
    """As a table holds them; an answer that is other JSON stays a text."""
    prompt, answer = ([{"role": role, "content": text}] for role, text in (("user", "What?"), ("assistant", "Warsaw")))
    assert parse({"prompt": json.dumps(prompt), "completion": json.dumps(answer)}).samples[0].messages == TALK
    shouted = json.dumps([{"role": "USER", "content": "What?"}])
    assert parse({"prompt": shouted, "completion": "Warsaw"}).samples[0].messages == TALK
    listed = json.dumps([{"name": "Warsaw"}])
    assert parse({"prompt": "What?", "completion": listed}).samples[0].messages[1].content == listed


def test_a_column_of_system_messages_is_reported_where_the_messages_have_one():
    turns = [{"role": "system", "content": "Be kind."}, *GOOD["messages"]]
    assert list(parse({"system": "Be brief.", "messages": turns}).unused) == ["system"]
    assert not parse({"system": "Be brief.", "messages": GOOD["messages"]}).unused
    pairs = [{"system": "Be kind.", "user": "What?", "assistant": "Warsaw"}]
    assert list(parse({"system": "Be brief.", "messages": pairs}).unused) == ["system"]
