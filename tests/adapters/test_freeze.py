"""Which parameters each training method trains, and the table of parameter counts."""

from collections.abc import Iterable

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from mowa import loading
from mowa.adapters import bottleneck, freeze, lora
from mowa.errors import RecipeError
from mowa.families import get_family
from tests.checkpoints import CLASSES, KINDS, SMALLEST, tiny


def net(family="wav2vec2", **changes):
    torch.manual_seed(0)
    config, ctc = CLASSES[family]
    stable = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_hidden_layers": 3}
    return ctc(config(**SMALLEST | stable | {"vocab_size": 7} | changes))


def trainable(net) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def named(net, *stems: str) -> set[str]:
    return {name for name, _ in net.named_parameters() if name.startswith(stems)}


BLOCK = "wav2vec2.encoder.layers."
TRAINED_PREFIXES = {
    "head": ("lm_head.",),
    "top-1": ("lm_head.", f"{BLOCK}2.", "wav2vec2.encoder.layer_norm."),
    "top-2": ("lm_head.", f"{BLOCK}1.", f"{BLOCK}2.", "wav2vec2.encoder.layer_norm."),
    "top-3": ("lm_head.", BLOCK, "wav2vec2.encoder.layer_norm."),
    "encoder": ("lm_head.", "wav2vec2.encoder.", "wav2vec2.feature_projection.", "wav2vec2.masked_spec_embed"),
    "full": ("",),
}


@pytest.mark.parametrize("method", TRAINED_PREFIXES)
def test_exactly_the_parameters_of_the_method_are_trainable(method):
    ours = net()
    freeze.set_trainable(ours, get_family("wav2vec2"), method)
    assert trainable(ours) == named(ours, *TRAINED_PREFIXES[method])
    freeze.set_trainable(ours, get_family("wav2vec2"), "full")
    assert trainable(ours) == named(ours, "")


