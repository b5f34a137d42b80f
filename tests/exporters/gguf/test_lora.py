"""A LoRA adapter alone as GGUF: its weights added to those of the base model's file are those of the merged model's."""

import pytest
import torch

from mowa.errors import ModelError
from mowa.exporters.gguf.lora import write_lora
from mowa.io.gguf import read_gguf
from mowa.loading.gguf import read_tensor
from mowa.models.gguf import net_state, to_gguf
from tests.exporters.gguf.tiny_lora import add_lora, change_settings, change_weights, save
from tests.models.gguf.tiny_files import net

# One case for each layout: rows of q and k reordered, biases, fused q, k and v, fused gate and up, experts beside it.
LAYOUTS = ("llama", "llama-biases", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "granite", "gpt_oss")


def gguf_weights(model):
    """Return name in GGUF → tensor of a net."""
    return {name: tensor.load().float() for name, tensor in to_gguf(model.config, net_state(model)).tensors.items()}


def assert_adds_up(path, base, merged, tolerance=2e-6):
    """Compare the base model's weights plus those in the file with the merged weights, all as in GGUF."""
    file = read_gguf(path)
    alpha, before, after = file.metadata["adapter.lora.alpha"], gguf_weights(base), gguf_weights(merged)
    names = {name.rpartition(".")[0] for name in file.tensors}
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    for name in names:
        a, b = read_tensor(file, f"{name}.lora_a"), read_tensor(file, f"{name}.lora_b")
        found = before[name] + alpha / len(a) * (b @ a)
        assert (found - after[name]).abs().max() < tolerance * after[name].abs().max(), name


@pytest.mark.parametrize("case", LAYOUTS)
def test_weights_are_those_of_the_merged_model(case, tmp_path):
    model = add_lora(net(case))
    written = write_lora(save(model, tmp_path / "a"), net(case).config, tmp_path / "a.gguf", file_type="f32")
    assert (written.alpha, written.rescaled) == (6, ())
    assert_adds_up(written.path, net(case), model.merge_and_unload())


def test_metadata_and_types(tmp_path):
    folder = save(add_lora(net("llama"), r=32, target_modules=["q_proj", "o_proj"]), tmp_path / "poems")
    change_settings(folder, base_model_name_or_path="someone/tiny-llama")
    written = write_lora(folder, net("llama").config, tmp_path / "poems.gguf", file_type="q8_0")
    file = read_gguf(written.path)
    assert {key: value for key, value in file.metadata.items() if "quantization" not in key} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "poems",
        "general.base_model.count": 1,
        "general.base_model.0.name": "tiny-llama",
        "general.base_model.0.repo_url": "https://huggingface.co/someone/tiny-llama",
        "general.file_type": 7,
        "adapter.type": "lora",
        "adapter.lora.alpha": 6,
    }
    assert file.value_types["adapter.lora.alpha"] == "float32"
    assert {info.type_name for info in file.tensors.values()} == {"q8_0"}
    assert file.tensors["blk.1.attn_q.weight.lora_a"].shape == (32, 32)
    assert sorted(written.weights) == [f"blk.{i}.attn_{part}.weight" for i in (0, 1) for part in ("output", "q")]


def test_rows_that_fill_no_block_are_float16(tmp_path):
    folder = save(add_lora(net("llama"), r=4, target_modules=["down_proj"]), tmp_path / "a")
    write_lora(folder, net("llama").config, tmp_path / "a.gguf", file_type="q8_0")
    assert {info.type_name for info in read_gguf(tmp_path / "a.gguf").tensors.values()} == {"f16"}


def test_a_base_that_is_named_by_a_folder_is_not_published(tmp_path):
    folder = save(add_lora(net("llama")), tmp_path / "a")
    change_settings(folder, base_model_name_or_path=str(tmp_path))
    write_lora(folder, net("llama").config, tmp_path / "a.gguf", name="mine")
    metadata = read_gguf(tmp_path / "a.gguf").metadata
    assert metadata["general.name"] == "mine"
    assert str(tmp_path) not in str(metadata)


