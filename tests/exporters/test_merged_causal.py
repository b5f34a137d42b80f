"""A merge of a language model is judged by what rounding does to its base, even if the base is stored rounded."""

import json

import pytest
import torch

from mowa import loading
from mowa.adapters import causal as adapters
from mowa.adapters import lora
from mowa.errors import ModelError
from mowa.exporters import merged
from tests.tiny_causal import tiny_causal

SCALES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of B: four of ten were refused


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return tiny_causal(folder, request.param, dtype=torch.bfloat16, num_hidden_layers=4)


def adapter(base, folder, scale):
    model = loading.load(str(base))
    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ("all-linear",), "variant": "lora"}
    net = lora.get_peft_model(model.net, model.family, **options)
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)
    return adapters.save_adapter(net, folder, base=model.origin, tokenizer=model.tokenizer, metrics={})


@pytest.mark.parametrize("scale", SCALES)
def test_a_merge_of_a_base_in_bfloat16_may_round_as_rounding_the_base_does(base, tmp_path, scale):
    compared = {}
    merged.write_merged(
        adapter(base, tmp_path / "adapter", scale), tmp_path / "out", on_comparison=compared.__setitem__
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert any("rounding of the merge" in label for label in compared)


def test_a_wrong_merge_of_a_base_in_bfloat16_is_refused(base, tmp_path, monkeypatch):
    merge = lora.merge_and_unload

    def doubled(net, dtype=None):
        for module in net.modules():
            if hasattr(module, "lora_A"):
                module.scaling = {name: 2 * value for name, value in module.scaling.items()}
        merge(net, dtype)

    folder = adapter(base, tmp_path / "adapter", 0.03)
    monkeypatch.setattr(lora, "merge_and_unload", doubled)
    with pytest.raises(ModelError, match="the merged model differs from the trained one"):
        merged.write_merged(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_rounding_of_a_merge_is_that_of_its_weights(base, tmp_path):
    model = loading.load(str(base))
    adapted = adapters.load_adapter(model, adapter(base, tmp_path / "adapter", 0.03))
    rounded = adapters.round_as_merged(model, adapted, "bfloat16")
    exact, low = (
        dict(adapters.merge_adapter(adapted, dtype).net.named_parameters()) for dtype in ("float32", "bfloat16")
    )
    for name, weight in model.net.named_parameters():
        error = low[name].float() - exact[name]
        torch.testing.assert_close(rounded.net.get_parameter(name) - weight, error, rtol=0, atol=2e-7)
    assert adapters.round_as_merged(model, model, "bfloat16") is None
