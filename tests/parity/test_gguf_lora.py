"""A LoRA adapter as GGUF, beside the base model's GGUF, gives the logits of PEFT in llama.cpp."""

import pytest
import torch

from mowa.exporters.gguf.lora import write_lora
from tests.exporters.gguf.tiny_lora import add_lora, save
from tests.models.gguf.tiny_files import CASES, logits, net, token_ids, write_float32
from tests.parity import llama_cpp
from tests.parity.test_gguf_models import assert_alike, divergence

MLA = "deepseek"  # llama.cpp computes its attention without LoRA, except for the output
SETTINGS = {
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"q_proj": 3, "down_proj": 20}, "rank_pattern": {"v_proj": 2}},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


def assert_same_logits(case, tmp_path, **settings):
    """Compare PEFT over transformers with llama.cpp over two files; the adapter must have an effect."""
    model = add_lora(net(case), **settings)
    write_float32(tmp_path / "base.gguf", net(case))
    written = write_lora(save(model, tmp_path / "adapter"), net(case).config, tmp_path / "a.gguf", file_type="f32")
    expected = logits(model, token_ids())
    found = torch.from_numpy(llama_cpp.logits(tmp_path / "base.gguf", token_ids(), lora=written.path))
    assert_alike(expected, found)
    assert divergence(logits(net(case), token_ids()), expected).max() > 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(MLA)])
def test_llama_cpp_adds_all_linear_layers(case, tmp_path):
    assert_same_logits(case, tmp_path)


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v2-lite", "deepseek_v3"])
def test_llama_cpp_adds_what_is_not_refused_of_deepseek(case, tmp_path):
    assert_same_logits(case, tmp_path, target_modules=["o_proj"])


@pytest.mark.parametrize("name", SETTINGS)
def test_scales_and_the_head(name, tmp_path):
    assert_same_logits("llama", tmp_path, **SETTINGS[name])