@pytest.mark.parametrize(
    ("settings", "alpha", "rescaled"),
    [
        ({"use_rslora": True, "r": 4}, 12, 0),
        ({"alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 24}}, 6, 3),
        ({"rank_pattern": {"v_proj": 2}}, 6, 0),
        ({"rank_pattern": {"v_proj": 1}, "use_rslora": True}, 12, 2),
    ],
)
def test_one_alpha_for_layers_with_different_scales(settings, alpha, rescaled, tmp_path):
    model = add_lora(net("llama"), **settings)
    folder = save(model, tmp_path / "a")
    written = write_lora(folder, net("llama").config, tmp_path / "a.gguf", file_type="f32")
    assert (written.alpha, len(written.rescaled)) == (alpha, rescaled)
    assert_adds_up(written.path, net("llama"), model.merge_and_unload())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"trainable_token_indices": [1, 2]}, "rows of embeddings"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA of embeddings"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "LoRA layers have biases"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused(settings, reason, tmp_path):
    folder = save(add_lora(net("llama-biases"), **settings), tmp_path / "a")
    with pytest.raises(ModelError, match=f"{reason}(.|\n)*mowa export MODEL --adapter"):
        write_lora(folder, net("llama-biases").config, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_kind_of_lora_that_is_unknown_is_refused(tmp_path):
    folder = save(add_lora(net("llama")), tmp_path / "a")
    change_settings(folder, use_future_lora={"x": 1})
    with pytest.raises(ModelError, match="use_future_lora"):
        write_lora(folder, net("llama").config, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("case", "settings", "reason"),
    [
        ("llama-tied", {"target_modules": ["lm_head"]}, "head of this model is its embeddings"),
        ("deepseek_v2", {"target_modules": ["kv_b_proj"]}, "attn_k_b.weight of deepseek2 without LoRA"),
        ("deepseek_v2", {"target_modules": ["q_a_proj"]}, "attn_q_a.weight of deepseek2 without LoRA"),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, "LoRA of experts"),
    ],
)
def test_weights_without_lora_in_llama_cpp_are_refused(case, settings, reason, tmp_path):
    folder = save(add_lora(net(case), **settings), tmp_path / "a")
    with pytest.raises(ModelError, match=reason):
        write_lora(folder, net(case).config, tmp_path / "a.gguf")


def test_an_adapter_of_another_model(tmp_path):
    folder = save(add_lora(net("llama-wide-heads"), target_modules=["q_proj"]), tmp_path / "a")
    with pytest.raises(ModelError, match=r"q_proj.weight \[64, 32\], and the model's is \[32, 32\]"):
        write_lora(folder, net("llama").config, tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="no weight that phi3 has in GGUF"):
        write_lora(folder, net("phi3").config, tmp_path / "a.gguf")


def test_a_speech_model_has_no_place(tmp_path):
    from transformers import Wav2Vec2Config

    folder = save(add_lora(net("llama")), tmp_path / "a")
    with pytest.raises(ModelError, match="wav2vec2 cannot be written as GGUF"):
        write_lora(folder, Wav2Vec2Config(), tmp_path / "a.gguf")


def test_damaged_adapters(tmp_path):
    config, out = net("llama").config, tmp_path / "a.gguf"
    with pytest.raises(ModelError, match="has no adapter_config"):
        write_lora(tmp_path, config, out)
    folder = save(add_lora(net("llama")), tmp_path / "a")
    with pytest.raises(ModelError, match="unknown type 'q4_k'"):
        write_lora(folder, config, out, file_type="q4_k")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    change_weights(folder, lambda state: state | {name: state[name] * torch.nan})
    with pytest.raises(ModelError, match=r"lora_B of model.layers.1.self_attn.v_proj .* is not finite"):
        write_lora(folder, config, out)
    change_weights(folder, lambda state: {key: value for key, value in state.items() if key != name})
    with pytest.raises(ModelError, match=r"v_proj has A \[4, 32\], which are not the two matrices"):
        write_lora(folder, config, out)
    change_weights(folder, lambda state: {})
    with pytest.raises(ModelError, match="holds no LoRA"):
        write_lora(folder, config, out)
    (folder / "adapter_model.safetensors").write_bytes(b"12345678910")
    with pytest.raises(ModelError, match="is damaged"):
        write_lora(folder, config, out)
    change_settings(folder, peft_type="IA3")
    with pytest.raises(ModelError, match="IA3"):
        write_lora(folder, config, out)
    assert not out.exists()


def test_an_alpha_of_zero_is_not_a_scale_of_one(tmp_path):
    folder = save(add_lora(net("llama")), tmp_path / "a")
    change_settings(folder, lora_alpha=0)
    with pytest.raises(ModelError, match="its alpha is 0"):
        write_lora(folder, net("llama").config, tmp_path / "a.gguf")
