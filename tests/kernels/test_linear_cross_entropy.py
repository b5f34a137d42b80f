"""linear_cross_entropy compared with torch's linear and cross_entropy in float64, and with TRL's fused head."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from mowa.errors import DataError
from mowa.kernels.linear_cross_entropy import linear_cross_entropy, score_tokens


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialized memory holds NaN."""

    def poison(maker):
        def make(*args, **settings):
            out = maker(*args, **settings)
            return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(1)

        return make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def plain(hidden, weight, targets, *, bias=None, scale=1.0, softcap=None, **settings):
    logits = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, **settings)


def inputs(count, width, vocabulary, *, dtype=torch.float64, seed=0, ignored=0.4, bias=True):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, shift = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((count, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (count,), generator=generator)
    targets[torch.rand(count, generator=generator) < ignored] = -100
    targets[-1] = vocabulary - 1
    return hidden, weight, shift if bias else None, targets


def close(found, truth, tolerance=1e-10):
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance), (ours - theirs).abs().max()


OPTIONS = [
    dict(zip(("scale", "softcap", "label_smoothing", "reduction", "bias"), values, strict=True))
    for values in product((1.0, 0.3), (None, 2.5), (0.0, 0.2), ("mean", "sum", "none"), (False, True))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_and_gradients_equal_torchs(options):
    options = dict(options)
    hidden, weight, bias, targets = inputs(63, 5, 17, bias=options.pop("bias"))
    wanted = [part for part in (hidden, weight, bias) if part is not None]
    truth = plain(hidden, weight, targets, bias=bias, ignore_index=-100, label_smoothing=options["label_smoothing"],
                  **{name: options[name] for name in ("scale", "softcap", "reduction")})  # fmt: skip
    upward = torch.randn(truth.shape, dtype=torch.float64)
    expected = torch.autograd.grad(truth, wanted, upward)
    for budget in (1, 4 * 17 * 8, None):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_bytes=budget, **options)
        close([loss], [truth])
        close(torch.autograd.grad(loss, wanted, upward), expected)


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (1, 63), (63, 1), (4097, 63), (63, 4097), (2, 4097)])
@pytest.mark.parametrize("ignored", [0.0, 0.9])
def test_odd_sizes(count, vocabulary, ignored):
    hidden, weight, bias, targets = inputs(count, 3, vocabulary, ignored=ignored)
    wanted = (hidden, weight, bias)
    truth = plain(*wanted[:2], targets, bias=bias)
    loss = linear_cross_entropy(*wanted[:2], targets, bias=bias, chunk_bytes=100 * 8 * vocabulary)
    close([loss], [truth])
    close(torch.autograd.grad(loss, wanted), torch.autograd.grad(truth, wanted))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_by_finite_differences(softcap, smoothing, reduction):
    hidden, weight, bias, targets = inputs(5, 3, 4, ignored=0.3)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(
            hidden, weight, targets, bias=bias, scale=0.7, softcap=softcap, label_smoothing=smoothing,
            reduction=reduction, chunk_bytes=2 * 4 * 8,
        ),
        (hidden, weight, bias),
    )  # fmt: skip


def test_shapes_and_another_ignore_index():
    hidden, weight, bias, targets = inputs(24, 5, 7)
    targets[targets == -100] = 3
    shaped = linear_cross_entropy(
        hidden.view(2, 3, 4, 5), weight, targets.view(2, 3, 4), bias=bias, ignore_index=3, reduction="none"
    )
    close([shaped.flatten()], [plain(hidden, weight, targets, bias=bias, ignore_index=3, reduction="none")])
    scores = score_tokens(hidden.view(4, 6, 5), weight, targets.view(4, 6), ignore_index=3)
    assert scores.log_probs.shape == scores.entropy.shape == scores.is_top1.shape == (4, 6)


