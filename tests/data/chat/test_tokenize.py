"""The loss mask of conversations: by hand, against those of transformers and TRL, and by properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.data.chat import template, tokenize
from mowa.data.chat.encode import encode_prompt
from mowa.data.chat.samples import Conversation, Document, Message
from mowa.errors import DataError
from tests.data.chat.tokenizers import CHATML, FAMILIES, MARKED, tokenizer, turn_end

TALKING = [family for family in FAMILIES if family != "bare"]
EXACT = ["chatml", "marked", "llama", "gemma", "mistral"]
TRIMMED = ("llama", "gemma")


def talk(*contents, name="a", system=""):
    """Return a conversation of alternating user and assistant messages."""
    turns = [Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(contents)]
    return Conversation(name, (*([Message("system", system)] if system else []), *turns))


def plain(conversation):
    return [{"role": turn.role, "content": turn.content} for turn in conversation.messages]


def encode(samples, family, **kwargs):
    family_tokenizer = tokenizer(family)
    ends = family_tokenizer.convert_tokens_to_ids([turn_end(family)]) if turn_end(family) else []
    return tokenize.tokenize_conversations(
        samples, family_tokenizer, **{"max_length": 100_000, "eos_token_ids": ends} | kwargs
    )


def trained_texts(sample, family):
    """Return the text of each trained span."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sample.loss_mask, [False]]).astype(int)))
    return [
        tokenizer(family).decode(sample.input_ids[begin:end].tolist())
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
    ]


@pytest.mark.parametrize("family", EXACT)
def test_answers_and_their_end_tokens_are_trained(family):
    samples, report = encode([talk("What?", "Warsaw.", "And?", "Of course")], family)
    before = " " if family == "mistral" else ""
    end = turn_end(family)
    assert trained_texts(samples[0], family) == [f"{before}Warsaw.{end}", f"{before}Of course{end}"]
    assert report.trained_tokens == samples[0].loss_mask.sum()
    assert not [one for one in report.findings if one.name == "EOS is not trained"]


@pytest.mark.parametrize("family", [*EXACT, "spaced"])
def test_tokens_are_those_of_transformers(family):
    conversation = talk("What is x?", "Warsaw, of course.", "Zażółć", "gęślą 😀")
    samples, _ = encode([conversation], family)
    stock = tokenizer(family).apply_chat_template(plain(conversation), tokenize=True, return_dict=True)
    assert samples[0].input_ids.tolist() == stock["input_ids"]


def test_the_mask_is_that_of_transformers_and_trl():
    """Where a template marks generation, TRL's assistant_only_loss takes transformers' mask."""
    conversation = talk("What is x?", "Warsaw, of course.", "Zażółć", "gęślą 😀", system="Be kind.")
    fast = tokenizer("marked")
    stock = fast.apply_chat_template(
        plain(conversation), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=MARKED
    )
    marked, _ = tokenize.tokenize_conversations([conversation], fast, max_length=1000)
    found, _ = tokenize.tokenize_conversations([conversation], fast, max_length=1000, chat_template=CHATML)
    for samples in (marked, found):
        assert samples[0].input_ids.tolist() == stock["input_ids"]
        assert samples[0].loss_mask.astype(int).tolist() == stock["assistant_masks"]


