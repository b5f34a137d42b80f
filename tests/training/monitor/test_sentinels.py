"""Sentinels on simulated numbers: each detects its failure, and none fires on a run with CTC's initial plateau."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from mowa.training.config.shared import MonitorConfig
from mowa.training.monitor import sentinels


def feed(sentinel, values, **more):
    """Return (step, finding) of all findings of a sentinel over the values of each step."""
    found = ((step, sentinel.update(step, *value, **more)) for step, value in enumerate(values))
    return [(step, finding) for step, finding in found if finding]


def simulated(step, noise):
    """Loss (nats per token) and blank ratio of a usual run: a steep fall, a plateau of 400 steps, then tokens."""
    plateau = 3.0 - 0.0006 * step
    loss = plateau + 10 * math.exp(-step / 20) if step < 450 else 0.3 + (plateau - 0.3) * math.exp(-(step - 450) / 80)
    blank = 0.3 if step < 10 else 1.0 if step < 460 else 0.75
    return loss * noise.lognormvariate(0, 0.15), blank


@pytest.mark.parametrize("seed", range(5))
def test_silent_on_simulated_runs_with_noise(seed):
    noise = random.Random(seed)
    rows = [simulated(step, noise) for step in range(1500)]
    config = MonitorConfig()
    assert not feed(
        sentinels.Divergence(config.divergence_factor, config.collapse_patience // 4), [(loss,) for loss, _ in rows]
    )
    assert not feed(sentinels.NoLearning(config.collapse_patience), [(loss,) for loss, _ in rows])
    collapse = feed(
        sentinels.BlankCollapse(config.blank_ratio, config.collapse_patience), [(blank, loss) for loss, blank in rows]
    )
    assert not [finding for _, finding in collapse if finding.fatal]


@pytest.mark.parametrize("seed", range(5))
def test_endless_blanks_are_a_warning_and_then_a_collapse(seed):
    noise = random.Random(seed)
    collapse = sentinels.BlankCollapse(0.99, 200)
    found = feed(collapse, [(1.0, 2.9 * noise.lognormvariate(0, 0.1)) for _ in range(1200)])
    (warned, warning), (ended, end) = found[:2]
    assert not warning.fatal
    assert end.fatal
    assert 300 <= warned < ended < 1000
    assert "100.0% of the frames are blank" in str(end)
    assert "monitors.collapse_patience" in str(end)


def test_a_late_collapse_is_detected():
    rows = [(0.75, 0.4)] * 500 + [(0.999, 3.1)] * 400
    found = feed(sentinels.BlankCollapse(0.99, 100), rows)
    assert [finding.monitor for _, finding in found[:2]] == ["blank plateau", "blank collapse"]
    assert 600 <= found[1][0] < 700 + 100


def test_nothing_fires_during_warmup():
    assert not feed(sentinels.BlankCollapse(0.99, 20), [(1.0, 2.9)] * 400, warming=True)
    assert not feed(sentinels.NoLearning(20), [(2.9,)] * 400, warming=True)


def test_the_same_few_tokens_for_all_inputs_are_constant_output():
    stuck = [0, 0, 4, 0, 0, 7, 7, 0] * 20
    speech = [0, 3, 0, 1, 4, 0, 9, 9, 2, 0, 7, 5, 8, 6] * 20
    tokens = list("_abcdefghi")
    found = feed(sentinels.ConstantOutput(100, tokens), [(stuck, 0, 3.1)] * 300)
    assert found[0][0] == 200
    assert found[0][1].fatal
    assert "'d', 'g'" in found[0][1].message
    assert not feed(sentinels.ConstantOutput(100), [(speech, 0, 3.1)] * 300)
    assert not feed(sentinels.ConstantOutput(100), [([0] * 100, 0, 3.1)] * 300)  # BlankCollapse detects this
    assert not feed(
        sentinels.ConstantOutput(100), [(stuck, 0, 0.05)] * 300
    )  # a good model of a language of two characters
    falling = [(stuck, 0, 3.1 * 0.999**step) for step in range(300)]
    assert not feed(sentinels.ConstantOutput(100), falling)


def test_divergence_needs_more_than_bad_batches():
    noise = random.Random(0)
    healthy = [0.5 * noise.lognormvariate(0, 0.3) for _ in range(400)]
    healthy[100:120] = [8.0] * 20  # bad batches
    assert not feed(sentinels.Divergence(4.0, 50), [(loss,) for loss in healthy])
    found = feed(sentinels.Divergence(4.0, 50), [(loss,) for loss in [*healthy, *[3.0 + n for n in range(100)]]])
    assert 450 <= found[0][0] <= 460
    assert found[0][1].fatal
    # A large multiple of a tiny loss is no divergence.
    assert not feed(sentinels.Divergence(4.0, 50), [(0.001,)] * 100 + [(0.2,)] * 100)


def test_a_flat_loss_is_reported_after_the_patience():
    noise = random.Random(1)
    flat = [(3.1 * noise.lognormvariate(0, 0.02),) for _ in range(300)]
    ((step, finding),) = feed(sentinels.NoLearning(100), flat)[:1]
    assert step == 100
    assert finding.fatal
    ((step, finding),) = feed(sentinels.NoLearning(100), [(loss / 30,) for (loss,) in flat])
    assert step == 100
    assert not finding.fatal, "the loss of a good checkpoint may stay flat"
    falling = [(3.1 * 0.998**step,) for step in range(300)]
    assert not feed(sentinels.NoLearning(100), falling)
    resumed = sentinels.NoLearning(100)
    assert not [step for step in range(5000, 5500) if resumed.update(step, 3.1)]


def test_non_finite_losses_name_their_recordings():
    names = ["a.wav", "b.wav", "c.wav"]
    assert sentinels.check_losses(7, [1.0, 2.0, 3.0], names) is None
    nan = sentinels.check_losses(7, [1.0, math.nan, math.inf], names)
    assert (nan.monitor, nan.fatal) == ("non-finite loss", True)
    assert "b.wav" in nan.message
    assert "c.wav" not in nan.message
    short = sentinels.check_losses(7, [1.0, 2.0, math.inf], names)
    assert (short.monitor, short.fatal) == ("too few frames", True)
    assert "c.wav" in short.message
    assert "fewer frames" in short.message


def test_torch_has_an_infinite_loss_for_a_text_longer_than_its_frames():
    scores = torch.randn(4, 1, 6).log_softmax(-1)
    loss = F.ctc_loss(scores, torch.tensor([[1, 1, 1]]), torch.tensor([4]), torch.tensor([3]), reduction="none")
    assert sentinels.check_losses(0, loss.tolist(), ["it"]).monitor == "too few frames"


def test_loss_scaling_may_skip_steps():
    gradients = sentinels.GradientMonitor(scaled=True)
    norms = [math.inf] * sentinels.MAX_SKIPPED_STEPS + [1.0] + [math.nan] * (sentinels.MAX_SKIPPED_STEPS + 1)
    found = [step for step, norm in enumerate(norms) if gradients.check_norm(step, norm)]
    assert found == [len(norms) - 1]
    assert gradients.check_parameters(0, {"weight": math.inf, "bias": 0.0}) is None
    assert not gradients.zero_counts


def test_overfitting_is_a_warning():
    rising = [(1.0, 0.30), (0.8, 0.25), (0.85, 0.26), (0.9, 0.27), (1.0, 0.27)]
    train_losses = [1.0, 0.7, 0.5, 0.3, 0.2]

    def found(rows, losses):
        overfitting = sentinels.Overfitting()
        evaluations = enumerate(zip(rows, losses, strict=True))
        findings = (overfitting.update(n, "dev", {"loss": a, "wer": b}, c) for n, ((a, b), c) in evaluations)
        return [finding for finding in findings if finding]

    (warning,) = found(rising, train_losses)
    assert (warning.step, warning.fatal) == (4, False)
    assert "from 0.8 to 1" in warning.message
    assert not found([(loss, 0.3 - n / 100) for n, (loss, _) in enumerate(rising)], train_losses)  # WER still falls
    assert not found(rising, [1.0] * 5)  # the training loss does not fall either
    assert not found(rising[::-1], train_losses)