@pytest.mark.parametrize(("family", "norm"), KINDS)
def test_encoder_and_head_freeze_what_transformers_freezes(family, norm):
    kind = {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    ours, theirs = net(family, **kind), net(family, **kind)
    freeze.set_trainable(ours, get_family(family), "encoder")
    theirs.freeze_feature_encoder()
    assert trainable(ours) == trainable(theirs)
    freeze.set_trainable(ours, get_family(family), "head")
    theirs.base_model.requires_grad_(False)  # `freeze_base_model`, which data2vec lacks
    assert trainable(ours) == trainable(theirs)


def test_a_frozen_front_end_computes_no_input_gradient():
    ours = net()
    samples = torch.randn(1, 4000)
    for method, expected in {"encoder": False, "full": True, "top-1": False}.items():
        freeze.set_trainable(ours, get_family("wav2vec2"), method)
        assert ours.train().wav2vec2.feature_extractor(samples.clone()).requires_grad == expected, method


def test_top_n_excludes_a_norm_before_the_blocks():
    ours = net(feat_extract_norm="group", do_stable_layer_norm=False)
    freeze.set_trainable(ours, get_family("wav2vec2"), "top-1")
    assert trainable(ours) == named(ours, "lm_head.", f"{BLOCK}2.")
    assert {row.part for row in freeze.count_parameters(ours, get_family("wav2vec2"))} >= {freeze.NORM_BEFORE_BLOCKS}


def test_added_layers_are_trained_with_the_head():
    ours = bottleneck.add(net(), get_family("wav2vec2"), 4)
    freeze.set_trainable(ours, get_family("wav2vec2"), "bottleneck")
    assert trainable(ours) == {name for name in named(ours, "") if ".adapter_layer." in name} | named(ours, "lm_head.")
    ours = lora.add(net(), get_family("wav2vec2"), rank=2, alpha=4, target_modules=("attention",))
    freeze.set_trainable(ours, get_family("wav2vec2"), "lora")
    assert trainable(ours) == {name for name in named(ours, "") if ".lora_" in name} | named(ours, "lm_head.")
    assert len(trainable(ours)) == 3 * 4 * 2 + 2


@pytest.mark.parametrize("method", ["top-4", "top-0", "top", "heads", "bottleneck", "lora"])
def test_unknown_and_impossible_methods_are_rejected(method):
    ours = net()
    before = trainable(ours)
    with pytest.raises(RecipeError, match=method):
        freeze.set_trainable(ours, get_family("wav2vec2"), method)
    assert trainable(ours) == before


def rows(table: Iterable[freeze.ParameterCount]) -> dict[str, tuple[int, int]]:
    return {row.part: (row.parameters, row.trainable) for row in table}


def test_the_table_is_exact():
    """Counted by hand from SMALLEST: hidden size 32, intermediate size 37, convolutions 16 channels, kernels 10 and 3.

    The positional convolution has a direction [32, 16, 16], a magnitude [1, 1, 16] and a bias.
    """
    ours = net()
    freeze.set_trainable(ours, get_family("wav2vec2"), "top-2")
    front = (10 * 16 + 2 * 16) + (3 * 16 * 16 + 2 * 16)
    block = 4 * (32 * 32 + 32) + 2 * 2 * 32 + (32 * 37 + 37) + (37 * 32 + 32)
    expected = {
        "feature extractor": (front, 0),
        "feature projection": (2 * 16 + 16 * 32 + 32, 0),
        "mask embedding": (32, 0),
        "positional convolution": (32 * 16 * 16 + 16 + 32, 0),
        "block 0": (block, 0),
        "block 1": (block, block),
        "block 2": (block, block),
        "norm after the blocks": (64, 64),
        "head": (32 * 7 + 7, 32 * 7 + 7),
    }
    table = freeze.count_parameters(ours, get_family("wav2vec2"))
    assert rows(table) == expected
    assert list(rows(table)) == list(expected)
    assert sum(row.parameters for row in table) == ours.num_parameters()
    assert sum(row.trainable for row in table) == ours.num_parameters(only_trainable=True)


def test_added_layers_have_their_own_rows():
    ours = bottleneck.add(net(), get_family("wav2vec2"), 4)
    lora.add(ours, get_family("wav2vec2"), rank=2, alpha=2, target_modules=("attention", "mlp"))
    freeze.set_trainable(ours, get_family("wav2vec2"), "lora")
    found = rows(freeze.count_parameters(ours, get_family("wav2vec2")))
    lora_parameters = 3 * 2 * (4 * (32 + 32) + (32 + 37) + (37 + 32))
    assert found["lora"] == (lora_parameters, lora_parameters)
    assert found["bottleneck"] == (3 * (2 * 32 + (32 * 4 + 4) + (4 * 32 + 32)), 0)
    assert found["block 0"] == (rows(freeze.count_parameters(net(), get_family("wav2vec2")))["block 0"][0], 0)


@pytest.mark.parametrize(("family", "norm"), KINDS)
def test_every_parameter_of_every_family_has_a_part(family, norm, tmp_path):
    model = loading.load(str(tiny(tmp_path, family, norm)))
    table = freeze.count_parameters(model.net, model.family)
    assert sum(row.parameters for row in table) == model.net.num_parameters()
    blocks = [row.part for row in table if row.part.startswith("block ")]
    assert blocks == ["block 0", "block 1"]
    assert not [row for row in table if "." in row.part or "layer" in row.part]


def test_a_convolutional_adapter_belongs_to_the_top():
    ours = Wav2Vec2ForCTC(Wav2Vec2Config(**SMALLEST, vocab_size=7, add_adapter=True, num_adapter_layers=1))
    freeze.set_trainable(ours, get_family("wav2vec2"), "top-1")
    assert trainable(ours) == named(ours, "lm_head.", f"{BLOCK}1.", "wav2vec2.adapter.")


def test_the_formatted_table_joins_blocks_and_adds_up():
    ours = net()
    freeze.set_trainable(ours, get_family("wav2vec2"), "top-1")
    table = freeze.count_parameters(ours, get_family("wav2vec2"))
    lines = freeze.format_table(table).splitlines()
    assert lines[0].split() == ["part", "parameters", "trainable"]
    joined = next(line for line in lines if line.startswith("blocks 0–1 "))
    assert joined.split()[-2:] == [f"{2 * rows(table)['block 0'][0]:,}", "0"]
    assert any(line.startswith("block 2 ") for line in lines)
    total, trained = ours.num_parameters(), ours.num_parameters(only_trainable=True)
    assert lines[-1].split() == ["total", f"{total:,}", f"{trained:,}", f"({trained / total:.2%})"]
    assert len({len(line.split(" (")[0]) for line in lines}) == 1  # numbers are aligned
