"""Drift, paired differences and verdicts on numbers that are known, and the page that shows them."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.errors import ModelError
from mowa.evaluation import plot, quant_report, quant_report_html
from mowa.evaluation.worker import Measurement, Throughput
from mowa.models.diff import ModelDiff, compare_emissions
from mowa.tasks import metrics
from mowa.types import Example

RNG = np.random.default_rng(0)
WORDS = "ala ma kota i psa a on nie ma nic".split()


def scores(frames=20, letters=5):
    raw = RNG.standard_normal((frames, letters)).astype(np.float32) * 3
    return raw - np.log(np.exp(raw).sum(-1, keepdims=True))


def texts(count=60):
    return [" ".join(RNG.choice(WORDS, 6)) for _ in range(count)]


def worse(said, share):
    rng = np.random.default_rng(1)
    return [" ".join("źle" if rng.random() < share else word for word in text.split()) for text in said]


def test_drift_is_what_its_formula_says():
    ours, theirs = [scores(), scores(7)], [scores(), scores(7)]
    found = compare_emissions(ours, theirs, blank_id=0)
    p, q = (np.concatenate(one) for one in (ours, theirs))
    assert found.num_frames == 27
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.blank_ratio_change == pytest.approx(((q.argmax(-1) == 0).sum() - (p.argmax(-1) == 0).sum()) / 27)
    same = compare_emissions(ours, ours, blank_id=0)
    assert (same.max_abs_diff, same.kl, same.agreement) == (0.0, 0.0, 1.0)
    with pytest.raises(ModelError, match="not of the same model"):
        compare_emissions(ours, [scores(), scores(8)], blank_id=0)


def test_numbers_that_are_none_drift_far():
    broken = scores()
    broken[3] = np.nan
    found = compare_emissions([scores()], [broken], blank_id=0)
    assert np.isfinite(found.kl)
    assert found.max_abs_diff > 5
    blank = np.log(np.eye(4, dtype=np.float32)[np.zeros(9, int)] + 1e-6)  # numpy finds the first of no numbers largest
    assert compare_emissions([blank], [np.full_like(blank, np.nan)], blank_id=0).agreement == 0


def test_error_rates_are_jiwers():
    import jiwer

    said = texts()
    heard = worse(said, 0.2)
    found = metrics.bootstrap_error_rates(said, heard)
    assert found.wer == pytest.approx(jiwer.wer(said, heard))
    assert found.cer == pytest.approx(jiwer.cer(said, heard))
    assert found.wer_interval[0] < found.wer < found.wer_interval[1]
    assert found.num_words == 360


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.3), st.floats(0.0, 0.3))
def test_the_paired_difference_is_that_of_the_rates(first, more):
    said = texts(30)
    ours = worse(said, first)
    theirs = worse(ours, more)
    found, a, b = (
        metrics.paired_bootstrap(said, ours, theirs),
        metrics.bootstrap_error_rates(said, ours),
        metrics.bootstrap_error_rates(said, theirs),
    )
    if a.wer:
        assert found.wer == pytest.approx(b.wer / a.wer - 1)
        assert found.wer_interval[0] <= found.wer + 1e-9
    assert metrics.paired_bootstrap(said, ours, ours).wer_interval == (0.0, 0.0)


FINE = ModelDiff(1.0, 0.1, 0.01, 0.99, 0.0, 1000)


@pytest.mark.parametrize(
    ("agreeing", "wer", "interval", "words", "verdict"),
    [
        (0.99, 0.01, (-0.02, 0.04), 1000, quant_report.PASS),
        (0.99, 0.05, (0.03, 0.07), 1000, quant_report.FAIL),
        (0.99, 0.05, (-0.01, 0.11), 1000, quant_report.INCONCLUSIVE),
        (0.99, 0.0, (0.0, 0.0), 50, quant_report.INCONCLUSIVE),
        (0.5, 0.0, (0.0, 0.0), 1000, quant_report.FAIL),
    ],
)
def test_verdicts(agreeing, wer, interval, words, verdict):
    far = ModelDiff(1.0, 0.1, 0.01, agreeing, 0.0, 1000)
    heard = metrics.ErrorRates(0.1, 0.05, (0.08, 0.12), (0.04, 0.06), words)
    assert quant_report.decide_verdict(far, heard, metrics.ErrorRateChange(wer, wer, interval, interval))[0] == verdict


def test_what_breaks_one_language_is_refused():
    heard, small = (metrics.ErrorRates(0.2, 0.1, (0.18, 0.22), (0.09, 0.11), words) for words in (5000, 150))
    little, much = (
        metrics.ErrorRateChange(0.01, 0.0, (0.0, 0.019), (0, 0)),
        metrics.ErrorRateChange(0.12, 0.0, (0.07, 0.18), (0, 0)),
    )
    verdict, why = quant_report.decide_verdict(FINE, heard, little, 0.02, {"cs": (heard, little), "pl": (heard, much)})
    assert verdict == quant_report.FAIL
    assert "word errors of pl +12.0%" in why
    assert (
        quant_report.decide_verdict(FINE, heard, little, 0.02, {"cs": (heard, little), "pl": (small, much)})[0]
        == quant_report.PASS
    )


def test_without_texts_it_stays_doubtful():
    assert quant_report.decide_verdict(FINE, None, None) == (
        quant_report.INCONCLUSIVE,
        "without texts only drift is known: 99.0% of frames agree",
    )


def made(said, heard, emissions):
    numbers = {"audio_s": 100.0, "hearing_s": 2.0, "latency_s": 0.1, "loading_s": 1.0, "memory": 10**9}
    return Measurement("onnx", "int8", tuple(heard), tuple(emissions), **numbers, throughput=(Throughput(2, 1, 0.02),))


@pytest.fixture
def whole(tmp_path):
    said = texts()
    examples = [Example(str(i), "x", text, 0.0, {"language": "pl" if i % 2 else "cs"}) for i, text in enumerate(said)]
    emissions = [scores() for _ in said]
    first, second = made(said, worse(said, 0.1), emissions), made(said, worse(said, 0.4), emissions)
    rows = [
        quant_report.build_row(
            name, "onnx", tmp_path, size, found, first, (1000, first), examples, blank_id=0, group_by="language"
        )
        for name, size, found in (("float32", 1000, first), ("int8 <&>", 250, second))
    ]
    rows.append(quant_report.ReportRow("nf4", "onnx", "", 0, 0.0, verdict=quant_report.FAIL, reason="no such thing"))
    return quant_report.QuantReport("a net", "dev", len(said), 100.0, 0.02, "a machine", {"torch": "2"}, tuple(rows))


def test_a_row_says_it_all_and_a_page_shows_it(whole, tmp_path):
    first, second, _ = whole.rows
    assert (first.verdict, second.verdict) == (quant_report.PASS, quant_report.FAIL)
    assert (second.share, second.speedup, first.speeds[0].rtf) == (0.25, 1.0, 0.02)
    assert set(second.tagged) == {"pl", "cs"}
    quant_report.write_json(whole, tmp_path / "card.json")
    kept = json.loads((tmp_path / "card.json").read_text())
    assert kept["rows"][1]["drift"]["agreeing"] == 1.0
    quant_report_html.write_html(whole, tmp_path / "card.html")
    shown = (tmp_path / "card.html").read_text()
    assert "int8 &lt;&amp;&gt;" in shown
    assert 'class="v refuse">refuse' in shown
    assert "no such thing" in shown
    assert "http" not in shown.replace("http-equiv", "")


def test_what_was_measured_is_read_back(tmp_path):
    before = made(["a", "b"], ["a", "c"], [scores(), scores(3)])
    before.write(tmp_path)
    after = Measurement.read(tmp_path)
    assert asdict(after) | {"emissions": 0} == asdict(before) | {"emissions": 0}
    for a, b in zip(before.emissions, after.emissions, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_another_beats_is_not_in_front():
    points = [(100, -10), (50, -10), (25, -8), (30, -5), (200, -20), (25, -8)]
    assert plot.pareto_front(points) == [1, 2, 4, 5]
    assert plot.pareto_front([(50, -10, 30.0), (100, -10, 29.0), (100, -9, 30.0)]) == [0, 1]
