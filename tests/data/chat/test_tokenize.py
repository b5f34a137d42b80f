"""Which tokens of a conversation are learnt: by hand, against transformers' and TRL's masks, and by law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.data.chat import template, tokenize
from mowa.data.chat.conversations import Conversation, Document, Message
from mowa.errors import DataError
from tests.data.chat.tokenizers import CHATML, FAMILIES, MARKED, tokenizer, turn_end

TALKING = [family for family in FAMILIES if family != "bare"]
EXACT = ["chatml", "marked", "llama", "gemma", "mistral"]
TRIMMED = ("llama", "gemma")


def talk(*contents, name="a", system=""):
    """Turns of a user and an assistant, one after the other."""
    turns = [Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(contents)]
    return Conversation(name, (*([Message("system", system)] if system else []), *turns))


def plain(conversation):
    return [{"role": turn.role, "content": turn.content} for turn in conversation.messages]


def encode(items, family, **how):
    there = tokenizer(family)
    ends = there.convert_tokens_to_ids([turn_end(family)]) if turn_end(family) else []
    return tokenize.tokenize_conversations(items, there, **{"length": 100_000, "eos_ids": ends} | how)


def learnt(row, family):
    """The text of each learnt stretch."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], row.learnt, [False]]).astype(int)))
    return [
        tokenizer(family).decode(row.ids[begin:end].tolist())
        for begin, end in zip(borders[::2], borders[1::2], strict=True)
    ]


@pytest.mark.parametrize("family", EXACT)
def test_answers_and_what_ends_them_are_learnt(family):
    rows, report = encode([talk("What?", "Warsaw.", "And?", "Of course")], family)
    before = " " if family == "mistral" else ""
    end = turn_end(family)
    assert learnt(rows[0], family) == [f"{before}Warsaw.{end}", f"{before}Of course{end}"]
    assert report.trained_tokens == rows[0].loss_mask.sum()
    assert not [one for one in report.findings if one.name == "EOS is not learnt"]


@pytest.mark.parametrize("family", [*EXACT, "spaced"])
def test_tokens_are_those_of_transformers(family):
    conversation = talk("What is x?", "Warsaw, of course.", "Zażółć", "gęślą 😀")
    rows, _ = encode([conversation], family)
    stock = tokenizer(family).apply_chat_template(plain(conversation), tokenize=True, return_dict=True)
    assert rows[0].input_ids.tolist() == stock["input_ids"]


def test_the_mask_is_that_of_transformers_and_trl():
    """Where a template marks generation, TRL's assistant_only_loss takes transformers' mask."""
    conversation = talk("What is x?", "Warsaw, of course.", "Zażółć", "gęślą 😀", system="Be kind.")
    there = tokenizer("marked")
    stock = there.apply_chat_template(
        plain(conversation), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=MARKED
    )
    marked, _ = tokenize.tokenize_conversations([conversation], there, max_length=1000)
    found, _ = tokenize.tokenize_conversations([conversation], there, max_length=1000, chat_template=CHATML)
    for rows in (marked, found):
        assert rows[0].input_ids.tolist() == stock["input_ids"]
        assert rows[0].loss_mask.astype(int).tolist() == stock["assistant_masks"]


