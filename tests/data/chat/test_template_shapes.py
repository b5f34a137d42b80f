"""Templates that mark an answer in parts, rewrite thoughts, or read arguments and contents in a form of their own."""

from pathlib import Path

import pytest

from mowa.data.chat import encode as encoding
from mowa.data.chat.samples import Message
from tests.data.chat.test_omissions import ANSWER, CALL, QUESTION, conversation
from tests.data.chat.test_tokenize import encode, talk, trained_texts
from tests.data.chat.tokenizers import CHATML, MARKED, tokenizer

ENDS_IN_A_BLOCK = MARKED + (
    "{% if messages[-1].role == 'assistant' %}{% generation %}<|endoftext|>{% endgeneration %}{% endif %}"
)


def trl_template(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize("train_on", ["responses", "last"])
def test_the_last_answer_is_trained_with_all_the_spans_that_the_template_marks(train_on):
    """TRL's Phi-3.5 template marks the end of the text apart from the answer."""
    (sample,), _ = encode(
        [talk("What?", "Warsaw.", "And?", "Of course")], "marked", chat_template=ENDS_IN_A_BLOCK, train_on=train_on
    )
    assert trained_texts(sample, "marked") == (["Warsaw.<|im_end|>"] if train_on == "responses" else []) + [
        "Of course<|im_end|>",
        "<|endoftext|>",
    ]


def test_the_end_of_an_answer_that_is_not_trained_is_not_trained():
    turns = [QUESTION, ANSWER, QUESTION, Message("assistant", "Warm.", trained=False)]
    (sample,), _ = encode([conversation(*turns)], "marked", chat_template=ENDS_IN_A_BLOCK)
    assert trained_texts(sample, "marked") == ["Cold.<|im_end|>"]


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_thoughts_after_a_tool_call_are_trained_where_the_template_cuts_those_before_it():
    """As gpt-oss: the prompt of the answer holds thoughts that its own text has not."""
    turns = [
        QUESTION,
        Message("assistant", "", CALL, reasoning_content="Look it up."),
        Message("tool", "-3", name="get_weather"),
        Message("assistant", "Cold.", reasoning_content="Below zero."),
    ]
    samples, _ = encode([conversation(*turns)], "bare", chat_template=trl_template("gptoss"))
    trained = ["".join(trained_texts(sample, "bare")) for sample in samples]
    assert "Look it up." in trained[0]
    assert "Warsaw" in trained[0]
    assert trained[1].startswith("Below zero.")
    assert "Cold." in trained[1]


def test_thoughts_are_trained_where_the_generation_prompt_has_an_empty_one():
    """As Qwen 3.5 without thinking."""
    template = CHATML.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' and '</think>' not in message.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message.content }}",
    ).replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}")
    (sample,), _ = encode([talk("What?", "<think>\nHm.\n</think>\n\nCold.")], "chatml", chat_template=template)
    assert trained_texts(sample, "chatml") == ["Hm.\n</think>\n\nCold.<|im_end|>"]


TEXT_ARGUMENTS = CHATML.replace(
    "{{ message.content }}",
    "{% if message.tool_calls %}{{ message.tool_calls[0].function.name + ' ' + "
    "message.tool_calls[0].function.arguments }}{% else %}{{ message.content }}{% endif %}",
)
OBJECT_ARGUMENTS = TEXT_ARGUMENTS.replace("function.arguments", "function.arguments | tojson")


@pytest.mark.parametrize("template", [TEXT_ARGUMENTS, OBJECT_ARGUMENTS])
def test_arguments_are_written_once_by_templates_that_take_text_and_by_those_that_take_objects(template):
    """DeepSeek's templates concatenate the arguments, so they must be JSON text; most others serialize objects."""
    called = conversation(QUESTION, Message("assistant", "", CALL))
    (sample,), report = encode([called], "chatml", chat_template=template)
    assert trained_texts(sample, "chatml") == ['get_weather {"city": "Warsaw"}<|im_end|>']
    assert not report.dropped
    as_text = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Warsaw"}'}}
    prompted = tokenizer("chatml")
    before, prompted.chat_template = prompted.chat_template, template
    try:
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": [as_text]}]
        prompt = encoding.encode_prompt(prompted, messages)
    finally:
        prompted.chat_template = before
    assert prompt[: len(sample)] == sample.input_ids.tolist()


@pytest.mark.filterwarnings("ignore")
def test_tool_calls_are_trained_with_the_template_of_deepseek_v3():
    turns = [QUESTION, Message("assistant", "", CALL), Message("tool", "-3", name="get_weather"), ANSWER]
    (sample,), report = encode([conversation(*turns)], "bare", chat_template=trl_template("deepseekv3"))
    assert not report.dropped
    assert '{"city": "Warsaw"}' in "".join(trained_texts(sample, "bare"))


def test_a_template_that_refuses_contents_as_text_gets_them_as_parts():
    template = CHATML.replace(
        "{{ message.content }}",
        "{% if message.content is string %}{{ raise_exception('parts') }}{% endif %}{{ message.content[0].text }}",
    )
    (sample,), _ = encode([talk("What?", "Warsaw.")], "chatml", chat_template=template)
    assert trained_texts(sample, "chatml") == ["Warsaw.<|im_end|>"]
