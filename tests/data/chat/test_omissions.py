"""A conversation is left out if the chat template does not write what its messages say."""

from pathlib import Path

import pytest

from mowa.data.chat import omissions, tokenize
from mowa.data.chat.conversations import parse_rows
from mowa.data.chat.samples import Conversation, Message
from mowa.errors import DataError
from tests.data.chat.test_tokenize import encode, talk, trained_texts
from tests.data.chat.tokenizers import CHATML, MARKED, THINKING, tokenizer

CALL = ({"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Warsaw"}}},)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
GOOD = talk("x", "y", name="good")
CUTS_THOUGHTS = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
NO_SYSTEM = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
NO_TOOLS = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}")
CALLS_ALONE = CHATML.replace(
    "{{ message.content }}",
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% else %}{{ message.content }}{% endif %}",
)
NAMES_ALONE = CALLS_ALONE.replace("message.tool_calls | tojson", "message.tool_calls[0].function.name")
DROPS_TOOL_CALLS = "the chat template omits tool calls"


def conversation(*messages, tools=()):
    return Conversation("a", (*(message for message in messages if message),), tools)


QUESTION, ANSWER = Message("user", "What?"), Message("assistant", "Cold.")
CASES = {
    "tool calls": (CHATML, [QUESTION, Message("assistant", "", CALL)], DROPS_TOOL_CALLS),
    "tool calls beside a content": (CHATML, [QUESTION, Message("assistant", "Let me look.", CALL)], DROPS_TOOL_CALLS),
    "arguments": (NAMES_ALONE, [QUESTION, Message("assistant", "", CALL)], DROPS_TOOL_CALLS),
    "a content beside tool calls": (
        CALLS_ALONE,
        [QUESTION, Message("assistant", "Let me look.", CALL)],
        "the chat template omits the text beside tool calls",
    ),
    "reasoning": (
        CHATML,
        [QUESTION, Message("assistant", "Cold.", reasoning_content="Hm.")],
        "the chat template omits reasoning",
    ),
    "reasoning in the content": (
        CUTS_THOUGHTS,
        [QUESTION, Message("assistant", "<think>Hm.</think>Cold.")],
        "the chat template omits a part of an answer, such as reasoning",
    ),
    "system": (NO_SYSTEM, [Message("system", "Be kind."), QUESTION, ANSWER], "the chat template omits system messages"),
    "tool results": (
        NO_TOOLS,
        [QUESTION, Message("tool", "-3"), ANSWER],
        "the chat template omits tool messages",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("train_on", ["responses", "last", "all"])
def test_a_conversation_that_the_template_cuts_is_left_out_and_reported(name, train_on):
    template, messages, reason = CASES[name]
    samples, report = encode([GOOD, conversation(*messages)], "chatml", chat_template=template, train_on=train_on)
    assert [sample.id for sample in samples] == ["good"]
    assert {reason: count for reason, (count, _) in report.dropped.items()} == {reason: 1}
    assert report.dropped[reason][1].startswith(f"a: {reason} (message ")


def test_the_same_text_elsewhere_does_not_hide_an_omission():
    messages = [Message("system", "What?"), QUESTION, ANSWER]
    _, report = encode([GOOD, conversation(*messages)], "chatml", chat_template=NO_SYSTEM)
    assert "the chat template omits system messages" in report.dropped


def test_an_empty_thought_says_nothing():
    samples, _ = encode([conversation(QUESTION, Message("assistant", "<think>\n</think>\nCold."))], "chatml")
    again, report = encode(
        [conversation(QUESTION, Message("assistant", "<think>\n</think>Cold."))], "chatml", chat_template=CUTS_THOUGHTS
    )
    assert trained_texts(samples[0], "chatml") == ["<think>\n</think>\nCold.<|im_end|>"]
    assert trained_texts(again[0], "chatml") == ["Cold.<|im_end|>"]
    assert not report.dropped


def test_reasoning_of_answers_that_are_not_trained_may_be_cut():
    """As Qwen3's template does by design."""
    thoughtful = [Message("assistant", f"Answer {one}.", reasoning_content=f"Thought {one}.") for one in (1, 2)]
    talking = conversation(QUESTION, thoughtful[0], QUESTION, thoughtful[1])
    samples, report = encode([talking], "thinking")
    assert [trained_texts(sample, "thinking") for sample in samples] == [
        [f"<think>\nThought {one}.\n</think>\n\nAnswer {one}.<|im_end|>"] for one in (1, 2)
    ]
    assert not report.dropped
    (last,), report = encode([talking], "thinking", train_on="last")
    assert trained_texts(last, "thinking") == ["<think>\nThought 2.\n</think>\n\nAnswer 2.<|im_end|>"]
    assert not report.dropped
    (everything,), report = encode([talking], "thinking", train_on="all")
    assert "Thought 1" not in tokenizer("thinking").decode(everything.input_ids)
    assert report.warnings == {"the template omits parts of earlier answers": (1, "a")}


def test_answers_with_reasoning_are_rendered_alone_where_marked_spans_lose_them():
    marked = MARKED.replace(
        "{% generation %}{{ message.content }}",
        "{% generation %}{% if loop.last and message.thinking %}<think>{{ message.thinking }}</think>{% endif %}"
        "{{ message.content }}",
    )
    thoughtful = [Message("assistant", f"Answer {one}.", reasoning_content=f"Thought {one}.") for one in (1, 2)]
    samples, report = encode(
        [conversation(QUESTION, thoughtful[0], QUESTION, thoughtful[1])], "marked", chat_template=marked
    )
    assert [(sample.id, trained_texts(sample, "marked")) for sample in samples] == [
        (f"a#{one}", [f"<think>Thought {one}.</think>Answer {one}.<|im_end|>"]) for one in (1, 2)
    ]
    assert report.warnings == {"the template rewrites earlier messages": (1, "a")}


@pytest.mark.parametrize(
    "written",
    [
        "{{ message.content | upper }}",
        "{{ message.content | trim | tojson }}",
        "{{ message.content.split('</think>')[0].split('<think>')[-1] }}={{ message.content.split('</think>')[-1] }}",
        "{{ message.content | replace('e', '3') }}",
    ],
)
def test_a_template_may_write_a_content_in_another_way(written):
    template = CHATML.replace("{{ message.content }}", written)
    answers = ['<think>\nĄ hm\n</think>\n\n "Cold"\n', "7", "\\n <b>x</b>", "\U000f0000\U000f0001"]
    for answer in answers:
        samples, report = encode([talk("What?", answer)], "chatml", chat_template=template)
        assert samples
        assert not report.dropped


def test_tools_that_the_template_omits_are_a_warning():
    samples, report = encode([conversation(QUESTION, ANSWER, tools=(TOOL,))], "chatml")
    assert trained_texts(samples[0], "chatml") == ["Cold.<|im_end|>"]
    assert report.warnings == {"the chat template omits the list of tools": (1, "a")}
    listed = "{{ tools | tojson }}" + CHATML
    _, report = encode([conversation(QUESTION, ANSWER, tools=(TOOL,))], "chatml", chat_template=listed)
    assert not report.warnings


def test_marks_are_in_every_field_and_nowhere_else():
    messages = [
        {"role": "user", "content": "90417309 <a>x</a> y"},
        {"role": "assistant", "content": "", "tool_calls": [dict(CALL[0], id="c1")], "name": "bob"},
    ]
    marked, marks = omissions.insert_marks(messages)
    text = str(marked)
    for mark in marks:
        assert text.count(mark.text) == 1
        text = text.replace(mark.text, "")
    assert text == str(messages)
    assert [mark.field for mark in marks] == ["user"] * 3 + ["tool calls"] * 3


def test_tool_calls_that_do_not_begin_with_the_generation_prompt_are_trained_alone():
    template = CALLS_ALONE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    samples, _ = encode([conversation(QUESTION, Message("assistant", "", CALL))], "chatml", chat_template=template)
    (text,) = trained_texts(samples[0], "chatml")
    assert text.startswith('[{"type": "function"')


TRL_OMISSIONS = {
    ("qwen3", "tools"): "",
    ("qwen3", "reasoning"): "",
    ("qwen2_5", "tools"): "",
    ("qwen2_5", "reasoning"): "the chat template omits reasoning",
    ("llama3_1", "tools"): "",
    ("phi3", "tools"): DROPS_TOOL_CALLS,
    ("deepseek_r1_distill", "inline"): "the chat template omits a part of an answer, such as reasoning",
    ("deepseek_r1_distill_training", "inline"): "",
    ("qwen3", "inline"): "",
    ("gemma", "reasoning"): "the chat template omits reasoning",
}
TURNS = {
    "tools": [QUESTION, Message("assistant", "", CALL), Message("tool", "-3", name="get_weather"), ANSWER],
    "reasoning": [QUESTION, Message("assistant", "Cold.", reasoning_content="Hm.")],
    "inline": [QUESTION, Message("assistant", "<think>\nHm.\n</think>\n\nCold.")],
}


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize(("name", "turns"), TRL_OMISSIONS)
def test_templates_of_model_families_that_omit_something(name, turns):
    trl = pytest.importorskip("trl")
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    given = [GOOD, conversation(*TURNS[turns], tools=(TOOL,) if turns == "tools" else ())]
    _, report = tokenize.tokenize_conversations(given, tokenizer("chatml"), max_length=10_000, chat_template=source)
    assert list(report.dropped) == ([TRL_OMISSIONS[name, turns]] if TRL_OMISSIONS[name, turns] else [])


def test_more_than_half_of_the_rows_cut_by_the_template_is_an_error_that_says_so():
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "thinking": "z"}]}
    ] * 2
    rows.append({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    data = parse_rows(((f"row {number}", row) for number, row in enumerate(rows, 1)), "chats.jsonl")
    with pytest.raises(DataError, match=r"chats.jsonl: 2 of 3 rows are left out.*omits reasoning.*data.chat_template"):
        encode(data, "chatml")
    samples, _ = encode(data, "chatml", chat_template=THINKING)
    assert len(samples) == 3
