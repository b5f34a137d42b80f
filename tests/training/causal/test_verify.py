"""Before a run, samples of all lengths have the same loss in a batch as by themselves."""

import contextlib
import copy
from types import SimpleNamespace

import pytest

from mowa.errors import TrainingStopped
from mowa.training.causal import trainer, verify
from mowa.training.config import dispatch
from tests.models.causal.test_document_rope import LONGROPE
from tests.tiny_causal import tiny_causal
from tests.training.causal import chats
from tests.training.causal.test_trainer import losses, report

ORIGINAL = 30  # tokens: the samples have 23 to 41
PHI = {"rope_parameters": LONGROPE, "max_position_embeddings": 64, "original_max_position_embeddings": ORIGINAL}


def train(folder, out="out", changes=PHI, **overrides):
    if not (folder / "base").is_dir():
        tiny_causal(folder / "base", "phi3", hidden_size=32, **copy.deepcopy(changes))
        chats.conversations(folder / "chats.jsonl")
    options = {"data__max_length": 64, "batch__tokens": 10_000, "evaluation__eval_steps": 1}
    recipe = dispatch.parse(chats.recipe(folder, **options | overrides), "test")
    return dispatch.train(recipe, folder / out, threads=1)


def test_packed_and_padded_runs_around_the_original_length_have_the_same_losses(tmp_path):
    packed = train(tmp_path, "packed")
    padded = train(tmp_path, "padded", batch__packing=False)
    stock = train(tmp_path, "stock", memory__accelerate=False)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-3)
    assert losses(packed) == pytest.approx(losses(stock), rel=1e-4)
    for when in ("baseline_metrics", "metrics"):
        assert report(packed)[when]["dev"]["loss"] == pytest.approx(report(padded)[when]["dev"]["loss"], rel=1e-3)


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_positions_of_other_documents_are_detected(tmp_path, monkeypatch, accelerated, packed):
    monkeypatch.setattr(trainer, "document_rope", lambda net: contextlib.nullcontext())
    with pytest.raises(TrainingStopped, match=r"packed and unpacked differs: .* in a batch of samples of \d+, "):
        train(tmp_path, memory__accelerate=accelerated, batch__packing=packed)


class Sample:
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize(
    ("original", "tokens", "expected"),
    [
        (None, 100, [60, 5]),
        (None, 64, [60]),
        (30, 100, [31, 30, 5]),  # both sides of the original length first
        (30, 200, [31, 30, 60, 5]),
        (90, 100, [60, 5]),  # every sample is below
    ],
)
def test_the_checked_samples(monkeypatch, original, tokens, expected):
    splits = SimpleNamespace(train=[Sample(length) for length in (60, 5, 31, 7, 30, 8, 9)])
    recipe = SimpleNamespace(batch=SimpleNamespace(tokens=tokens))
    monkeypatch.setattr(verify, "original_length", lambda net: original)
    short, long = verify.select_batches(SimpleNamespace(splits=splits, recipe=recipe, model=SimpleNamespace(net=None)))
    assert [len(sample) for sample in short] == [5, 7, 8, 9]
    assert [len(sample) for sample in long] == expected
