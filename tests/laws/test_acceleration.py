"""Every family: an accelerated net has the same outputs and gradients as the stock net, and is restored to the bit."""

import copy

import pytest
import torch

from mowa.families import get_family
from mowa.models.causal import accelerate
from mowa.tasks import causal
from tests.families.tiny import CAUSAL, tiny
from tests.tasks.test_causal import make_samples

LENGTHS = (17, 9, 23, 1, 12)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=CAUSAL)
def net(request):
    accelerated = tiny(request.param)
    yield accelerated
    accelerate.restore(accelerated)


def padded_batch():
    return causal.pad(make_samples(*LENGTHS), 0, pad_to_multiple_of=1)


def gradients(net, batch):
    net.zero_grad()
    loss = net(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_logits_and_gradients_are_those_of_the_stock_net(net):
    stock = copy.deepcopy(net)
    batch = padded_batch()
    seen = batch["attention_mask"].bool()
    accelerate.accelerate(net)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(net(**inputs).logits[seen], stock(**inputs).logits[seen], **CLOSE)
    net.train(), stock.train()
    (loss, ours), (expected, theirs) = gradients(net, batch), gradients(stock, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_documents_have_the_gradients_of_single_ones(net):
    chosen = make_samples(*LENGTHS)
    if "packing" in get_family(net.config.model_type).unsupported:
        pytest.skip("not packed")
    count = causal.count_trained_tokens(chosen)
    stock = copy.deepcopy(net).train()
    if hasattr(stock.config, "router_aux_loss_coef"):  # the load-balancing loss depends on the batch
        stock.config.output_router_logits = net.config.output_router_logits = False
    expected: dict[str, torch.Tensor] = {}
    for row in chosen:
        batch = causal.pad([row], 0, pad_to_multiple_of=1)
        if not row.loss_mask[1:].any():
            continue
        stock.zero_grad()
        stock(**batch, num_items_in_batch=count, use_cache=False).loss.backward()
        for name, p in stock.named_parameters():
            if p.grad is not None:
                expected[name] = expected.get(name, 0) + p.grad
    accelerate.accelerate(net)
    net.train()
    net(**causal.pack(chosen), num_items_in_batch=count, use_cache=False).loss.backward()
    for name, p in net.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                p.grad, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_documents_are_independent_to_the_bit(net):
    if "packing" in get_family(net.config.model_type).unsupported:
        pytest.skip("not packed")
    accelerate.accelerate(net)
    batch = causal.pack(make_samples(*LENGTHS))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    other = {name: value.clone() for name, value in inputs.items()}
    other["input_ids"][:, 17:26] = other["input_ids"][:, 17:26].flip(1).add(1) % 90  # the second document
    with torch.no_grad():
        before, after = (net(**one, use_cache=False).logits[0] for one in (inputs, other))
    # experts multiply the tokens of all documents at once, and rounding depends on their number
    bits = "experts" not in get_family(net.config.model_type).unsupported
    how = {"rtol": 0, "atol": 0} if bits else CLOSE
    torch.testing.assert_close(before[:17], after[:17], **how)
    torch.testing.assert_close(before[26:], after[26:], **how)
    assert not torch.equal(before[17:26], after[17:26])


def test_generation_in_a_padded_batch(net):
    accelerate.accelerate(net)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = [torch.from_numpy(row.input_ids) for row in make_samples(11, 4, 7)]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(prompt)).long() for prompt in prompts])
    together = net.generate(input_ids=ids, attention_mask=mask, **how)[:, longest:]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = net.generate(input_ids=prompt[None], attention_mask=torch.ones(1, len(prompt)).long(), **how)
        assert alone[0, len(prompt) :].tolist() == answer.tolist()


def test_saved_checkpoints_are_stock(net, tmp_path):
    stock = copy.deepcopy(net)
    accelerate.accelerate(net)
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    batch = causal.pad(make_samples(13), 0, pad_to_multiple_of=1)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, stock(**batch).logits)
    assert again.config._attn_implementation != "mowa"


def test_restored_and_other_nets_are_unchanged_to_the_bit(net):
    other = copy.deepcopy(net)
    batch = padded_batch()
    with torch.no_grad():
        before = net(**batch).logits
        accelerate.accelerate(net)
        during = other(**batch).logits
        accelerate.restore(net)
        after = net(**batch).logits
    assert torch.equal(before, after)
    assert torch.equal(before, during)
    assert not [name for name, module in net.named_modules() if "forward" in vars(module)]


def curve(net, steps=20):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    net.train()
    for step in range(steps):
        loss = net(**causal.pad(make_samples(*LENGTHS, seed=step % 4), 0, pad_to_multiple_of=1), use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_twenty_steps_have_the_same_losses(net):
    stock = copy.deepcopy(net)
    accelerate.accelerate(net)
    ours, theirs = curve(net), curve(stock)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < ours[0]
