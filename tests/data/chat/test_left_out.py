"""What is not trained on: turns and rows marked so, and rows that are lost after they were read."""

import numpy as np
import pytest

from mowa.data.chat.conversations import parse_rows
from mowa.errors import DataError
from tests.data.chat.test_tokenize import encode, trained_texts
from tests.data.chat.tokenizers import tokenizer


def parse(*rows, **options):
    return parse_rows(((f"row {number}", row) for number, row in enumerate(rows, 1)), "chats.jsonl", **options)


def row(*answers, **columns):
    """Return a row of as many questions as answers; an answer may be a message with more keys."""
    turns = []
    for answer in answers:
        turns += [
            {"role": "user", "content": "x"},
            {"role": "assistant"} | (answer if isinstance(answer, dict) else {}),
        ]
        turns[-1].setdefault("content", answer)
    return {"messages": turns, **columns}


FLAGS = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}, {"train": "false"}]


@pytest.mark.parametrize("flag", FLAGS, ids=str)
@pytest.mark.parametrize("family", ["chatml", "marked", "thinking", "spaced"])
def test_a_turn_that_is_not_to_be_trained_is_context_alone(family, flag):
    """The tokens are those of the conversation without the flag, and the other answers are trained as there."""
    marked, plain = row({"content": "Warsaw", **flag}, "Of course"), row("Warsaw", "Of course")
    samples, report = encode(parse(marked), family)
    whole, _ = encode(parse(plain), family)
    assert [trained_texts(sample, family) for sample in samples] == [trained_texts(whole[-1], family)[-1:]]
    assert samples[0].input_ids[: len(whole[-1])].tolist() == whole[-1].input_ids.tolist()
    assert not report.dropped


def test_the_untrained_turn_may_be_the_last_or_between_others():
    samples, _ = encode(parse(row("one", {"content": "two", "weight": 0}, "three")), "chatml")
    assert trained_texts(samples[0], "chatml") == ["one<|im_end|>", "three<|im_end|>"]
    samples, _ = encode(parse(row("one", {"content": "two", "weight": 0})), "chatml")
    assert trained_texts(samples[0], "chatml") == ["one<|im_end|>"]


def test_all_tokens_but_those_of_the_turn_are_trained_with_train_on_all():
    samples, _ = encode(parse(row({"content": "Warsaw", "weight": 0}, "Of course")), "chatml", train_on="all")
    (whole,), _ = encode(parse(row("Warsaw", "Of course")), "chatml")
    assert samples[0].input_ids.tolist() == whole.input_ids.tolist()
    untrained = np.flatnonzero(~samples[0].loss_mask)
    assert tokenizer("chatml").decode(whole.input_ids[untrained]) == "Warsaw<|im_end|>"


def test_weights_of_one_change_nothing():
    weighted = row(*({"content": text, "weight": 1, "train": True} for text in ("Warsaw", "Of course")))
    (found,), _ = encode(parse(weighted), "chatml")
    (plain,), _ = encode(parse(row("Warsaw", "Of course")), "chatml")
    assert np.array_equal(found.loss_mask, plain.loss_mask)
    assert not parse(weighted).unused
    assert parse(row({"content": "x", "weight": 0.5})).unused == {"messages[].weight": (1, "row 1")}


def test_rows_without_a_trained_answer_are_excluded_but_not_invalid():
    untrained = row({"content": "Warsaw", "weight": 0})
    found = parse(untrained, untrained, untrained, row("y"), on_invalid="stop")
    assert not found.dropped
    reason = "no answer is to be trained on (weight: 0 or train: false)"
    assert found.excluded == {reason: (3, "row 1")}
    samples, report = encode(found, "chatml")
    assert [sample.id for sample in samples] == ["4"]
    assert f"excluded: {reason}" in report.summary()
    with pytest.raises(DataError, match=r"chats.jsonl: none of 2 rows is trained on; 2: no answer is to be trained"):
        encode(parse(untrained, untrained), "chatml")
    samples, report = encode(parse(row("a", {"content": "b", "weight": 0}), row("y")), "chatml", train_on="last")
    assert [sample.id for sample in samples] == ["2"]
    assert sum(count for count, _ in report.excluded.values()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "x", "completion": "bad", "label": False},
        {"prompt": "x", "completion": "bad", "label": "False"},
        {"prompt": "x", "completion": "bad", "label": 0},
        {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "bad"}]}
        | {"label": False},
        {"messages": row("bad")["messages"], "label": False},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "bad"}], "kto_tag": False},
        {"instruction": "x", "output": "bad", "kto_tag": False},
    ],
)
def test_answers_marked_as_bad_for_kto_are_excluded(bad):
    label = next(name for name in ("label", "kto_tag") if name in bad)
    good = bad | {label: 1 if bad[label] == 0 and bad[label] is not False else True}
    found = parse(bad, bad, good)
    assert [sample.id for sample in found] == ["3"]
    assert found.excluded == {f"{label} is false: the answer is marked as bad": (2, "row 1")}
    assert not found.unused


