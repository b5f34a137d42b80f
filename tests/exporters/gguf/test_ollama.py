"""Modelfiles: templates found by rendering, and values that Ollama's parser reads as they were written."""

import re

import pytest

from mowa.errors import DataError
from mowa.exporters.gguf.ollama import TurnTexts, find_turns, go_template, modelfile
from tests.exporters.gguf.chat_templates import (
    ALL,
    CHATML,
    CHATML_WITH_DEFAULT,
    GEMMA,
    GEMMA_3,
    LAST_SYSTEM,
    METADATA,
    ODD,
    PHI_3,
    REWRITTEN,
    render,
)

QUESTION, ANSWER = {"role": "user", "content": "Why {{ x }}?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}


def parse(text):
    """Parse a Modelfile as parser/parser.go of Ollama does; returns (command, value) pairs."""
    found, lines = [], iter(text.splitlines(keepends=True))
    for line in lines:
        if line.startswith("#") or not line.strip():
            continue
        name, value = line.split(" ", 1)
        if name == "PARAMETER":
            parameter, value = value.split(" ", 1)
            name = f"{name} {parameter}"
        quote = next((one for one in ('"""', '"') if value.startswith(one)), "")
        if quote:
            while not (value.strip().endswith(quote) and len(value.strip()) >= 2 * len(quote)):
                value += next(lines)
        kept = value.strip()[len(quote) : -len(quote) or None]
        assert re.sub(r"[\n\t]", "", kept).isprintable()  # others are dropped
        found.append((name, kept))
    return found


@pytest.mark.parametrize("name", ALL)
def test_texts_around_messages_give_every_chat(name):
    turns, reason = find_turns(ALL[name], METADATA)
    assert not reason
    chats = [[QUESTION], [QUESTION, ANSWER, QUESTION], [QUESTION, ANSWER] * 3 + [QUESTION]]
    for chat in chats + ([[SYSTEM, *one] for one in chats] if turns.system else []):
        assert turns.render(chat) == render(ALL[name], chat)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LAST_SYSTEM, "system prompt in a way of its own"),
        (REWRITTEN, "message after message"),
        ("{{ strftime_now('%Y') }}" + CHATML, "writes the date"),
        ("{{ nonsense('x') }}", "message after message"),
        ("{% if messages | length > 4 %}!{% endif %}" + CHATML, "messages of user"),
    ],
)
def test_other_templates_are_left_out(template, reason):
    turns, found = find_turns(template, METADATA)
    assert turns is None
    assert reason in found
    text = modelfile("m.gguf", METADATA, template)
    assert "TEMPLATE" not in dict(parse(text))
    assert f"# Without TEMPLATE: {found}" in text


def test_texts_of_chatml():
    start, end = "<|im_start|>", "<|im_end|>\n"
    assert find_turns(CHATML, METADATA)[0] == TurnTexts(
        first=f"{start}user\n",
        system=(f"{start}system\n", f"{end}{start}user\n"),
        user=(f"{start}user\n", end),
        assistant=(f"{start}assistant\n", end),
        generation=f"{start}assistant\n",
    )


# Rendered with Go 1.27's text/template in tests/parity/test_gguf_ollama.py.
def test_go_template_of_a_system_turn_with_a_default():
    assert go_template(find_turns(CHATML_WITH_DEFAULT, METADATA)[0]) == (
        "{{ if $.System }}<|im_start|>system\n{{ .System }}<|im_end|>\n"
        '{{ else }}<|im_start|>system\nYou are "kind".<|im_end|>\n{{ end }}'
        '{{ range $index, $_ := .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        "{{ if not (eq (len (slice $.Messages $index)) 1) }}<|im_end|>\n{{ end }}{{ end }}"
        '{{ if and (eq (len (slice $.Messages $index)) 1) (ne .Role "assistant") }}<|im_start|>assistant\n'
        "{{ end }}{{ end }}"
    )


def test_go_template_of_a_system_prompt_in_the_first_question():
    text = go_template(find_turns(GEMMA_3, METADATA)[0])
    assert text.startswith(
        '{{ $first := true }}{{ range $index, $_ := .Messages }}{{ if eq .Role "user" }}{{ if $first }}'
        "{{ if $.System }}<start_of_turn>user\n{{ $.System }}\n\n{{ else }}<start_of_turn>user\n{{ end }}"
        "{{ $first = false }}{{ else }}<start_of_turn>user\n{{ end }}{{ .Content }}<end_of_turn>\n"
    )


def test_characters_that_templates_and_modelfiles_cannot_hold():
    text = modelfile("m.gguf", METADATA, ODD)
    template = dict(parse(text))["TEMPLATE"]
    assert template == go_template(find_turns(ODD, METADATA)[0])
    assert '{{ "\\"\\"\\"" }}{{ "{{" }}{{ "\\U000000a0" }}user|{{ .Content }}{{ "{" }}\n' in template
    assert "▁assistant" in template


def test_beginning_of_sequence_is_kept_where_the_tokenizer_adds_none():
    metadata = METADATA | {"tokenizer.ggml.add_bos_token": False}
    assert find_turns(GEMMA, metadata)[0].first == "<s><start_of_turn>user\n"
    assert find_turns(GEMMA, METADATA)[0].first == "<start_of_turn>user\n"


def test_a_whole_file():
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    text = modelfile(
        "tiny.gguf",
        METADATA | {"general.license": "apache-2.0"},
        CHATML,
        system='You are "kind".\nBe brief',
        adapter="poems.gguf",
        generation_config=settings | {"eos_token_id": [1, 4]},
    )
    assert text.splitlines()[0] == "FROM ./tiny.gguf"
    assert parse(text) == [
        ("FROM", "./tiny.gguf"),
        ("ADAPTER", "./poems.gguf"),
        ("TEMPLATE", go_template(find_turns(CHATML, METADATA)[0])),
        ("SYSTEM", 'You are "kind".\nBe brief'),
        ("PARAMETER num_ctx", "8192"),
        ("PARAMETER temperature", "0.6"),
        ("PARAMETER top_k", "20"),
        ("PARAMETER top_p", "0.95"),
        ("PARAMETER repeat_penalty", "1.05"),
        ("PARAMETER stop", "</s>"),
        ("PARAMETER stop", "<|eot_id|>"),
        ("PARAMETER stop", "<|im_end|>"),
        ("LICENSE", "apache-2.0"),
    ]


def test_a_model_without_template_or_settings():
    text = modelfile("m.gguf", {"general.architecture": "llama"}, None)
    assert parse(text) == [("FROM", "./m.gguf")]
    assert "# Without TEMPLATE: the model has no chat template" in text


def test_greedy_and_short_context():
    metadata = METADATA | {"llama.context_length": 2048}
    found = dict(
        parse(modelfile("m.gguf", metadata, PHI_3, generation_config={"do_sample": False, "temperature": 0.7}))
    )
    assert (found["PARAMETER temperature"], found["PARAMETER num_ctx"]) == ("0", "2048")


def test_what_a_modelfile_cannot_hold():
    with pytest.raises(DataError, match="takes no system prompt"):
        modelfile("m.gguf", METADATA, GEMMA, system="Be brief.")
    for text in ('"""', 'end"', "bell\a"):
        with pytest.raises(DataError, match="the system prompt"):
            modelfile("m.gguf", METADATA, CHATML, system=text)
    with pytest.raises(DataError, match="cannot name the file"):
        modelfile("a\nb.gguf", METADATA, CHATML)
    with pytest.raises(DataError, match="stop token"):
        modelfile("m.gguf", METADATA | {"tokenizer.ggml.tokens": ["<s>", "\n"]}, CHATML)
