"""Packed and padded batches of tokens: the loss is that of each sample by itself."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mowa.tasks import causal
from mowa.tasks.causal import IGNORE_INDEX


class Sample:
    def __init__(self, input_ids, loss_mask):
        self.input_ids, self.loss_mask = np.array(input_ids), np.array(loss_mask, dtype=bool)

    def __len__(self):
        return len(self.input_ids)


def make_samples(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(3, 90, n), rng.random(n) < 0.6) for n in lengths]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=99)).eval()


def test_packed_samples_are_concatenated_and_positions_restart():
    batch = causal.pack([Sample([5, 6, 7], [1, 0, 1]), Sample([8, 9], [1, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX, 9]]


def test_padded_samples():
    batch = causal.pad([Sample([5, 6, 7], [1, 0, 1]), Sample([8, 9], [1, 1])], 4, pad_to_multiple_of=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 4], [8, 9, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX],
        [IGNORE_INDEX, 9, IGNORE_INDEX, IGNORE_INDEX],
    ]


@pytest.mark.parametrize("lengths", [(1,), (1, 2), (63, 5, 17), (40, 40, 40, 1)])
def test_packed_padded_and_single_samples_have_the_same_loss(net, lengths):
    samples = make_samples(*lengths)
    single = causal.evaluate(net, (causal.pad([sample], 0, pad_to_multiple_of=1) for sample in samples))
    assert causal.evaluate(net, [causal.pack(samples)]) == pytest.approx(single, rel=1e-5)
    assert causal.evaluate(net, [causal.pad(samples, 98)]) == pytest.approx(single, rel=1e-5)
    assert single["tokens"] == causal.count_trained_tokens(samples)


def test_the_loss_is_that_of_transformers(net):
    (sample,) = make_samples(50)
    batch = causal.pad([sample], 0, pad_to_multiple_of=1)
    assert causal.evaluate(net, [batch])["loss"] == pytest.approx(float(net(**batch).loss.detach()), rel=1e-5)


def test_without_trained_tokens_the_loss_is_zero(net):
    assert causal.evaluate(net, [causal.pad([Sample([5, 6], [0, 0])], 0)]) == {
        "loss": 0.0,
        "accuracy": 0.0,
        "tokens": 0,
    }
