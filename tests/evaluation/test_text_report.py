"""The quantization report of a language model: perplexity against the checkpoint, and when a scheme passes."""

import json
import math

import numpy as np
import pytest

import mowa
from mowa.cli.main import main
from mowa.evaluation import scoring, text_report
from mowa.evaluation.quant_report import FAIL, INCONCLUSIVE, PASS
from mowa.evaluation.text_report import decide_verdict
from mowa.tasks.metrics import Loss, LossChange
from tests.tiny_causal import tiny_causal
from tests.training.causal import chats


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_causal(tmp_path_factory.mktemp("report") / "base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Long enough texts that their tokens suffice for a verdict."""
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    words = " ".join(chats.WORDS)
    file.write_text("".join(json.dumps({"text": f"{number} {words} {words[number:]}"}) + "\n" for number in range(24)))
    return str(file)


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in arguments])
    return end.value.code, *capsys.readouterr()


def test_a_report_is_built_and_resumed(base, data, tmp_path, capsys, monkeypatch):
    command = [
        "quantize",
        base,
        "--scheme",
        "int8",
        "--scheme",
        "nf4",
        "--data",
        data,
        "-o",
        tmp_path / "out",
        "--force",
    ]
    code, out, _ = run(capsys, *command, "--max-perplexity-increase", "5000%")
    assert code == 0
    lines = [line.split() for line in out.splitlines() if "limit" in line or "reference" in line]
    assert [line[0] for line in lines] == ["checkpoint", "int8-weight", "nf4"]
    kept = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert [row["verdict"] for row in kept["rows"]] == [PASS] * 3
    full, int8, nf4 = kept["rows"]
    assert full["loss_change"]["perplexity_ratio"] == full["diff"]["agreement"] == full["size_ratio"] == 1
    assert nf4["size_bytes"] < int8["size_bytes"] < full["size_bytes"]
    assert int8["diff"]["kl"] < nf4["diff"]["kl"]
    evaluated = mowa.evaluate(tmp_path / "out" / "safetensors-int8-weight", data)
    assert evaluated.metrics["perplexity"].value == pytest.approx(int8["loss"]["perplexity"], rel=1e-5)
    assert evaluated.units == kept["num_tokens"] == int8["loss"]["num_tokens"]

    monkeypatch.setattr(text_report, "export", lambda *_: pytest.fail("exported again"))
    assert run(capsys, *command, "--max-perplexity-increase", "5000%")[1] == out
    code, out, err = run(capsys, *command[:-3], "--max-samples", 2, "-o", tmp_path / "out")
    assert (code, "is from another model or other texts" in err) == (2, True)


def test_a_failed_scheme_is_deleted(base, data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize", base, "--scheme", "int8", "--data", data, "-o", out, "--max-perplexity-increase", "-90%"]
    code, printed, _ = run(capsys, *command)
    assert code == 2
    assert "fail: perplexity" in printed
    assert [path.name for path in out.iterdir()] == ["quant_report.json"]


def test_a_scheme_that_does_not_fit_is_a_row(tmp_path, data, capsys):
    odd = tiny_causal(tmp_path / "odd", intermediate_size=80)
    code, printed, _ = run(capsys, "quantize", odd, "--scheme", "int4", "--scheme", "int8", "--data", data)
    assert code == 2
    assert "fail: model.layers.0.mlp.down_proj.weight cannot be quantized to int4-weight" in printed
    assert len([line for line in printed.splitlines() if line.startswith("int8-weight")]) == 1


def test_the_baseline_is_the_reference(base, data, tmp_path):
    other = tiny_causal(tmp_path / "other", seed=1)
    config = text_report.TextReportConfig((), data, baseline=str(other))
    (row,) = text_report.build_text_report(mowa.load(base), config).rows
    assert row.diff.agreement < 0.5
    assert row.loss_change.loss != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "mixed"], "cannot be quantized to mixed: it needs calibration"),
        (["--scheme", "int8", "--to", "onnx"], "is a language model: formats other than safetensors"),
        (["--scheme", "int8", "--group-by", "language"], "grouping and throughput are options of speech models"),
        (["--scheme", "int5"], "unknown scheme 'int5'"),
    ],
)
def test_errors_are_one_line(base, data, arguments, message, capsys):
    code, _, err = run(capsys, "quantize", base, "--data", data, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def change(increase, low, high):
    return LossChange(math.log1p(increase), 1 + increase, (0, 0), (1 + low, 1 + high))


@pytest.mark.parametrize(
    ("increase", "low", "high", "tokens", "verdict"),
    [
        (0.01, 0.005, 0.015, 5000, PASS),
        (0.0199, 0.01, 0.03, 5000, PASS),
        (0.03, 0.01, 0.05, 5000, INCONCLUSIVE),
        (0.03, 0.025, 0.035, 5000, FAIL),
        (0.5, 0.4, 0.6, 999, INCONCLUSIVE),
        (math.nan, math.nan, math.nan, 5000, FAIL),
    ],
)
def test_verdicts(increase, low, high, tokens, verdict):
    assert decide_verdict(Loss(1, math.e, (1, 1), (1, 1), tokens), change(increase, low, high))[0] == verdict


def test_both_models_are_scored_on_the_same_samples(base, data):
    model = mowa.load(base)
    samples = scoring.read_text_samples(model, data)
    before, after, diff = scoring.compare_text(model, mowa.quantize(model, "int4"), samples)
    assert np.array_equal(before.tokens, after.tokens)
    assert diff.num_frames == before.tokens.sum()
    expected = mowa.evaluate(model, data).metrics["loss"].value
    assert before.nll.sum() / before.tokens.sum() == pytest.approx(expected)


def test_a_report_is_written_where_no_scheme_fits(tmp_path, data, capsys):
    base = tiny_causal(tmp_path / "base", hidden_size=72, intermediate_size=136)
    options = ("--scheme", "int4-weight", "--data", data, "--max-samples", "2", "-o", tmp_path / "new")
    code, _, err = run(capsys, "quantize", base, *options)
    assert code == 2, err
    assert json.loads((tmp_path / "new" / "quant_report.json").read_text())["rows"][1]["verdict"] == FAIL


def test_evaluation_renders_with_the_variables_of_the_template(tmp_path, capsys):
    base = tiny_causal(tmp_path / "base")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(
        template.replace("{{ message.content }}", "{{ style }}{{ message.content }}")
    )
    chats.conversations(tmp_path / "chats.jsonl", 3)
    options = ("evaluate", base, "--data", tmp_path / "chats.jsonl", "--train-on", "all")
    tokens = [
        mowa.evaluate(str(base), tmp_path / "chats.jsonl", train_on="all", chat_template_kwargs=given).units
        for given in (None, {"style": "brief "})
    ]
    assert tokens[0] < tokens[1]
    code, out, err = run(capsys, *options, "--chat-template-kwargs", "style=brief ")
    assert code == 0, err
    assert f"{tokens[1]:,} tokens" in out
    code, _, err = run(capsys, *options, "--chat-template-kwargs", "tone=brief")
    assert code == 2
    assert "the chat template does not read tone" in err
