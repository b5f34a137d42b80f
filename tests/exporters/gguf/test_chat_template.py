"""Chat templates in GGUF: keys, rendering before and after, and the check of what is refused or unsafe."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mowa.data.chat.template import BUILTIN_TEMPLATES
from mowa.errors import DataError
from mowa.exporters.gguf.chat_template import chat_template_metadata, check_template, compare_chats, render_chats

TOOL_TEMPLATE = """
{%- macro call(tool) -%}<tool>{{ tool.function | tojson }}</tool>{%- endmacro -%}
{%- set ns = namespace(first=true) -%}
{%- if tools is defined and tools -%}{% for tool in tools %}{{ call(tool) }}{% endfor %}{%- endif -%}
{%- for message in messages if message.role != 'developer' -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role ' ~ message.role) -}}
    {%- endif -%}
    {%- set content = message.content | trim -%}
    {%- if loop.first and not loop.last -%}{%- set ns.first = false -%}{%- endif -%}
    {%- set role = message['role'].upper() -%}
    {% generation %}{{ '<|' + role + '|>' + content.split('</think>')[-1] + '<|end|>' }}{% endgeneration %}
    {%- if loop.index0 > 100 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else eos_token -}}
"""


def tokenizer(template):
    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>", bos_token="<s>")
    found.chat_template = template
    return found


def test_one_template_has_one_key_and_several_have_names():
    assert chat_template_metadata(None) == chat_template_metadata({}) == {}
    assert chat_template_metadata("{{ 1 }}") == {"tokenizer.chat_template": "{{ 1 }}"}
    several = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag v2": "{{ 3 }}"}
    assert chat_template_metadata(several) == {
        "tokenizer.chat_template": "{{ 1 }}",
        "tokenizer.chat_template.tool_use": "{{ 2 }}",
        "tokenizer.chat_template.rag_v2": "{{ 3 }}",
        "tokenizer.chat_templates": ["rag_v2", "tool_use"],
    }
    with pytest.raises(DataError, match="the same name in GGUF: a b, a-b"):
        chat_template_metadata({"a b": "", "a-b": ""})


def test_rendering_is_compared():
    found = tokenizer({"default": TOOL_TEMPLATE, "plain": BUILTIN_TEMPLATES["chatml"]})
    metadata = chat_template_metadata(found.chat_template)
    assert compare_chats(found, metadata) == []
    rendered = render_chats(found, TOOL_TEMPLATE)
    assert rendered["one question"] == "<|USER|>Hello, Zoë! 2 < 3<|end|></s>"
    assert rendered["system prompt, generation prompt"].endswith("<|USER|>two\nlines<|end|><|assistant|>")
    assert rendered["one question, tools"].startswith('<tool>{"name": "add"')
    metadata["tokenizer.chat_template"] = TOOL_TEMPLATE.replace("trim", "string")
    del metadata["tokenizer.chat_template.plain"]
    problems = compare_chats(found, metadata)
    assert problems[0].startswith("the chat template 'default' renders 'system prompt' differently")
    assert problems[-1] == "the chat template 'plain' is missing"


def test_errors_of_templates_are_compared_too():
    found = tokenizer(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    assert "no system" in render_chats(found, found.chat_template)["system prompt"]
    assert compare_chats(found, chat_template_metadata(found.chat_template)) == []


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, *BUILTIN_TEMPLATES.values()])
def test_templates_that_llama_cpp_renders_pass(template):
    assert check_template(template) == []


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe: the attribute '__class__'"),
        ("{{ messages['__globals__'] }}", "unsafe: the name __globals__"),
        ("{{ messages|attr('append') }}", "unsafe: the filter 'attr'"),
        ("{{ '{0.__class__}'.format(messages) }}", "unsafe: the method 'format'"),
        ("{{ cycler.gi_frame }}", "unsafe: the attribute 'gi_frame'"),
        ("{% include 'x' %}", "unsafe: it loads other files: include"),
        ("{% import 'x' as y %}", "unsafe: it loads other files: import"),
        ("{% from 'x' import y %}", "unsafe: it loads other files: from … import"),
        ("{% extends 'x' %}", "unsafe: it loads other files: extends"),
        ("{% for i in range(10 * 100000) %}{% endfor %}", "unsafe: a range of more than 10000"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "unsafe: a range of more than 10000"),
        ("{{ 'a' * 100000 }}", "unsafe: multiplication"),
        ("{% for i in range(9999) %}{% for j in range(999) %}{% endfor %}{% endfor %}", "loops that run 9989001 times"),
        ("{{ messages | groupby('role') }}", "llama.cpp has no filter 'groupby'"),
        ("{{ messages | map('upper') }}", "'map' with attribute= only"),
        ("{{ 1 if messages is sameas none }}", "llama.cpp has no test 'sameas'"),
        ("{{ lipsum() }}", "llama.cpp has no function 'lipsum'"),
        ("{{ 'a'.splitlines() }}", "llama.cpp has no method 'splitlines'"),
        ("{{ ','.join(x) }}", "llama.cpp has no method 'join'"),
        ("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", "llama.cpp has no recursive loops"),
        ("{% for m in messages %}{{ loop.cycle(1, 2) }}{% endfor %}", "llama.cpp has no loop.cycle"),
        ("{% with a = 1 %}{% endwith %}", "llama.cpp has no with"),
        ("{{ 2 ** 3 }}", "llama.cpp has no ** (power)"),
        ("{% if %}", "the template cannot be parsed"),
        ("{{ '" + "a" * 1_000_001 + "' }}", "has 1000009 characters"),
    ],
)  # fmt: skip
def test_problems_are_named(template, problem):
    found = check_template(template)
    assert any(problem in one for one in found), found


def test_problems_have_line_numbers_in_order():
    found = check_template("{{ a | round }}\n\n{{ b.__class__ }}\n{{ a | round }}")
    assert [one.split(":")[0] for one in found] == ["line 1", "line 3", "line 4"]