def test_other_labels_are_no_marks_of_bad_answers():
    assert len(parse({"text": "x", "label": False})) == 1
    classes = parse({"question": "x", "answer": "y", "label": 0}, {"question": "x", "answer": "y", "label": 3})
    assert len(classes) == 2
    assert classes.unused == {"label": (2, "row 1")}


LONG = row("word " * 60)


def test_rows_that_are_too_long_count_as_left_out():
    with pytest.raises(
        DataError, match=r"chats.jsonl: 19 of 20 rows are left out.*longer than 60 tokens \(19, first: 1\).*max_length"
    ):
        encode(parse(*[LONG] * 19, row("y")), "chatml", max_length=60)
    samples, _ = encode(parse(*[LONG] * 10, *[row("y")] * 10), "chatml", max_length=60)
    assert len(samples) == 10
    samples, _ = encode(parse(*[LONG] * 19, row("y")), "chatml", max_length=60, on_overflow="truncate")
    assert len(samples) == 20


def test_rows_invalid_refused_and_too_long_are_counted_together():
    invalid, refused = row(""), {"messages": [{"role": "system", "content": "Be kind."}, *row("y")["messages"]]}
    rows = [invalid, refused, LONG, row("y"), row("z")]
    with pytest.raises(DataError, match=r"3 of 5 rows are left out"):
        encode(parse(*rows), "mistral", max_length=60)
    samples, report = encode(parse(*rows, row("z")), "mistral", max_length=60)
    assert len(samples) == 3
    assert len(report.dropped) == 3


def test_rows_that_the_template_refuses_are_named_as_the_cause():
    refused = {"messages": [{"role": "system", "content": "Be kind."}, *row("y")["messages"]]}
    with pytest.raises(DataError, match=r"2 of 3 rows are left out.*Only user and assistant roles.*data.chat_template"):
        encode(parse(refused, refused, row("y")), "mistral")


def test_excluded_rows_do_not_count_as_lost():
    rejected = {"prompt": "x", "completion": "bad", "label": False}
    rows = [rejected] * 7 + [{"prompt": "x", "completion": "y", "label": True}] * 2
    rows.append({"prompt": "x", "completion": "word " * 60, "label": True})
    samples, _ = encode(parse(*rows), "chatml", max_length=60)
    assert len(samples) == 2


@pytest.mark.parametrize(
    ("rows", "family", "reason"),
    [
        ([row("y"), row("y"), LONG], "chatml", "3: longer than 60 tokens"),
        ([row("y"), row({"content": "y", "thinking": "z"})], "chatml", r"2: the chat template omits reasoning"),
        ([row("y"), row("y", system="Be kind.")], "mistral", "2: the chat template raises an error .*Only user"),
    ],
)
def test_stop_on_invalid_stops_at_what_is_refused_later_too(rows, family, reason):
    assert len(encode(parse(*rows), family, max_length=60)[0]) < len(rows)
    with pytest.raises(DataError, match=rf"chats.jsonl: {reason}.*on_invalid: drop"):
        encode(parse(*rows, on_invalid="stop"), family, max_length=60)


def test_a_row_of_several_samples_is_lost_only_with_all_of_them():
    rewritten = row("y", "word " * 60)
    samples, report = encode(parse(rewritten), "thinking", max_length=60)
    assert [(sample.id, sample.conversation_id) for sample in samples] == [("1#1", "1")]
    assert report.dropped == {"longer than 60 tokens": (1, "1#2")}
