"""examples/run_onnx.py, without mowa, gives the transcript of mowa."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

import mowa
from mowa.exporters import export
from tests.checkpoints import tiny
from tests.quantized import SHORT_FRONT_END


def test_the_text_is_that_of_mowa(run_example, float32_export, sample):
    text = mowa.transcribe(sample, str(float32_export)).text
    assert len(text) > 20
    assert run_example("run_onnx.py", float32_export, sample) == (0, text)


def test_the_text_is_that_of_mowa_without_a_mask(run_example, tmp_path, sample):
    folder = export(
        mowa.load(str(tiny(tmp_path / "net", "hubert", "group", **SHORT_FRONT_END))), "onnx", tmp_path / "onnx"
    ).folder
    text = mowa.transcribe(sample, str(folder)).text
    assert len(text) > 20
    assert run_example("run_onnx.py", folder, sample) == (0, text)


@pytest.mark.parametrize("kind", ["phonemes", "pieces in upper case, no delimiter"])
def test_the_text_of_other_vocabularies_is_that_of_mowa(run_example, tmp_path, sample, kind):
    model = mowa.load(str(tiny(tmp_path / "net", "hubert", "group", **SHORT_FRONT_END)))
    tokens, special = model.vocabulary.tokens, model.vocabulary.specials
    if kind == "phonemes":
        changed = replace(model.vocabulary, separator=" ")
    else:
        pieces = ("▁Ą" if token == "ą" else token.upper() for token in tokens[5:])
        changed = replace(
            model.vocabulary, tokens=(*tokens[:5], *pieces), delimiter=None, specials=special | {4}, lower_case=True
        )
    model = replace(model, processor=replace(model.processor, vocabulary=changed))
    folder = export(model, "onnx", tmp_path / "onnx").folder
    text = mowa.transcribe(sample, str(folder)).text
    assert text == text.lower()
    assert " " in text
    assert "▁" not in text
    assert run_example("run_onnx.py", folder, sample) == (0, text)
    symbols = [line.split(" ")[0] for line in (folder / "tokens.txt").read_text(encoding="utf-8").splitlines()]
    assert symbols[5:7] == (["▁a", "▁ą"] if kind == "phonemes" else ["a", "▁ą"])


def test_another_sample_rate_is_rejected(run_example, float32_export, sample, tmp_path):
    samples, _ = soundfile.read(sample)
    soundfile.write(tmp_path / "half.wav", samples[::2], 8_000)
    status, output = run_example("run_onnx.py", float32_export, tmp_path / "half.wav")
    assert status == 1
    assert "has a sample rate of 8000 Hz, the model needs 16000: resample it" in output


def test_it_has_20_lines_as_documented():
    source = (Path(__file__).parents[2] / "examples" / "run_onnx.py").read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    assert len([line for line in source.splitlines()[docstring.end_lineno :] if line.strip()]) == 20


@pytest.mark.slow
def test_the_text_of_pl_tiny_in_int8_is_that_of_mowa(run_example, int8_export, sample):
    text = mowa.transcribe(sample, str(int8_export)).text
    assert text.startswith("dzień dobry to jest mowa")
    assert run_example("run_onnx.py", int8_export, sample) == (0, text)
