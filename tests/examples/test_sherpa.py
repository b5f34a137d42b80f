"""examples/run_sherpa.py: the text that mowa itself gives, however quiet the recording and whichever id is blank."""

from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

import mowa
from mowa.exporters import export
from mowa.types import Model
from tests.checkpoints import tiny
from tests.quantized import QUICK

pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed: pip install sherpa-onnx")
BLANK = 7  # sherpa-onnx takes 0 for it where tokens.txt does not say


@pytest.fixture(scope="module")
def unmasked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unmasked")
    model = mowa.load(str(tiny(folder / "net", **QUICK)))
    return export(blank_elsewhere(model), "onnx", folder / "onnx", masked=False).folder


def blank_elsewhere(model: Model) -> Model:
    """The blank in the place of a letter, and special tokens so unlikely that leaving them out changes nothing."""
    head, words = model.net.lm_head, model.vocabulary
    order = list(range(len(words)))
    order[0], order[BLANK] = BLANK, 0
    with torch.no_grad():
        head.bias[list(words.specials)] = -60
        for parameter in head.parameters():
            parameter.copy_(parameter[order].clone())
    tokens = tuple(words.tokens[index] for index in order)
    return replace(model, vocabulary=replace(words, tokens=tokens, blank=BLANK))


@pytest.mark.parametrize("volume", [1, 0.01])
def test_the_text_is_mowas(run_alone, unmasked, sample, tmp_path, volume):
    samples, rate_hz = soundfile.read(sample, dtype="float32")
    soundfile.write(tmp_path / "said.wav", samples * volume, rate_hz, subtype="FLOAT")
    text = mowa.transcribe(tmp_path / "said.wav", str(unmasked), speech=0).text
    assert len(text.split()) > 3
    assert run_alone("run_sherpa.py", unmasked, tmp_path / "said.wav") == (0, text)


def test_tokens_say_what_each_output_means(run_alone, unmasked, sample):
    run_alone("run_sherpa.py", unmasked, sample)
    rows = (unmasked / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert rows[BLANK] == f"<blk> {BLANK}"
    assert rows[4] == "▁ 4"
    assert rows[6] == "ą 6"


def test_a_graph_with_a_mask_is_refused(run_alone, masked, sample):
    status, told = run_alone("run_sherpa.py", masked, sample)
    assert status == 1
    assert "export it with --no-mask" in told


@pytest.mark.slow
def test_pl_tiny_says_what_it_says_in_mowa(run_alone, sample, tmp_path):
    folder = export(mowa.load("pl-tiny"), "onnx", tmp_path / "onnx", masked=False).folder
    text = mowa.transcribe(sample, str(folder)).text
    assert text.startswith("dzień dobry to jest mowa")
    assert run_alone("run_sherpa.py", folder, sample) == (0, text)
