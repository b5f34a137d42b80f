"""Logits of chosen tokens: those of the whole batch, in a fraction of its memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mowa import loading
from mowa.adapters import causal as adapters
from mowa.adapters import lora
from mowa.evaluation import scoring
from mowa.families import get_family
from mowa.models.causal import accelerate, token_logits
from mowa.tasks import causal
from mowa.training.causal import dataset
from tests.families.test_unregistered import LINEARS as UNREGISTERED
from tests.families.test_unregistered import unregistered
from tests.families.tiny import CAUSAL, tiny
from tests.tasks.test_causal import make_samples
from tests.tiny_causal import tiny_causal

LENGTHS = (17, 9, 23, 1, 12)
TOKENS, VOCABULARY = 512, 4096


class LargestTensor(TorchDispatchMode):
    """Record the size in bytes of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.untyped_storage().nbytes())
        return out


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(token_logits.CHUNK_BYTES, "cpu", 1 << 18)


@pytest.mark.parametrize("family", CAUSAL)
def test_they_are_those_of_transformers(family, monkeypatch):
    net = tiny(family)
    batch = causal.pad(make_samples(*LENGTHS), 0, pad_to_multiple_of=1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = net(**inputs).logits[seen]
    monkeypatch.setitem(token_logits.CHUNK_BYTES, "cpu", 7 * 4 * net.config.get_text_config().vocab_size)
    chunks = list(token_logits.iter_token_logits(net, inputs, seen))
    assert [len(chunk) for chunk in chunks] == [7] * 8 + [6]
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(net.base_model)


@pytest.mark.parametrize("model_type", UNREGISTERED)
def test_they_are_those_of_transformers_without_a_registry_entry(tmp_path, model_type):
    """OPT's head is not computed from what its `base_model` returns."""
    net = loading.causal.load(str(unregistered(tmp_path, model_type))).net
    batch = causal.pad(make_samples(*LENGTHS), 0, pad_to_multiple_of=1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = net(**inputs).logits[seen]
    found = torch.cat(list(token_logits.iter_token_logits(net, inputs, seen)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    losses = causal.sample_losses(net, [batch])
    assert losses.tokens.tolist() == (batch["labels"][:, 1:] != causal.IGNORE_INDEX).sum(1).tolist()


def test_an_accelerated_net_and_one_with_lora_have_theirs():
    net = tiny("gemma2")
    batch = causal.pad(make_samples(*LENGTHS), 0, pad_to_multiple_of=1)
    expected = causal.sample_losses(net, [batch])
    accelerate.accelerate(net)
    assert causal.sample_losses(net, [batch]).nll == pytest.approx(expected.nll, rel=1e-4)
    accelerate.restore(net)
    options = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": ("all-linear",), "variant": "lora"}
    adapted = lora.get_peft_model(net, get_family("gemma2"), **options)
    assert causal.sample_losses(adapted, [batch]).nll == pytest.approx(expected.nll, rel=1e-4)


def test_the_losses_are_those_of_float64():
    net = tiny("llama")
    batch = causal.pad(make_samples(*LENGTHS), 0, pad_to_multiple_of=1)
    found = causal.sample_losses(net, [batch])
    with torch.no_grad():
        out = net.double()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(out.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)
    assert found.nll == pytest.approx(nll.numpy(), rel=1e-5)
    assert found.tokens.sum() == (batch["labels"] != -100).sum()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A net whose logits of one sample, float32, are 8 MiB."""
    return loading.load(str(tiny_causal(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY)))


def test_no_measurement_makes_the_logits_of_a_whole_row(model):
    samples = make_samples(TOKENS)
    samples[0].loss_mask[:] = True
    batch = causal.pad(samples, 0, pad_to_multiple_of=1)
    measurements = {
        "loss": lambda: dataset.evaluate(model.net, samples),
        "report": lambda: scoring.compare_text(model, model, samples),
        "merge": lambda: adapters.compare_logits(model, model, [batch]),
    }
    for name, measure in measurements.items():
        with LargestTensor() as largest:
            measure()
        weights = max(p.numel() * p.element_size() for p in model.net.parameters())
        assert largest.size <= max(weights, TOKENS * TOKENS * 4 * 4, 2 * token_logits.CHUNK_BYTES["cpu"]), name
        assert largest.size < TOKENS * VOCABULARY * 4 / 2, name
