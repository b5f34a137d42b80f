"""Text generation: transformers' own answers, whatever the batch, as text and as a stream."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mowa import loading
from mowa.engines import generation
from mowa.engines.generation import GenerationSettings
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
