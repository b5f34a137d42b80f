"""Sentinels, fed with made-up numbers: each finds its own disaster, and none finds one in a run with CTC's plateau."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from mowa.training.config.ctc import MonitorConfig
from mowa.training.monitor import sentinels


def feed(sentinel, values, **more):
    """→ (step, finding) of all that a sentinel finds in values by step."""
    found = ((step, sentinel.see(step, *value, **more)) for step, value in enumerate(values))
    return [(step, finding) for step, finding in found if finding]


def made_up(step, noise):
    """Loss (nats a letter) and share of blanks of a usual run: steep, a plateau of 400 steps, then letters."""
    plateau = 3.0 - 0.0006 * step
    loss = plateau + 10 * math.exp(-step / 20) if step < 450 else 0.3 + (plateau - 0.3) * math.exp(-(step - 450) / 80)
    blank = 0.3 if step < 10 else 1.0 if step < 460 else 0.75
    return loss * noise.lognormvariate(0, 0.15), blank


@pytest.mark.parametrize("seed", range(5))
def test_silent_on_made_up_runs_with_noise(seed):
    noise = random.Random(seed)
    rows = [made_up(step, noise) for step in range(1500)]
    knobs = MonitorConfig()
    assert not feed(
        sentinels.Divergence(knobs.divergence_factor, knobs.collapse_patience // 4), [(loss,) for loss, _ in rows]
    )
    assert not feed(sentinels.NoLearning(knobs.collapse_patience), [(loss,) for loss, _ in rows])
    collapse = feed(
        sentinels.BlankCollapse(knobs.blank_ratio, knobs.collapse_patience), [(blank, loss) for loss, blank in rows]
    )
    assert not [finding for _, finding in collapse if finding.fatal]


@pytest.mark.parametrize("seed", range(5))
def test_blanks_for_ever_are_a_collapse_but_first_a_warning(seed):
    noise = random.Random(seed)
    collapse = sentinels.BlankCollapse(0.99, 200)
    found = feed(collapse, [(1.0, 2.9 * noise.lognormvariate(0, 0.1)) for _ in range(1200)])
    (warned, warning), (ended, end) = found[:2]
    assert not warning.fatal
    assert end.fatal
    assert 300 <= warned < ended < 1000
    assert "100.0% of the frames are blank" in str(end)
    assert "watch.patience" in str(end)


def test_a_collapse_after_good_days_is_seen_too():
    rows = [(0.75, 0.4)] * 500 + [(0.999, 3.1)] * 400
    found = feed(sentinels.BlankCollapse(0.99, 100), rows)
    assert [finding.name for _, finding in found[:2]] == ["plateau", "blank collapse"]
    assert 600 <= found[1][0] < 700 + 100


def test_while_the_rate_rises_nothing_is_stuck():
    assert not feed(sentinels.BlankCollapse(0.99, 20), [(1.0, 2.9)] * 400, warming=True)
    assert not feed(sentinels.NoLearning(20), [(2.9,)] * 400, warming=True)


def test_the_same_few_tokens_for_everything_are_constant_output():
    stuck = [0, 0, 4, 0, 0, 7, 7, 0] * 20
    speech = [0, 3, 0, 1, 4, 0, 9, 9, 2, 0, 7, 5, 8, 6] * 20
    tokens = list("_abcdefghi")
    found = feed(sentinels.ConstantOutput(100, tokens), [(stuck, 0, 3.1)] * 300)
    assert found[0][0] == 200
    assert found[0][1].fatal
    assert "'d', 'g'" in found[0][1].message
    assert not feed(sentinels.ConstantOutput(100), [(speech, 0, 3.1)] * 300)
    assert not feed(
        sentinels.ConstantOutput(100), [([0] * 100, 0, 3.1)] * 300
    )  # a collapse, and its sentinel's business
    assert not feed(sentinels.ConstantOutput(100), [(stuck, 0, 0.05)] * 300)  # a language of two letters, well heard
    assert not feed(
        sentinels.ConstantOutput(100), [(stuck, 0, 3.1 * 0.999**step) for step in range(300)]
    )  # still falling


def test_divergence_needs_more_than_bad_batches():
    noise = random.Random(0)
    healthy = [0.5 * noise.lognormvariate(0, 0.3) for _ in range(400)]
    healthy[100:120] = [8.0] * 20  # twenty bad batches
    assert not feed(sentinels.Divergence(4.0, 50), [(loss,) for loss in healthy])
    found = feed(sentinels.Divergence(4.0, 50), [(loss,) for loss in [*healthy, *[3.0 + n for n in range(100)]]])
    assert 450 <= found[0][0] <= 460
    assert found[0][1].fatal
    # A net that knows its few recordings by heart stumbles over one: a multiple of nothing is no divergence.
    assert not feed(sentinels.Divergence(4.0, 50), [(0.001,)] * 100 + [(0.2,)] * 100)


def test_flat_from_the_first_step_on_is_no_learning():
    noise = random.Random(1)
    flat = [(3.1 * noise.lognormvariate(0, 0.02),) for _ in range(300)]
    ((step, finding),) = feed(sentinels.NoLearning(100), flat)[:1]
    assert step == 100
    assert finding.fatal
    ((step, finding),) = feed(sentinels.NoLearning(100), [(loss / 30,) for (loss,) in flat])
    assert step == 100
    assert not finding.fatal, "a good checkpoint may stay as it is"
    falling = [(3.1 * 0.998**step,) for step in range(300)]
    assert not feed(sentinels.NoLearning(100), falling)
    resumed = sentinels.NoLearning(100)
    assert not [step for step in range(5000, 5500) if resumed.update(step, 3.1)]


def test_losses_that_are_no_numbers_name_their_recordings():
    names = ["a.wav", "b.wav", "c.wav"]
    assert sentinels.check_losses(7, [1.0, 2.0, 3.0], names) is None
    nan = sentinels.check_losses(7, [1.0, math.nan, math.inf], names)
    assert (nan.name, nan.fatal) == ("broken loss", True)
    assert "b.wav" in nan.message
    assert "c.wav" not in nan.message
    short = sentinels.check_losses(7, [1.0, 2.0, math.inf], names)
    assert (short.name, short.fatal) == ("too few frames", True)
    assert "c.wav" in short.message
    assert "fewer frames" in short.message


def test_a_text_longer_than_its_sound_is_infinite_to_torch_too():
    scores = torch.randn(4, 1, 6).log_softmax(-1)
    loss = F.ctc_loss(scores, torch.tensor([[1, 1, 1]]), torch.tensor([4]), torch.tensor([3]), reduction="none")
    assert sentinels.check_losses(0, loss.tolist(), ["it"]).name == "too few frames"


def test_loss_scaling_may_skip_steps():
    gradients = sentinels.GradientMonitor(scaled=True)
    norms = [math.inf] * sentinels.MAX_SKIPPED_STEPS + [1.0] + [math.nan] * (sentinels.MAX_SKIPPED_STEPS + 1)
    found = [step for step, norm in enumerate(norms) if gradients.check_norm(step, norm)]
    assert found == [len(norms) - 1]
    assert gradients.check_parameters(0, {"weight": math.inf, "bias": 0.0}) is None
    assert not gradients.zero_counts


def test_overfitting_is_a_hint():
    rising = [(1.0, 0.30), (0.8, 0.25), (0.85, 0.26), (0.9, 0.27), (1.0, 0.27)]
    learnt = [1.0, 0.7, 0.5, 0.3, 0.2]

    def found(rows, losses):
        overfitting = sentinels.Overfitting()
        seen = (
            overfitting.update(n, "dev", {"loss": a, "wer": b}, c) for n, ((a, b), c) in enumerate(zip(rows, losses))
        )
        return [finding for finding in seen if finding]

    (hint,) = found(rising, learnt)
    assert (hint.step, hint.fatal) == (4, False)
    assert "from 0.8 to 1" in hint.message
    assert not found([(loss, 0.3 - n / 100) for n, (loss, _) in enumerate(rising)], learnt)  # fewer words are wrong
    assert not found(rising, [1.0] * 5)  # training does not get better either: something else
    assert not found(rising[::-1], learnt)