@pytest.mark.parametrize("count", [0, 4])
def test_all_targets_ignored_gives_zero_loss_and_gradients(count):
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((count, 3), (5, 3), (5,)))
    targets = torch.full((count,), -100)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction)
        assert loss.sum() == 0
        for gradient in torch.autograd.grad(loss.sum(), (hidden, weight, bias)):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    scores = score_tokens(hidden, weight, targets, bias=bias)
    assert not scores.log_probs.any()
    assert not scores.entropy.any()
    assert not scores.is_top1.any()


@pytest.mark.parametrize("budget", [1, 3 * 11 * 8, None])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scores(budget, softcap):
    hidden, weight, bias, targets = inputs(40, 3, 11)
    scores = score_tokens(hidden, weight, targets, bias=bias, scale=1.7, softcap=softcap, chunk_bytes=budget)
    logits = 1.7 * F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept, there = targets != -100, torch.distributions.Categorical(logits=logits.detach())
    close([scores.log_probs], [torch.where(kept, there.log_prob(targets.clamp_min(0)), 0.0)])
    close([scores.entropy], [torch.where(kept, there.entropy(), 0.0)])
    assert torch.equal(scores.is_top1, kept & (logits.argmax(-1) == targets))
    assert 0 < scores.is_top1.sum() < kept.sum()
    assert not scores.entropy.requires_grad
    assert score_tokens(hidden, weight, targets, entropy=False).entropy is None


def test_unequal_upstream_gradients():
    hidden, weight, bias, targets = inputs(63, 5, 17)
    upward = torch.randn(63, dtype=torch.float64) * torch.logspace(-3, 3, 63, dtype=torch.float64)
    upward[5:20] = 0
    found = score_tokens(hidden, weight, targets, bias=bias, chunk_bytes=500).log_probs
    truth = -plain(hidden, weight, targets, bias=bias, reduction="none")
    wanted = (hidden, weight, bias)
    close(torch.autograd.grad(found, wanted, upward), torch.autograd.grad(truth, wanted, upward))
    loss = score_tokens(hidden, weight, targets, bias=bias).log_probs
    for zero in torch.autograd.grad(loss, wanted, torch.zeros_like(upward)):
        assert not zero.any()


def test_frozen_inputs_get_no_gradient():
    for trainable in product((True, False), repeat=3):
        hidden, weight, bias, targets = inputs(63, 5, 17)
        parts = [
            part.detach().requires_grad_(flag) for part, flag in zip((hidden, weight, bias), trainable, strict=True)
        ]
        wanted = [part for part in parts if part.requires_grad]
        loss = linear_cross_entropy(*parts[:2], targets, bias=parts[2], chunk_bytes=900)
        assert loss.requires_grad == bool(wanted)
        if wanted:
            truth = plain(*parts[:2], targets, bias=parts[2])
            close(torch.autograd.grad(loss, wanted), torch.autograd.grad(truth, wanted))


