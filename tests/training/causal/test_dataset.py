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


SWITCH = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


def test_a_recipe_gives_the_chat_template_its_variables(tmp_path, model):
    """The prompt is the one of transformers with the same variables."""
    text = SWITCH.replace("{{ message.content }}", "{% if enable_thinking %}!{% endif %}{{ message.content }}")
    (tmp_path / "switch.jinja").write_text(text)
    data = write(tmp_path / "pairs.jsonl", [pair(number) for number in range(9)])
    options = {"data__train": data, "data__dev": data, "data__chat_template": str(tmp_path / "switch.jinja")}
    found = split(tmp_path, model, **options, data__chat_template_kwargs={"enable_thinking": True})
    messages = [{"role": "user", "content": "what 0"}, {"role": "assistant", "content": "this 0"}]
    expected = model.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True)
    assert "!what 0" in expected
    assert model.tokenizer.decode(found.train[0].input_ids) == expected
    with pytest.raises(DataError, match="the chat template does not read enable_thinkin; correct or remove it"):
        split(tmp_path, model, **options, data__chat_template_kwargs={"enable_thinkin": True})
    with pytest.raises(DataError, match="chat_template_kwargs: tools is set by mowa"):
        split(tmp_path, model, **options, data__chat_template_kwargs={"tools": []})


def test_marked_spans_are_rendered_with_the_same_variables(tmp_path, model):
    marked = SWITCH.replace(
        "{{ message.content }}<|im_end|>",
        "{% generation %}{% if enable_thinking %}!{% endif %}{{ message.content }}<|im_end|>{% endgeneration %}",
    )
    (tmp_path / "marked.jinja").write_text(marked)
    data = write(tmp_path / "pairs.jsonl", [pair(number) for number in range(9)])
    options = {"data__train": data, "data__dev": data, "data__chat_template": str(tmp_path / "marked.jinja")}
    found = split(tmp_path, model, **options, data__chat_template_kwargs={"enable_thinking": True})
    assert "!this 0" in model.tokenizer.decode(found.train[0].input_ids[found.train[0].loss_mask])


def test_a_recipe_maps_columns_and_roles(tmp_path, model):
    rows = [{"log": [{"who": "caller", "says": "x"}, {"who": "agent", "says": f"y{n}"}]} for n in range(9)]
    data = write(tmp_path / "calls.jsonl", rows)
    names = {"messages": "log", "role": "who", "content": "says"}
    roles = {"caller": "user", "agent": "assistant"}
    found = split(tmp_path, model, data__train=data, data__columns=names, data__roles=roles, data__preview=1)
    assert len(found.train) + len(found.dev["dev"]) == 9
    assert "assistant\n" in found.preview
    assert "caller" not in found.preview


def test_unused_columns_and_excluded_rows_are_in_the_notes(tmp_path, model):
    rows = [pair(number, source="web", label=number > 1) for number in range(9)]
    notes = "\n".join(split(tmp_path, model, data__train=write(tmp_path / "kto.jsonl", rows)).notes)
    assert "excluded: label is false: the answer is marked as bad" in notes
    assert "columns not used" in notes
    assert "source" in notes