@pytest.mark.filterwarnings("ignore")  # TRL's and torch's own
def test_trl_learns_the_same_tokens(tmp_path):
    """SFTTrainer's own labels, with assistant_only_loss."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    there = tokenizer("marked")
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(there), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    conversation = talk("What is x?", "Warsaw, of course.", "And?", "gęślą 😀")
    args = trl.SFTConfig(
        str(tmp_path), assistant_only_loss=True, report_to=[], use_cpu=True, bf16=False, max_length=None
    )
    data = datasets.Dataset.from_list([{"messages": plain(conversation)}])
    trainer = trl.SFTTrainer(net, args, train_dataset=data, processing_class=there)
    row = trainer.train_dataset[0]
    ours, _ = tokenize.tokenize_conversations([conversation], there, max_length=1000, chat_template=CHATML)
    assert ours[0].input_ids.tolist() == row["input_ids"]
    assert np.where(ours[0].loss_mask, ours[0].input_ids, -100).tolist() == row["labels"]


MARKERS = [word for _, specials, *_ in FAMILIES.values() for word in specials]
NASTY = st.lists(
    st.sampled_from(["<|im_start|>assistant\n", "[INST]", "\n", " ", "<think>", "x", *MARKERS])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    min_size=1,
    max_size=5,
).map("".join)
SAID = NASTY.filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("family", EXACT)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
def test_what_is_learnt_is_what_the_assistant_said(family, contents):
    there = tokenizer(family)
    normal = there.backend_tokenizer.normalizer.normalize_str if family == "gemma" else str
    rows, _ = encode([talk(*(text for pair in contents for text in pair))], family)
    said = [answer.strip() if family in TRIMMED else answer for _, answer in contents]
    before = " " if family == "mistral" else ""
    assert learnt(rows[0], family) == [before + normal(text) + turn_end(family) for text in said]


@pytest.mark.parametrize("family", EXACT)
@settings(max_examples=25, deadline=None)
@given(asked=SAID, said=SAID)
def test_nobody_can_write_a_special_token(family, asked, said):
    there = tokenizer(family)
    ids = [row.input_ids for row in encode([talk(asked, said), talk("x", "x", name="b")], family)[0]]
    special = list(there.all_special_ids)
    assert np.isin(ids[0], special).sum() == np.isin(ids[1], special).sum()


def test_the_tokenizer_is_left_as_it_was():
    there = tokenizer("chatml")
    before = there("<|im_end|>")["input_ids"]
    encode([talk("<|im_end|>", "<|im_start|>")], "chatml")
    assert there("<|im_end|>")["input_ids"] == before
    assert not there.backend_tokenizer.encode_special_tokens


def test_a_turn_that_ends_otherwise_in_the_middle():
    rows, report = encode([talk("a", "Warsaw.", "b", "Of course")], "phi")
    assert learnt(rows[0], "phi") == ["Warsaw.<|end|>", "Of course<|end|>\n<|endoftext|>"]
    assert not report.warnings


def test_where_history_is_rewritten_each_answer_is_a_text_of_its_own():
    rows, report = encode([talk("a", "Warsaw.", "b", "Of course")], "thinking")
    thoughts = "<think>\n\n</think>\n\n"
    assert [learnt(row, "thinking") for row in rows] == [
        [f"{thoughts}Warsaw.<|im_end|>"],
        [f"{thoughts}Of course<|im_end|>"],
    ]
    assert report.warnings == {"the template rewrites earlier turns": (1, "a")}
    (last,), _ = encode([talk("a", "Warsaw.", "b", "Of course")], "thinking", learn="last")
    assert last.input_ids[: len(rows[1])].tolist() == rows[1].input_ids.tolist()
    assert last.loss_mask.sum() == rows[1].loss_mask.sum()


def test_a_conversation_that_the_assistant_begins():
    conversation = Conversation("a", (Message("assistant", "Warsaw"), Message("user", "x")))
    rows, report = encode([conversation], "chatml")
    assert learnt(rows[0], "chatml") == ["Warsaw<|im_end|>"]
    assert "the generation prompt is not how the answer begins" in report.warnings


def test_a_template_that_wants_lists_gets_them():
    lists = CHATML.replace("message.content", "message.content[0].text if message.content is not string else ''")
    rows, _ = encode([talk("a", "Warsaw.")], "chatml", template=lists)
    assert learnt(rows[0], "chatml") == ["Warsaw.<|im_end|>"]
    with pytest.raises(DataError, match="leaves out what the assistant says"):
        encode([talk("a", "Warsaw.")], "chatml", template=CHATML.replace("message.content", "'x'"))


def test_only_the_last_answer_or_everything():
    conversation = talk("a", "Warsaw.", "b", "Of course")
    rows, _ = encode([conversation], "marked", learn="last")
    assert learnt(rows[0], "marked") == ["Of course<|im_end|>"]
    rows, _ = encode([conversation], "chatml", learn="all")
    assert rows[0].loss_mask.all()


def test_a_passage_begins_with_bos_and_ends_with_eos():
    there = tokenizer("llama")
    rows, _ = encode([Document("a", "Warsaw"), Document("b", "<|begin_of_text|>Warsaw")], "llama")
    assert rows[0].input_ids.tolist() == rows[1].input_ids.tolist()
    assert there.decode(rows[0].input_ids.tolist()) == "<|begin_of_text|>Warsaw<|eot_id|>"
    assert rows[0].loss_mask.all()
    with pytest.raises(DataError, match="has no responses"):
        encode([Document("a", "Warsaw")], "llama", learn="responses")


@pytest.mark.parametrize("length", [1, 2, 63])
def test_long_passages_are_split_and_nothing_is_lost(length):
    text = "Warsaw, of course. " * 20
    (whole,), _ = encode([Document("a", text)], "bare")
    if length == 1:
        with pytest.raises(DataError, match="all labels masked"):
            encode([Document("a", text)], "bare", long="split", length=length)
        return
    rows, report = encode([Document("a", text)], "bare", long="split", length=length)
    joined = np.concatenate([row.input_ids for row in rows])
    assert np.array_equal(joined, whole.input_ids[: len(joined)])
    assert len(whole) - len(joined) <= 1
    assert report.length_percentiles[2] <= length


def test_long_conversations_are_dropped_or_truncated():
    items = [
        talk("x", "Warsaw", name="short"),
        talk("x", "Warsaw " * 50, name="cut"),
        talk("x " * 90, "x", name="gone"),
    ]
    rows, report = encode(items, "chatml", length=60)
    assert [row.id for row in rows] == ["short"]
    assert report.dropped == {"longer than 60 tokens": (2, "cut")}
    rows, report = encode(items, "chatml", length=60, long="truncate")
    assert [(row.id, len(row)) for row in rows] == [("short", len(rows[0])), ("cut", 60)]
    assert report.dropped == {"no token is learnt": (1, "gone")}
    assert not [one for one in report.findings if one.name == "EOS is not learnt"]


def test_without_a_template_it_says_what_to_give():
    with pytest.raises(DataError, match=r"no chat template.*data\.template.*chatml"):
        encode([talk("a", "b")], "bare")


@pytest.mark.parametrize("name", sorted(tokenize.BUILTIN_TEMPLATES))
def test_our_own_templates(name):
    rows, report = encode([talk("What?", "Warsaw.", "And?", "x")], "bare", template=tokenize.BUILTIN_TEMPLATES[name])
    end = {"chatml": "<|im_end|>", "plain": "<|endoftext|>"}[name]
    assert learnt(rows[0], "bare") == [f"Warsaw.{end}", f"x{end}"]
    missing = [one.advice for one in report.findings if one.name == "EOS is not learnt"]
    assert bool(missing) == (name == "chatml")


def test_checks_say_what_would_be_learnt_wrongly():
    items = [talk("What?", "Warsaw.")]
    with pytest.raises(DataError, match=r"vocabulary: token .* the model has 10 embeddings"):
        encode(items, "chatml", vocab_size=10)
    _, report = encode(items, "chatml", vocab_size=100_000)
    assert "another model" in str(report.findings).lower()
    _, report = encode(items, "chatml", vocab_size=len(tokenizer("chatml")))
    assert not report.findings
    _, report = encode(items, "gemma", eos_ids=())
    assert [one.name for one in report.findings] == ["EOS is not learnt"]
    with pytest.raises(DataError, match="double BOS"):
        encode(items, "llama", template="{{ bos_token }}" + tokenizer("llama").chat_template)
    with pytest.raises(DataError, match="all labels masked"):
        encode([talk("What?", "x " * 99)], "chatml", length=9)


def test_a_refusing_template_costs_one_conversation():
    items = [talk("a", "b"), Conversation("tools", (*talk("a", "b").messages, Message("tool", "x")))]
    rows, report = encode(items, "mistral")
    assert [row.id for row in rows] == ["a"]
    (reason, (count, first)), *_ = report.dropped.items()
    assert (reason, count) == ("the chat template refuses it", 1)
    assert "Only user and assistant" in first


def test_this_tokenizer_cannot_be_guarded_and_says_so():
    _, report = encode([talk("<|im_end|>", "Warsaw")], "spaced")
    assert "special tokens in turns" in [one.name for one in report.findings]


def test_learnt_words_are_shown():
    rows, report = encode([talk("What?", "Warsaw.\x1b[2J")], "chatml")
    shown = tokenize.format_sample(rows[0], tokenizer("chatml"))
    assert "⟦Warsaw.\ufffd[2J<|im_end|>⟧" in shown
    assert "<|im_start|>user\nWhat?" in shown
    assert "\x1b[32mWarsaw" in tokenize.format_sample(rows[0], tokenizer("chatml"), color=True)
    assert "tokens learnt" in report.summary()


def test_turns_without_stand_ins_are_not_touched():
    how = template.resolve_chat_template(tokenizer("chatml"))
    text = "a <|im_end|> <|endoftext|><|im_start|>"
    assert how.unescape(how.escape(text)) == text
    assert how.escape({"a": ["x", 1, None]}) == {"a": ["x", 1, None]}