def test_backward_twice_and_once_differentiable():
    hidden, weight, bias, targets = inputs(9, 5, 17)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    wanted = (hidden, weight, bias)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    first = [part.clone() for part in first]
    close(torch.autograd.grad(loss, wanted), first)
    (gradient,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets), hidden, torch.ones((), requires_grad=True), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tied_with_the_embedding():
    torch.manual_seed(0)
    table, tokens = torch.randn(13, 4, requires_grad=True), torch.randint(13, (20,))
    found = torch.autograd.grad(linear_cross_entropy(F.embedding(tokens, table).tanh(), table, tokens.roll(-1)), table)
    truth = torch.autograd.grad(plain(F.embedding(tokens, table).tanh(), table, tokens.roll(-1)), table)
    close(found, truth, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant):
    hidden, weight, _, targets = inputs(30, 5, 17)
    loss = checkpoint(
        lambda hidden, weight: linear_cross_entropy(hidden.sin(), weight, targets, chunk_bytes=900),
        hidden, weight, use_reentrant=reentrant,
    )  # fmt: skip
    loss.backward()
    close((hidden.grad, weight.grad), torch.autograd.grad(plain(hidden.sin(), weight, targets), (hidden, weight)))


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def assert_at_most_twice_the_error(ours, theirs, truth, unit):
    for name in ours:
        mine, torchs = error(ours[name], truth[name]), error(theirs[name], truth[name])
        assert mine <= 2 * torchs + unit, (name, mine, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("each", [False, True], ids=["mean", "own upstream"])
def test_low_precision_errors_are_at_most_twice_torchs(dtype, softcap, each):
    hidden, weight, bias, targets = inputs(257, 64, 1031, dtype=dtype)
    parts = {"hidden": hidden, "weight": weight, "bias": bias}
    upward = torch.rand(257) + 0.1 if each else torch.tensor(1.0)
    settings = {"scale": 0.3, "softcap": softcap, "reduction": "none" if each else "mean"}

    def run(function, kind, **more):
        own = {name: part.detach().to(kind).requires_grad_() for name, part in parts.items()}
        loss = function(own["hidden"], own["weight"], targets, bias=own["bias"], **settings, **more)
        gradients = torch.autograd.grad(loss, list(own.values()), upward.to(loss.dtype))
        assert all(gradient.dtype == kind for gradient in gradients)
        found = dict(zip(own, gradients, strict=True))
        return {"loss": loss.detach(), **found} if each else found  # the error of a single number is random

    truth, theirs = run(plain, torch.float64), run(plain, dtype)
    ours = run(linear_cross_entropy, dtype, chunk_bytes=70 * 1031 * 4)
    assert not each or ours["loss"].dtype == torch.float32
    assert_at_most_twice_the_error(ours, theirs, truth, torch.finfo(torch.float32).eps)


def test_float16_keeps_small_gradients_of_a_large_vocabulary():
    hidden, weight = torch.tensor([[0.0, 1.0]]).half().requires_grad_(), torch.zeros(60000, 2).half()
    weight[0, 1], weight[1:, 0] = 18.0, 1.0  # 0.999 for the target, 1.5e-8 for each of the others
    targets = torch.tensor([0])
    (truth,) = torch.autograd.grad(plain(hidden.double(), weight.double(), targets) * 1024.0, hidden)
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) * 1024.0, hidden)
    # the other element belongs to the target, where float32 is 6 % off, as in torch's log_softmax
    assert torch.allclose(found[0, 0], truth[0, 0], rtol=0.01)


@pytest.mark.parametrize("dtypes", list(product((torch.float32, torch.bfloat16), repeat=2)), ids=str)
def test_autocast_casts_as_for_a_linear(dtypes):
    hidden, weight, _, targets = inputs(65, 64, 129, dtype=torch.float32)
    pairs = zip((hidden, weight), dtypes, strict=True)
    hidden, weight = (part.detach().to(kind).requires_grad_() for part, kind in pairs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=1)
        theirs = plain(hidden, weight, targets)
    assert torch.allclose(loss, theirs, rtol=1e-6)
    assert loss.dtype == torch.float32
    found, expected = (torch.autograd.grad(one, (hidden, weight)) for one in (loss, theirs))
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    truth = torch.autograd.grad(plain(*exact, targets), exact)
    assert [part.dtype for part in found] == list(dtypes)
    assert_at_most_twice_the_error(*(dict(enumerate(part)) for part in (found, expected, truth)), 1e-7)


