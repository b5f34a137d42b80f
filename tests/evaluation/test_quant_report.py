"""Differences of emissions, error rates and verdicts on known numbers; the report as JSON and HTML."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.errors import DataError
from mowa.evaluation import plot, quant_report, quant_report_html
from mowa.evaluation.quant_report import GroupChange
from mowa.evaluation.worker import Measurement, Throughput
from mowa.models.diff import ModelDiff
from mowa.tasks import metrics
from mowa.types import Example

RNG = np.random.default_rng(0)
WORDS = "ala ma kota i psa a on nie ma nic".split()


def scores(frames=20, letters=5):
    raw = RNG.standard_normal((frames, letters)).astype(np.float32) * 3
    return raw - np.log(np.exp(raw).sum(-1, keepdims=True))


def texts(count=60):
    return [" ".join(RNG.choice(WORDS, 6)) for _ in range(count)]


def worse(references, share):
    rng = np.random.default_rng(1)
    return [" ".join("źle" if rng.random() < share else word for word in text.split()) for text in references]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.3), st.floats(0.0, 0.3))
def test_the_paired_change_is_that_of_the_rates(first, more):
    references = texts(30)
    ours = worse(references, first)
    theirs = worse(ours, more)
    found, a, b = (
        metrics.paired_bootstrap(references, ours, theirs),
        metrics.bootstrap_error_rates(references, ours),
        metrics.bootstrap_error_rates(references, theirs),
    )
    if a.wer:
        assert found.wer == pytest.approx(b.wer / a.wer - 1)
        assert found.wer_interval[0] <= found.wer + 1e-9
    assert metrics.paired_bootstrap(references, ours, ours).wer_interval == (0.0, 0.0)


FINE = ModelDiff(1.0, 0.1, 0.1, 0.01, 0.1, 0.99, 1000)


@pytest.mark.parametrize(
    ("agreement", "wer", "interval", "words", "verdict"),
    [
        (0.99, 0.01, (-0.02, 0.04), 1000, quant_report.PASS),
        (0.99, 0.05, (0.03, 0.07), 1000, quant_report.FAIL),
        (0.99, 0.05, (-0.01, 0.11), 1000, quant_report.INCONCLUSIVE),
        (0.99, 0.0, (0.0, 0.0), 50, quant_report.INCONCLUSIVE),
        (0.5, 0.0, (0.0, 0.0), 1000, quant_report.FAIL),
    ],
)
def test_verdicts(agreement, wer, interval, words, verdict):
    diff = ModelDiff(1.0, 0.1, 0.1, 0.01, 0.1, agreement, 1000)
    rates = metrics.ErrorRates(0.1, 0.05, (0.08, 0.12), (0.04, 0.06), words)
    assert quant_report.decide_verdict(diff, rates, metrics.ErrorRateChange(wer, wer, interval, interval))[0] == verdict


def test_a_significant_loss_in_one_group_fails():
    rates, small = (metrics.ErrorRates(0.2, 0.1, (0.18, 0.22), (0.09, 0.11), words) for words in (5000, 150))
    little, much = (
        metrics.ErrorRateChange(0.01, 0.0, (0.0, 0.019), (0, 0)),
        metrics.ErrorRateChange(0.12, 0.0, (0.07, 0.18), (0, 0)),
    )
    verdict, reason = quant_report.decide_verdict(
        FINE, rates, little, 0.02, {"cs": GroupChange(rates, little), "pl": GroupChange(rates, much)}
    )
    assert verdict == quant_report.FAIL
    assert "word errors of pl +12.0%" in reason
    assert (
        quant_report.decide_verdict(
            FINE, rates, little, 0.02, {"cs": GroupChange(rates, little), "pl": GroupChange(small, much)}
        )[0]
        == quant_report.PASS
    )


def test_without_transcripts_it_is_inconclusive():
    assert quant_report.decide_verdict(FINE, None, None) == (
        quant_report.INCONCLUSIVE,
        "no transcripts; top-1 agreement 99.0%",
    )


def measurement(hypotheses, emissions):
    numbers = {"audio_s": 100.0, "inference_s": 2.0, "latency_s": 0.1, "load_s": 1.0, "peak_memory_bytes": 10**9}
    return Measurement(
        "onnx", "int8", tuple(hypotheses), tuple(emissions), **numbers, throughput=(Throughput(2, 1, 0.02),)
    )


@pytest.fixture
def report(tmp_path):
    references = texts()
    examples = [
        Example(str(i), "x", text, 0.0, {"language": "pl" if i % 2 else "cs"}) for i, text in enumerate(references)
    ]
    emissions = [scores() for _ in references]
    first, second = measurement(worse(references, 0.1), emissions), measurement(worse(references, 0.4), emissions)
    rows = [
        quant_report.build_row(
            name, "onnx", tmp_path, size, found, first, (1000, first), examples, blank_id=0, group_by="language"
        )
        for name, size, found in (("float32", 1000, first), ("int8 <&>", 250, second))
    ]
    rows.append(quant_report.ReportRow("nf4", "onnx", "", 0, 0.0, verdict=quant_report.FAIL, reason="no such thing"))
    return quant_report.QuantReport(
        "a net", "dev", len(references), 100.0, 0.02, "a machine", {"torch": "2"}, tuple(rows)
    )


def test_rows_json_and_html(report, tmp_path):
    first, second, _ = report.rows
    assert (first.verdict, second.verdict) == (quant_report.PASS, quant_report.FAIL)
    assert (second.size_ratio, second.speedup, first.throughput[0].rtf) == (0.25, 1.0, 0.02)
    assert set(second.by_group) == {"pl", "cs"}
    quant_report.write_json(report, tmp_path / quant_report.JSON_FILE)
    kept = json.loads((tmp_path / quant_report.JSON_FILE).read_text())
    assert kept["rows"][1]["diff"]["agreement"] == 1.0
    assert kept["version"] == 2
    assert kept["rows"][1]["by_group"]["pl"].keys() == {"error_rates", "error_rate_change"}
    quant_report_html.write_html(report, tmp_path / quant_report.HTML_FILE)
    shown = (tmp_path / quant_report.HTML_FILE).read_text()
    assert "int8 &lt;&amp;&gt;" in shown
    assert 'class="v fail">fail' in shown
    assert "no such thing" in shown
    assert "http" not in shown.replace("http-equiv", "")


def test_a_measurement_is_read_back(tmp_path):
    before = measurement(["a", "c"], [scores(), scores(3)])
    before.write(tmp_path)
    after = Measurement.read(tmp_path)
    assert asdict(after) | {"emissions": 0} == asdict(before) | {"emissions": 0}
    for a, b in zip(before.emissions, after.emissions, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_format_versions_are_refused(tmp_path):
    measurement(["a"], [scores()]).write(tmp_path)
    path = tmp_path / "measurements.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(DataError, match=r"was written by another mowa .format 1, this version reads 2."):
        Measurement.read(tmp_path)


def test_pareto_front():
    points = [(100, -10), (50, -10), (25, -8), (30, -5), (200, -20), (25, -8)]
    assert plot.pareto_front(points) == [1, 2, 4, 5]
    assert plot.pareto_front([(50, -10, 30.0), (100, -10, 29.0), (100, -9, 30.0)]) == [0, 1]
