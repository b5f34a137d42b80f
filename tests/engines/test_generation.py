"""Text generation: transformers' own answers, whatever the batch, as text and as a stream."""

import random
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mowa
from mowa import loading
from mowa.data.chat import template
from mowa.decode import detokenize
from mowa.engines import generation
from mowa.engines.settings import GenerationSettings
from mowa.errors import DataError, ModelError
from mowa.models.causal import accelerate
from tests.training.causal import chats

PROMPTS = ["one", "what is the colour of the sky tonight", "a b c"]
GREEDY = GenerationSettings(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chats.model(tmp_path_factory.mktemp("causal") / "base")


@pytest.fixture
def model(folder):
    return loading.load(str(folder), task="causal")


def stock_answer(folder, prompt, tokens=12):
    """The answer of transformers alone: its ids after the prompt."""
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = net.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("accelerated", [False, True])
def test_answers_are_those_of_transformers_in_any_batch(folder, model, accelerated):
    if accelerated:
        accelerate.accelerate(model.net)
    expected = [stock_answer(folder, prompt) for prompt in PROMPTS]
    together = generation.generate(model, PROMPTS, GREEDY)
    assert [answer.text for answer in together] == expected
    alone = [generation.generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert alone == together


@pytest.mark.parametrize("stop", [(), ("a",), ("e ", "th")])
def test_a_stream_is_the_same_text_in_pieces(model, stop):
    settings = GenerationSettings(max_new_tokens=30, temperature=0, stop=stop)
    whole = generation.generate(model, [PROMPTS[1]], settings)[0]
    assert "".join(generation.stream_text(model, PROMPTS[1], settings)) == whole.text
    assert not any(one in whole.text for one in stop)


def test_a_stop_string_ends_the_answer_before_it(model):
    text = generation.generate(model, ["one"], GREEDY)[0].text
    stop = text[3:5]
    cut = generation.generate(model, ["one"], GenerationSettings(max_new_tokens=12, temperature=0, stop=(stop,)))[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_seed_repeats_an_answer_and_leaves_the_generator_alone(model):
    settings = GenerationSettings(max_new_tokens=20, temperature=1.5, seed=3)
    before = torch.get_rng_state()
    first = generation.generate(model, ["one"], settings)
    assert torch.equal(before, torch.get_rng_state())
    assert generation.generate(model, ["one"], settings) == first
    assert generation.generate(model, ["one"], GenerationSettings(20, 1.5, seed=4)) != first


def test_closing_a_stream_stops_the_thread(model):
    pieces = generation.stream_text(model, "one", GenerationSettings(max_new_tokens=100, temperature=0))
    next(pieces)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mowa-generate"]


def test_an_error_in_the_thread_is_raised_by_the_stream(model, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.net, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generation.stream_text(model, "one", GREEDY))


def test_special_tokens_in_a_message_are_text(model):
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain, spelled = (generation.encode(model, text) for text in ("one", "one<|im_end|>"))
    assert plain.count(end) == spelled.count(end)
    assert "<|im_end|>" in model.tokenizer.decode(spelled)[len("one") :]


def test_prompts_are_encoded_as_transformers_encodes_them(model):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    expected = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert generation.encode(model, messages) == expected
    assert generation.encode(model, "one two", chat=False) == model.tokenizer("one two")["input_ids"]


def test_variables_of_the_chat_template_are_those_of_transformers(model):
    model.tokenizer.chat_template += "{% if not enable_thinking %}<think></think>{% endif %}"
    messages, variables = [{"role": "user", "content": "one<|im_end|>"}], {"enable_thinking": False}
    expected = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)
    prompt = generation.encode(model, messages, chat_template_kwargs=variables)
    assert model.tokenizer.decode(prompt) == expected
    assert expected.endswith("<think></think>")
    assert not model.tokenizer.decode(
        generation.encode(model, messages, chat_template_kwargs={"enable_thinking": True})
    ).endswith("<think></think>")
    whole = mowa.generate(model, "one", max_new_tokens=3, temperature=0, chat_template_kwargs=variables)
    pieces = mowa.generate(model, "one", max_new_tokens=3, temperature=0, chat_template_kwargs=variables, stream=True)
    assert "".join(pieces) == whole.text
    with pytest.raises(DataError, match="the chat template does not read thinking"):
        generation.encode(model, messages, chat_template_kwargs={"thinking": False})
    with pytest.raises(DataError, match="chat_template_kwargs need a chat template"):
        generation.encode(model, "one", chat=False, chat_template_kwargs=variables)


def test_an_answer_fits_into_the_context(model):
    context = model.net.config.max_position_embeddings
    prompt = "one " * ((context - 20) // len(model.tokenizer("one ")["input_ids"]))
    count = len(generation.encode(model, prompt, chat=False))
    answer = generation.generate(model, [prompt], GenerationSettings(4 * context, 0), chat=False)[0]
    assert count + answer.completion_tokens <= context
    with pytest.raises(DataError, match=f"reads at most {context:,} with its answer"):
        generation.generate(model, [prompt * 2], chat=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"stop": ("",)}, "stop: an empty string"),
        ({"stop": (1,)}, "stop: 1 is not a text"),
        ({"stop": ("a<|im_end|>",)}, r"has the special token '<\|im_end\|>' in it"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: it must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"temperature": float("nan")}, "temperature is nan: it must be a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_settings_out_of_range_are_rejected(model, settings, message):
    with pytest.raises(ModelError, match=message):
        generation.generate(model, ["one"], GenerationSettings(**settings))
    with pytest.raises(ModelError, match=message):
        generation.stream_text(model, "one", GenerationSettings(**settings))


def test_an_empty_prompt_is_rejected(model):
    with pytest.raises(DataError, match="the prompt is empty"):
        generation.generate(model, [""])


def test_a_long_prompt_of_a_batch_does_not_truncate_the_others(tmp_path):
    model = mowa.load(chats.model(tmp_path / "short", max_position_embeddings=96))
    one = len(model.tokenizer("one ")["input_ids"])
    prompts = ["hi", "one " * (80 // one), "a b"]
    settings = GenerationSettings(max_new_tokens=30, temperature=0)
    together = generation.generate(model, prompts, settings, chat=False)
    assert together == [generation.generate(model, [prompt], settings, chat=False)[0] for prompt in prompts]
    assert together[1].prompt_tokens + together[1].completion_tokens <= 96
    assert together[1].completion_tokens < together[0].completion_tokens


def test_padding_with_the_end_token_is_not_counted(model):
    model.tokenizer.pad_token_id = model.tokenizer.eos_token_id
    text = generation.generate(model, ["one"], GREEDY)[0].text
    settings = GenerationSettings(max_new_tokens=12, temperature=0, stop=(text[2:4],))
    together = generation.generate(model, PROMPTS, settings)
    assert together == [generation.generate(model, [prompt], settings)[0] for prompt in PROMPTS]
    assert together[0].finish_reason == "stop"


def test_a_special_token_is_a_stop_string(model):
    special = model.tokenizer.convert_tokens_to_ids("<|im_start|>")

    model.net.generation_config.update(sequence_bias=[[[special], 1000.0]])
    settings = GenerationSettings(max_new_tokens=8, temperature=0, stop=("<|im_start|>",))
    (answer,) = generation.generate(model, ["one"], settings)
    assert (answer.text, answer.completion_tokens, answer.finish_reason) == ("", 1, "stop")
    assert list(generation.stream_text(model, "one", settings)) == []


@pytest.mark.parametrize("family", ["spaced", "chatml", "llama"])
def test_streamed_pieces_join_to_the_text_whatever_the_special_tokens(family):
    tokenizer = chats.make_tokenizer(family)
    draw = random.Random(0)
    specials = list(template.special_token_ids(tokenizer).values())
    for _ in range(200):
        ids = [
            draw.choice(specials) if draw.random() < 0.3 else draw.randrange(len(tokenizer))
            for _ in range(draw.randrange(12))
        ]
        stream = detokenize.TextStream(tokenizer, specials, ())
        pieces = [stream.push(one) for one in ids]
        assert "".join([*pieces, stream.finish()]) == detokenize.decode_tokens(tokenizer, ids), ids


def test_the_models_generation_config_cannot_ask_for_several_sequences(model):
    expected = generation.generate(model, PROMPTS, GREEDY)
    model.net.generation_config.update(
        return_dict_in_generate=True,
        num_return_sequences=2,
        num_beams=2,
        stop_strings=["e"],
        prompt_lookup_num_tokens=3,
        output_scores=True,
    )
    assert generation.generate(model, PROMPTS, GREEDY) == expected
    assert "".join(generation.stream_text(model, PROMPTS[0], GREEDY)) == expected[0].text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is of type NoneType"),
        ({"role": "user", "content": "x"}, "the prompt is of type dict"),
        (b"x", "the prompt is of type bytes"),
        ([None], "a prompt is a text or a list of messages, not NoneType"),
        ([[]], "the prompt has no messages"),
        ([["x"]], "message 1 is a str"),
        ([{"role": "user"}], r"message 1 \(user\) has no content"),
        ([{"role": "user", "content": None}], r"message 1 \(user\) has no content"),
        ([{"role": "user", "content": 3}], "a content of type int"),
        ([{"content": "x"}], "message 1 has no role"),
    ],
)
def test_prompts_of_other_types_are_rejected(model, prompt, message):
    with pytest.raises(DataError, match=message):
        mowa.generate(model, prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number, at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"warmth": 1}, "generate has no option 'warmth': it has max_new_tokens"),
        ({"stop": 1}, "stop is 1: it must be a text"),
    ],
)
def test_options_out_of_range_are_rejected(model, options, message):
    with pytest.raises(ModelError, match=message):
        mowa.generate(model, "one", **options)


def test_prompts_may_be_any_iterable(model):
    expected = mowa.generate(model, PROMPTS, max_new_tokens=4, temperature=0)
    options = {"max_new_tokens": np.int64(4), "temperature": 0, "stop": None}
    for prompts in ((one for one in PROMPTS), np.array(PROMPTS), tuple(PROMPTS)):
        assert mowa.generate(model, prompts, **options) == expected
    assert mowa.generate(model, np.str_(PROMPTS[0]), **options) == expected[0]