def test_autocast_leaves_float64_alone():
    hidden, weight, _, targets = inputs(9, 4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        close([linear_cross_entropy(hidden, weight, targets)], [plain_outside(hidden, weight, targets)])


def plain_outside(*args):
    with torch.autocast("cpu", enabled=False):
        return plain(*args)


class Largest(TorchDispatchMode):
    """Record the size of the largest tensor that any operation returned, and the operations."""

    def __init__(self):
        super().__init__()
        self.numel, self.calls = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_iter(out) if isinstance(part, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        self.calls.append(str(function))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_the_logits_of_all_tokens_never_exist(dtype, softcap, trainable):
    count, width, vocabulary, chunk = 512, 8, 4096, 16
    hidden, weight, _, targets = inputs(count, width, vocabulary, dtype=dtype)
    weight = weight.detach().requires_grad_(trainable)
    with Largest() as seen:
        scores = score_tokens(
            hidden, weight, targets, softcap=softcap, label_smoothing=0.1, chunk_bytes=chunk * vocabulary * 4
        )
        (scores.log_probs * torch.rand(count)).sum().backward()
    assert seen.numel <= chunk * vocabulary
    with Largest() as seen:
        plain(hidden, weight, targets).backward()
    assert seen.numel >= count * vocabulary


def test_a_frozen_head_costs_two_products_and_no_memory_of_its_size():
    hidden, weight, _, targets = inputs(64, 128, 300, dtype=torch.float32, ignored=0.5)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight.detach(), targets, chunk_bytes=8 * 300 * 4).backward()
    chunks = -(-int((targets != -100).sum()) // 8)
    assert seen.numel < weight.numel() + 1
    products = [name for name in seen.calls if "mm" in name]
    assert len(products) == 2 * chunks  # for tokens that are not ignored
    assert not [name for name in seen.calls if "zeros_like" in name]
    with torch.no_grad(), Largest() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk_bytes=8 * 300 * 4)
    assert len([name for name in seen.calls if "mm" in name]) == chunks


def test_training_only_the_head_computes_no_hidden_gradient():
    hidden, weight, _, targets = inputs(64, 16, 30, dtype=torch.float32)
    with Largest() as seen:
        linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert len([name for name in seen.calls if "mm" in name]) == 2


def test_a_bias_of_minus_infinity():
    hidden, weight, bias, targets = inputs(9, 4, 7, ignored=0)
    bias, targets = bias.detach(), targets % 6
    bias[6] = -torch.inf
    scores = score_tokens(hidden, weight, targets, bias=bias)
    close([scores.log_probs], [-plain(hidden, weight, targets, bias=bias, reduction="none")])
    close([scores.entropy], [torch.distributions.Categorical(logits=F.linear(hidden, weight, bias)[:, :6]).entropy()])
    (gradient,) = torch.autograd.grad(scores.log_probs.sum(), hidden)
    assert gradient.isfinite().all()


def test_equals_trls_fused_head():
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    net = LlamaForCausalLM(config)
    other = copy.deepcopy(net)
    add_fused_lm_head(other, outputs=("log_probs", "entropy", "is_top1"))
    tokens = torch.randint(97, (2, 33))
    labels = torch.where(torch.rand(2, 33) < 0.3, -100, tokens)
    labels[0, :8] = net(tokens).logits[0, :8].argmax(-1).roll(1)  # some top-1 hits
    theirs = other(tokens, labels=labels, fused_lm_head=True)
    hidden = net.model(tokens).last_hidden_state[:, :-1]
    ours = score_tokens(hidden, net.lm_head.weight, labels[:, 1:])
    close([ours.log_probs, ours.entropy], [theirs.log_probs, theirs.entropy], 1e-5)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert ours.is_top1.sum() >= 7
    theirs.loss.backward()
    linear_cross_entropy(hidden, net.lm_head.weight, labels[:, 1:]).backward()
    for mine, truth in zip(net.parameters(), other.parameters(), strict=True):
        close([mine.grad], [truth.grad], 1e-5)


def test_invalid_inputs_are_refused():
    hidden, weight, bias, targets = inputs(5, 4, 7, ignored=0)
    with pytest.raises(DataError, match="from 0 to 7, but the head has 7"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 7, 1, 1, 1]))
    with pytest.raises(DataError, match="-1"):
        score_tokens(hidden, weight, torch.tensor([0, -1, 1, 1, 1]))
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, targets[:4])
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden[:, :3], weight, targets)
    with pytest.raises(ValueError, match="autocast"):
        linear_cross_entropy(hidden, weight, targets, bias=bias.float())
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="max")
