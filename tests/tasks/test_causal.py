"""Rows of tokens as batches: the loss is that of each row by itself, whichever way they lie."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mowa.tasks import causal
from mowa.tasks.causal import IGNORE_INDEX


class Row:
    def __init__(self, ids, learnt):
        self.ids, self.learnt = np.array(ids), np.array(learnt, dtype=bool)

    def __len__(self):
        return len(self.ids)


def rows(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Row(rng.integers(3, 90, n), rng.random(n) < 0.6) for n in lengths]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=99)).eval()


def test_packed_rows_lie_end_to_end_and_begin_anew():
    batch = causal.pack([Row([5, 6, 7], [1, 0, 1]), Row([8, 9], [1, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX, 9]]


def test_padded_rows_lie_side_by_side():
    batch = causal.pad([Row([5, 6, 7], [1, 0, 1]), Row([8, 9], [1, 1])], 4, pad_to_multiple_of=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 4], [8, 9, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX],
        [IGNORE_INDEX, 9, IGNORE_INDEX, IGNORE_INDEX],
    ]


@pytest.mark.parametrize("lengths", [(1,), (1, 2), (63, 5, 17), (40, 40, 40, 1)])
def test_packed_padded_and_one_by_one_lose_the_same(net, lengths):
    chosen = rows(*lengths)
    alone = causal.evaluate(net, (causal.pad([row], 0, pad_to_multiple_of=1) for row in chosen))
    assert causal.evaluate(net, [causal.pack(chosen)]) == pytest.approx(alone, rel=1e-5)
    assert causal.evaluate(net, [causal.pad(chosen, 98)]) == pytest.approx(alone, rel=1e-5)
    assert alone["tokens"] == causal.count_trained_tokens(chosen)


def test_the_loss_is_transformers_own(net):
    (row,) = rows(50)
    batch = causal.pad([row], 0, pad_to_multiple_of=1)
    assert causal.evaluate(net, [batch])["loss"] == pytest.approx(float(net(**batch).loss.detach()), rel=1e-5)


def test_nothing_learnt_is_no_loss(net):
    assert causal.evaluate(net, [causal.pad([Row([5, 6], [0, 0])], 0)]) == {"loss": 0.0, "accuracy": 0.0, "tokens": 0}
