"""Names and configs decide together which family a checkpoint is loaded as, in loading, `explain` and LoRA targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import mowa
from mowa.adapters import lora
from mowa.cli.main import cli
from mowa.errors import ModelError
from mowa.training.config.shared import LoraConfig
from tests.checkpoints import clip, tiny
from tests.families.tiny import tiny as tiny_text


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_checkpoint_without_model_type_is_loaded_by_its_name(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "wav2vec2-base-tiny")
    values = torch.from_numpy(clip(0, 8_000))[None]
    expected = mowa.load(str(folder)).net(values).logits
    change_config(folder, model_type=None, architectures=None)
    model = mowa.load(str(folder))
    assert model.family.name == "wav2vec2"
    assert torch.equal(model.net(values).logits, expected)
    other = folder.rename(tmp_path / "some-model")
    with pytest.raises(ModelError, match=r"the family of 'some-model' is unknown: its config\.json has no model_type"):
        mowa.load(str(other))


def test_a_checkpoint_without_model_type_is_loaded_by_its_architecture(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "some-model", "hubert")
    change_config(folder, model_type=None)
    assert mowa.load(str(folder)).family.name == "hubert"


def test_a_misnamed_speech_checkpoint_is_loaded_by_its_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny(tmp_path / "hubert-large-tiny")
    assert mowa.load(str(folder)).family.name == "wav2vec2"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{folder} is named like a hubert model, but its config is of wav2vec2: using the config"]


def test_explain_uses_name_and_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "phi-4-tiny"
    tiny_text("llama").save_pretrained(folder)
    done = CliRunner().invoke(cli, ["explain", str(folder), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "is named like a phi3 model, but its config is of llama" in caplog.text


def test_the_default_lora_targets_are_those_of_the_family(tmp_path: Path) -> None:
    """WavLM's attention cannot have LoRA, so its family has no such group."""
    for name in ("wav2vec2", "wavlm"):
        model = mowa.load(str(tiny(tmp_path / name, name)))
        lora.add(model.net, model.family, rank=2, alpha=2, target_modules=LoraConfig().target_modules)
        found = {name.rpartition(".")[2] for name, module in model.net.named_modules() if hasattr(module, "lora_A")}
        assert found == {name for group in model.family.linears.values() for name in group}
