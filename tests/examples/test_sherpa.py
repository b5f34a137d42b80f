"""examples/run_sherpa.py gives the transcript of mowa, also for quiet recordings and another blank id."""

from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

import mowa
from mowa.exporters import export
from mowa.types import CTCModel
from tests.checkpoints import tiny
from tests.quantized import SHORT_FRONT_END

pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed: pip install sherpa-onnx")
BLANK = 7  # sherpa-onnx uses 0 unless tokens.txt names another


@pytest.fixture(scope="module")
def no_mask_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no_mask_export")
    model = mowa.load(str(tiny(folder / "net", **SHORT_FRONT_END)))
    return export(move_blank(model), "onnx", folder / "onnx", attention_mask=False).folder


def move_blank(model: CTCModel) -> CTCModel:
    """Give the blank another id, and make special tokens so improbable that removing them changes nothing."""
    head, vocabulary = model.net.lm_head, model.vocabulary
    order = list(range(len(vocabulary)))
    order[0], order[BLANK] = BLANK, 0
    with torch.no_grad():
        head.bias[list(vocabulary.specials)] = -60
        for parameter in head.parameters():
            parameter.copy_(parameter[order].clone())
    tokens = tuple(vocabulary.tokens[index] for index in order)
    processor = replace(model.processor, vocabulary=replace(vocabulary, tokens=tokens, blank=BLANK))
    return replace(model, processor=processor)


@pytest.mark.parametrize("gain", [1, 0.01])
def test_the_text_is_that_of_mowa(run_example, no_mask_export, sample, tmp_path, gain):
    samples, rate_hz = soundfile.read(sample, dtype="float32")
    soundfile.write(tmp_path / "speech.wav", samples * gain, rate_hz, subtype="FLOAT")
    text = mowa.transcribe(tmp_path / "speech.wav", str(no_mask_export), vad_threshold=0).text
    assert len(text.split()) > 3
    assert run_example("run_sherpa.py", no_mask_export, tmp_path / "speech.wav") == (0, text)


def test_tokens_txt_names_the_outputs(no_mask_export):
    rows = (no_mask_export / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert rows[BLANK] == f"<blk> {BLANK}"
    assert rows[4] == "▁ 4"
    assert rows[6] == "ą 6"


def test_a_graph_with_a_mask_is_rejected(run_example, float32_export, sample):
    status, output = run_example("run_sherpa.py", float32_export, sample)
    assert status == 1
    assert "export with --no-attention-mask" in output


@pytest.mark.slow
def test_the_text_of_pl_tiny_is_that_of_mowa(run_example, sample, tmp_path):
    folder = export(mowa.load("pl-tiny"), "onnx", tmp_path / "onnx", attention_mask=False).folder
    text = mowa.transcribe(sample, str(folder)).text
    assert text.startswith("dzień dobry to jest mowa")
    assert run_example("run_sherpa.py", folder, sample) == (0, text)
