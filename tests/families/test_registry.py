"""The registry: every family is found by its model types, nothing else is, and what the families say is true."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCTC

from mowa.errors import ModelError
from mowa.families import find, model_types, names, register
from mowa.nouns import Family
from tests.checkpoints import SMALLEST

TINY = SMALLEST | {"vocab_size": 8}


def test_the_speech_families_are_known() -> None:
    assert names() == ("hubert", "wav2vec2", "wavlm")
    assert [find(model_type).name for model_type in model_types()] == ["hubert", "wav2vec2", "wavlm"]


@pytest.mark.parametrize("model_type", ["whisper", "bert", "", "Wav2Vec2"])
def test_an_unknown_type_lists_the_known(model_type: str) -> None:
    with pytest.raises(ModelError, match=r"known are hubert, wav2vec2, wavlm$"):
        find(model_type)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ModelError, match=r"'wav2vec': did you mean 'wav2vec2'\?"):
        find("wav2vec")


def test_a_model_type_belongs_to_one_family() -> None:
    with pytest.raises(ValueError, match="already the family 'wav2vec2'"):
        register(Family(name="other", model_types=("fresh", "wav2vec2"), task="ctc", blocks=(), linears={}))
    with pytest.raises(ModelError):
        find("fresh")


@pytest.mark.parametrize("stable", [False, True], ids=["group-norm", "layer-norm"])
@pytest.mark.parametrize("model_type", model_types())
def test_what_a_family_names_is_in_the_net(model_type: str, stable: bool) -> None:
    family = find(model_type)
    front = "layer" if stable else "group"
    config = AutoConfig.for_model(model_type, **TINY, do_stable_layer_norm=stable, feat_extract_norm=front)
    net = AutoModelForCTC.from_config(config)
    blocks = [module for module in net.modules() if type(module).__name__ in family.blocks]
    assert len(blocks) == config.num_hidden_layers
    for block in blocks:
        linears = {name.rpartition(".")[2] for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert {name for group in family.linears.values() for name in group} <= linears
    assert isinstance(net.get_submodule(family.head), nn.Linear)
    for name in family.frozen:
        assert net.base_model.get_submodule(name) is not None


@pytest.mark.parametrize("model_type", model_types())
def test_every_linear_named_is_called(model_type: str) -> None:
    """Swapping a linear for an adapter or an int8 twin changes nothing if the net only borrows its weight."""
    import torch

    family = find(model_type)
    net = AutoModelForCTC.from_config(AutoConfig.for_model(model_type, **TINY)).eval()
    wanted = {name for group in family.linears.values() for name in group}
    called: set[str] = set()
    for name, module in net.base_model.named_modules():
        if (leaf := name.rpartition(".")[2]) in wanted:
            module.register_forward_hook(lambda *_, leaf=leaf: called.add(leaf))
    with torch.no_grad():
        net(torch.randn(1, 800))
    assert called == wanted


def test_the_families_need_no_torch() -> None:
    code = "import sys, mowa.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