@pytest.mark.filterwarnings("ignore")  # TRL's and torch's own
def test_trl_trains_the_same_tokens(tmp_path):
    """Labels of TRL's SFTTrainer with assistant_only_loss."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    fast = tokenizer("marked")
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(fast), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    conversation = talk("What is x?", "Warsaw, of course.", "And?", "gęślą 😀")
    args = trl.SFTConfig(
        str(tmp_path), assistant_only_loss=True, report_to=[], use_cpu=True, bf16=False, max_length=None
    )
    data = datasets.Dataset.from_list([{"messages": plain(conversation)}])
    trainer = trl.SFTTrainer(net, args, train_dataset=data, processing_class=fast)
    trl_sample = trainer.train_dataset[0]
    ours, _ = tokenize.tokenize_conversations([conversation], fast, max_length=1000, chat_template=CHATML)
    assert ours[0].input_ids.tolist() == trl_sample["input_ids"]
    assert np.where(ours[0].loss_mask, ours[0].input_ids, -100).tolist() == trl_sample["labels"]


MARKERS = [word for _, specials, *_ in FAMILIES.values() for word in specials]
NASTY = st.lists(
    st.sampled_from(["<|im_start|>assistant\n", "[INST]", "\n", " ", "<think>", "x", *MARKERS])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    min_size=1,
    max_size=5,
).map("".join)
CONTENT = NASTY.filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("family", EXACT)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_trained_spans_are_the_assistants_messages(family, contents):
    fast = tokenizer(family)
    normalize = fast.backend_tokenizer.normalizer.normalize_str if family == "gemma" else str
    samples, _ = encode([talk(*(text for pair in contents for text in pair))], family)
    answers = [answer.strip() if family in TRIMMED else answer for _, answer in contents]
    before = " " if family == "mistral" else ""
    assert trained_texts(samples[0], family) == [before + normalize(text) + turn_end(family) for text in answers]


@pytest.mark.parametrize("family", EXACT)
@settings(max_examples=25, deadline=None)
@given(question=CONTENT, answer=CONTENT)
def test_messages_cannot_contain_special_tokens(family, question, answer):
    fast = tokenizer(family)
    ids = [sample.input_ids for sample in encode([talk(question, answer), talk("x", "x", name="b")], family)[0]]
    special = list(fast.all_special_ids)
    assert np.isin(ids[0], special).sum() == np.isin(ids[1], special).sum()


def test_the_tokenizer_is_not_changed():
    fast = tokenizer("chatml")
    before = fast("<|im_end|>")["input_ids"]
    encode([talk("<|im_end|>", "<|im_start|>")], "chatml")
    assert fast("<|im_end|>")["input_ids"] == before
    assert not fast.backend_tokenizer.encode_special_tokens


def test_the_last_answer_may_end_differently():
    samples, report = encode([talk("a", "Warsaw.", "b", "Of course")], "phi")
    assert trained_texts(samples[0], "phi") == ["Warsaw.<|end|>", "Of course<|end|>\n<|endoftext|>"]
    assert not report.warnings


def test_templates_that_rewrite_history():
    samples, report = encode([talk("a", "Warsaw.", "b", "Of course")], "thinking")
    thoughts = "<think>\n\n</think>\n\n"
    assert [trained_texts(sample, "thinking") for sample in samples] == [
        [f"{thoughts}Warsaw.<|im_end|>"],
        [f"{thoughts}Of course<|im_end|>"],
    ]
    assert report.warnings == {"the template rewrites earlier messages": (1, "a")}
    (last,), _ = encode([talk("a", "Warsaw.", "b", "Of course")], "thinking", train_on="last")
    assert last.input_ids[: len(samples[1])].tolist() == samples[1].input_ids.tolist()
    assert last.loss_mask.sum() == samples[1].loss_mask.sum()


def test_a_conversation_that_begins_with_an_answer():
    conversation = Conversation("a", (Message("assistant", "Warsaw"), Message("user", "x")))
    samples, report = encode([conversation], "chatml")
    assert trained_texts(samples[0], "chatml") == ["Warsaw<|im_end|>"]
    assert "answers do not begin with the generation prompt" in report.warnings


def test_a_template_with_content_parts():
    lists = CHATML.replace("message.content", "message.content[0].text if message.content is not string else ''")
    samples, _ = encode([talk("a", "Warsaw.")], "chatml", chat_template=lists)
    assert trained_texts(samples[0], "chatml") == ["Warsaw.<|im_end|>"]
    with pytest.raises(DataError, match="omits the assistant's messages"):
        encode([talk("a", "Warsaw.")], "chatml", chat_template=CHATML.replace("message.content", "'x'"))


def test_train_on():
    conversation = talk("a", "Warsaw.", "b", "Of course")
    samples, _ = encode([conversation], "marked", train_on="last")
    assert trained_texts(samples[0], "marked") == ["Of course<|im_end|>"]
    samples, _ = encode([conversation], "chatml", train_on="all")
    assert samples[0].loss_mask.all()


def test_documents_begin_with_bos_and_end_with_eos():
    fast = tokenizer("llama")
    samples, _ = encode([Document("a", "Warsaw"), Document("b", "<|begin_of_text|>Warsaw")], "llama")
    assert samples[0].input_ids.tolist() == samples[1].input_ids.tolist()
    assert fast.decode(samples[0].input_ids.tolist()) == "<|begin_of_text|>Warsaw<|eot_id|>"
    assert samples[0].loss_mask.all()
    with pytest.raises(DataError, match="have no responses"):
        encode([Document("a", "Warsaw")], "llama", train_on="responses")


@pytest.mark.parametrize("length", [1, 2, 63])
def test_long_documents_are_split_without_loss(length):
    text = "Warsaw, of course. " * 20
    (whole,), _ = encode([Document("a", text)], "bare")
    if length == 1:
        with pytest.raises(DataError, match="all labels masked"):
            encode([Document("a", text)], "bare", on_overflow="split", max_length=length)
        return
    samples, report = encode([Document("a", text)], "bare", on_overflow="split", max_length=length)
    joined = np.concatenate([sample.input_ids for sample in samples])
    assert np.array_equal(joined, whole.input_ids[: len(joined)])
    assert len(whole) - len(joined) <= 1
    assert report.length_percentiles[2] <= length


def test_long_conversations_are_dropped_or_truncated():
    conversations = [
        talk("x", "Warsaw", name="short"),
        talk("x", "Warsaw " * 50, name="cut"),
        talk("x " * 90, "x", name="gone"),
    ]
    samples, report = encode(conversations, "chatml", max_length=60)
    assert [sample.id for sample in samples] == ["short"]
    assert report.dropped == {"longer than 60 tokens": (2, "cut")}
    samples, report = encode(conversations, "chatml", max_length=60, on_overflow="truncate")
    assert [(sample.id, len(sample)) for sample in samples] == [("short", len(samples[0])), ("cut", 60)]
    assert report.dropped == {"no trained tokens": (1, "gone")}
    assert not [one for one in report.findings if one.name == "EOS is not trained"]


def test_a_missing_template_raises():
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template.*chatml"):
        encode([talk("a", "b")], "bare")


@pytest.mark.parametrize("name", sorted(template.BUILTIN_TEMPLATES))
def test_builtin_templates(name):
    samples, report = encode(
        [talk("What?", "Warsaw.", "And?", "x")], "bare", chat_template=template.BUILTIN_TEMPLATES[name]
    )
    end = {"chatml": "<|im_end|>", "plain": "<|endoftext|>"}[name]
    assert trained_texts(samples[0], "bare") == [f"Warsaw.{end}", f"x{end}"]
    missing = [one.advice for one in report.findings if one.name == "EOS is not trained"]
    assert bool(missing) == (name == "chatml")


def test_checks():
    conversations = [talk("What?", "Warsaw.")]
    with pytest.raises(DataError, match=r"vocabulary: token .* outside the model's 10 embeddings"):
        encode(conversations, "chatml", vocab_size=10)
    _, report = encode(conversations, "chatml", vocab_size=100_000)
    assert "another model" in str(report.findings)
    _, report = encode(conversations, "chatml", vocab_size=len(tokenizer("chatml")))
    assert not report.findings
    _, report = encode(conversations, "gemma", eos_token_ids=())
    assert [one.name for one in report.findings] == ["EOS is not trained"]
    with pytest.raises(DataError, match="double BOS"):
        encode(conversations, "llama", chat_template="{{ bos_token }}" + tokenizer("llama").chat_template)
    with pytest.raises(DataError, match="all labels masked"):
        encode([talk("What?", "x " * 99)], "chatml", max_length=9)


def test_a_template_error_drops_one_conversation():
    conversations = [talk("a", "b"), Conversation("tools", (*talk("a", "b").messages, Message("tool", "x")))]
    samples, report = encode(conversations, "mistral")
    assert [sample.id for sample in samples] == ["a"]
    (reason, (count, first)), *_ = report.dropped.items()
    assert (reason, count) == ("the chat template raises an error", 1)
    assert "Only user and assistant" in first


def test_special_tokens_in_messages_are_reported():
    _, report = encode([talk("<|im_end|>", "Warsaw")], "spaced")
    assert "special tokens in turns" in [one.name for one in report.findings]


def test_format_sample():
    samples, report = encode([talk("What?", "Warsaw.\x1b[2J")], "chatml")
    shown = tokenize.format_sample(samples[0], tokenizer("chatml"))
    assert "⟦Warsaw.\ufffd[2J<|im_end|>⟧" in shown
    assert "<|im_start|>user\nWhat?" in shown
    assert "\x1b[32mWarsaw" in tokenize.format_sample(samples[0], tokenizer("chatml"), color=True)
    assert "trained tokens" in report.summary()


def test_escape_and_unescape():
    chat_template = template.resolve_chat_template(tokenizer("chatml"))
    text = "a <|im_end|> <|endoftext|><|im_start|>"
    assert chat_template.unescape(chat_template.escape(text)) == text
    assert chat_template.escape({"a": ["x", 1, None]}) == {"a": ["x", 1, None]}


PRIVATE = [chr(0xF0000 + index) for index in (0, 1, 2, 3)]


@pytest.mark.parametrize("family", ["chatml", "spaced", "marked"])
@pytest.mark.parametrize("beside", ["", " <|im_end|>"])
def test_private_use_characters_are_text(family, beside):
    """No character of a message becomes a special token: not alone, nor beside one that is spelled."""
    fast, content = tokenizer(family), "".join(PRIVATE) + PRIVATE[0] + " x"
    samples, _ = encode([talk(content + beside, content, name="a"), talk("x" + beside, "y", name="b")], family)
    special = list(fast.all_special_ids)
    assert np.isin(samples[0].input_ids, special).sum() == np.isin(samples[1].input_ids, special).sum()
    assert fast.decode(samples[0].input_ids.tolist()).count(content) == 2
    prompt = encode_prompt(fast, [{"role": "user", "content": content + beside}])
    assert fast.decode(prompt).count(content) == 1
    assert np.isin(prompt, special).sum() == 3 + (bool(beside) and family == "spaced")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PRIVATE, "\U000f0004", "<|im_end|>", "<|im_start|>", "<|im_", "end|>", "x"])))
def test_no_message_spells_a_placeholder(pieces):
    chat_template, text = template.resolve_chat_template(tokenizer("chatml")), "".join(pieces)
    assert chat_template.unescape(chat_template.escape(text)) == text
    assert not chat_template.spells_special_tokens(chat_template.escape(text))


def test_names_of_arguments_cannot_be_special_tokens():
    arguments = {"<|im_end|>": {"<|im_start|>": ["<|endoftext|>"]}}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    conversation = Conversation("a", (Message("user", "x"), Message("assistant", "", (call,))))
    listed = CHATML.replace("{{ message.content }}", "{{ message.content }}{{ (message.tool_calls or 0) | tojson }}")
    samples, _ = encode([conversation], "chatml", chat_template=listed)
    assert np.isin(samples[0].input_ids, tokenizer("chatml").all_special_ids).sum() == 4
    assert '{"<|im_end|>": {"<|im_start|>": ["<|endoftext|>"]}}' in trained_texts(samples[0], "chatml")[0]


def test_parts_of_a_conversation_know_it_and_ids_may_contain_anything():
    conversations = [talk("a", "b", "c", "d", name="x#1"), talk("a", "b", name="x#2")]
    samples, _ = encode(conversations, "thinking")
    assert [(one.id, one.conversation_id) for one in samples] == [("x#1#1", "x#1"), ("x#1#2", "x#1"), ("x#2", "x#2")]
    samples, _ = encode([Document("y#1", "Warsaw, of course. " * 4)], "bare", on_overflow="split", max_length=9)
    assert len(samples) > 1
    assert {one.conversation_id for one in samples} == {"y#1"}
    (cut,), _ = encode([Document("y#1", "Warsaw, of course. " * 4)], "bare", on_overflow="truncate", max_length=9)
    assert cut.conversation_id == "y#1"
