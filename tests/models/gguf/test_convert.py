"""Every architecture goes to GGUF and back without a change; what llama.cpp cannot compute is an error."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mowa.errors import ModelError
from mowa.io.gguf import TensorInfo, open_writer, read_gguf
from mowa.loading.gguf import load_net, read_tensor
from mowa.models.gguf import (
    ARCHITECTURES,
    LazyTensor,
    checkpoint_state,
    list_model_types,
    net_state,
    restore,
    to_gguf,
)
from tests.families.tiny import tiny
from tests.models.gguf.tiny_files import CASES, LLAMA3, YARN, logits, net, token_ids, write_float32

BY_NAME = {one.name: one for one in ARCHITECTURES}


@pytest.mark.parametrize("case", CASES)
def test_back_from_gguf_unchanged(case, tmp_path):
    model = net(case)
    write_float32(tmp_path / "model.gguf", model)
    loaded = load_net(read_gguf(tmp_path / "model.gguf"))
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    torch.testing.assert_close(logits(loaded, token_ids()), logits(model, token_ids()), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_every_architecture_has_a_case():
    assert {CASES[case][0] for case in CASES} == set(list_model_types())
    assert len(list_model_types()) == 18


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen3_moe", "granitemoe", "deepseek_v3", "gpt_oss", "phi3"])
def test_a_checkpoint_is_mapped_as_the_net(case, tmp_path):
    model = net(case)
    model.save_pretrained(tmp_path)
    from_net = to_gguf(model.config, net_state(model))
    from_disk = to_gguf(model.config, checkpoint_state(tmp_path, model.config.model_type))
    assert from_disk.metadata == from_net.metadata
    assert list(from_disk.tensors) == list(from_net.tensors)
    for name, tensor in from_net.tensors.items():
        assert from_disk.tensors[name].shape == tensor.shape
        assert torch.equal(from_disk.tensors[name].load(), tensor.load()), name


def test_mapping_loads_nothing():
    def load():
        raise AssertionError

    config = net("deepseek_v3").config
    state = {name: LazyTensor(tensor.shape, load) for name, tensor in net_state(net("deepseek_v3")).items()}
    assert len(to_gguf(config, state).tensors) > 20


def test_shapes_are_those_of_the_tensors():
    for case in CASES:
        for name, tensor in to_gguf(net(case).config, net_state(net(case))).tensors.items():
            assert tuple(tensor.load().shape) == tensor.shape, name
            assert re.fullmatch(r"[\w.]+\.(weight|bias)", name)


def test_tied_embeddings_are_written_once_unless_llama_cpp_needs_a_head():
    assert "output.weight" in to_gguf(net("llama").config, net_state(net("llama"))).tensors
    assert "output.weight" not in to_gguf(net("llama-tied").config, net_state(net("llama-tied"))).tensors
    tied = to_gguf(net("gpt_oss-tied").config, net_state(net("gpt_oss-tied"))).tensors
    assert torch.equal(tied["output.weight"].load(), tied["token_embd.weight"].load())


def test_metadata_have_the_types_that_llama_cpp_reads():
    for case in CASES:
        metadata = to_gguf(net(case).config, net_state(net(case))).metadata
        assert {type(value) for value in metadata.values()} <= {str, bool, np.uint32, np.float32}
    llama = to_gguf(net("llama").config, net_state(net("llama"))).metadata
    assert llama["general.architecture"] == "llama"
    assert llama["llama.attention.head_count_kv"] == 2
    assert llama["llama.rope.freq_base"] == np.float32(10_000)


def test_names_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    compared = 0
    for architecture in ARCHITECTURES:
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        names = gguf.get_tensor_name_map(kind, 1)
        for rule in architecture.tensors:
            source = rule.source.replace("{i}", "0")
            if len(rule.targets) > 1 or (found := names.get_name(source, (".weight", ".bias"))) is None:
                continue
            expected = rule.targets[0].replace("{i}", "0")
            assert found in (expected, expected.removesuffix(".weight")), (architecture.name, source)
            compared += 1
    assert compared > 150


UNSUPPORTED = {
    "this gemma model cannot be written as GGUF: its activation is relu": ("gemma", {"hidden_act": "relu"}),
    "its head is not its embeddings": ("gemma2", {"tie_word_embeddings": False}),
    "norm_topk_prob is false": ("qwen3_moe", {"mlp_only_layers": []}),
    "norm_topk_prob is true": ("qwen2_moe", {"norm_topk_prob": True}),
    "some of its layers have no experts": ("qwen3_moe", {"norm_topk_prob": True}),
    "final_logit_softcapping is not set": ("gemma2", {"final_logit_softcapping": None}),
    "query_pre_attn_scalar is 32, and llama.cpp uses 16": ("gemma3_text", {"query_pre_attn_scalar": 32}),
    "follow no period": ("gpt_oss", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    "no_rope_layers is not every layer but each 4th": ("smollm3", {}),
    "attention_bias is true": ("deepseek_v3", {"attention_bias": True}),
    "rope_interleave is false": ("deepseek_v3", {"rope_interleave": False}),
    "topk_method is group_limited_greedy": ("deepseek_v2", {"topk_method": "group_limited_greedy"}),
    "q_lora_rank is None with 2 layers": ("deepseek_v2", {"q_lora_rank": None}),
    "mscale and mscale_all_dim of its YaRN are not equal": ("deepseek_v3", {"rope_parameters": YARN}),
    "its heads do not fill the hidden size": ("phi3", {"head_dim": 16}),
    "qwen2 with positions of type 'llama3' cannot be written": ("qwen2", {"rope_parameters": LLAMA3}),
    "llama with positions of type 'dynamic' cannot": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "model.layers.0.self_attn.o_proj.bias has no place in GGUF": ("qwen3", {"attention_bias": True}),
    "olmo2 cannot be written as GGUF; supported are deepseek_v2, deepseek_v3, gemma": ("olmo2", {}),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_what_llama_cpp_cannot_compute_is_an_error(message):
    family, changes = UNSUPPORTED[message]
    model = tiny(family, **changes)
    with pytest.raises(ModelError, match=message):
        to_gguf(model.config, net_state(model))


def test_missing_and_misshapen_weights_are_errors():
    config, state = net("llama").config, net_state(net("llama"))
    broken = {name: tensor for name, tensor in state.items() if name != "model.layers.1.mlp.up_proj.weight"}
    incomplete = to_gguf(config, broken).tensors  # llama.cpp's llama has experts instead of an MLP, too
    assert "blk.1.ffn_up.weight" not in incomplete
    broken = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    with pytest.raises(ModelError, match=r"has no model\.norm\.weight, which llama.cpp needs"):
        to_gguf(config, broken)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ModelError, match=re.escape(f"{name} [31, 32] does not fit its config")):
        to_gguf(config, state | {name: LazyTensor((31, 32), state[name].load)})


@pytest.mark.parametrize(
    ("family", "changes", "note"),
    [
        ("mistral", {}, "its sliding window of 8 tokens is lost"),
        ("phi3", {}, "its sliding window of 8 tokens is lost"),
        ("phi3", dict(CASES["phi3-longrope"][1]), "long rope factors if its context is larger than 256"),
        ("gpt_oss", {}, "rounds the ends of YaRN's ramp"),
        ("qwen2", {"sliding_window": 8}, ""),  # use_sliding_window is false
    ],
)
def test_accepted_deviations_are_noted(family, changes, note):
    model = tiny(family, **changes)
    notes = to_gguf(model.config, net_state(model)).notes
    assert (len(notes) == 1 and note in notes[0]) if note else not notes


def write_changed(path, *, metadata=(), tensors=(), without=()):
    """Write the tiny llama with changed metadata and tensors, as zeros, without some keys and tensors."""
    mapped = to_gguf(net("llama").config, net_state(net("llama")))
    changed = {key: value for key, value in (dict(mapped.metadata) | dict(metadata)).items() if key not in without}
    shapes = {name: tensor.shape for name, tensor in mapped.tensors.items()} | dict(tensors)
    infos = {name: TensorInfo(shape, "f32") for name, shape in shapes.items() if name not in without}
    with open_writer(path, changed, infos) as writer:
        for name, info in infos.items():
            writer.write(name, np.zeros(info.shape, np.float32))
    return read_gguf(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"general.architecture": "mamba"}}, "'mamba' cannot be read; supported are llama, mistral3"),
        ({"without": ["general.architecture"]}, "'None' cannot be read"),
        ({"without": ["llama.block_count"]}, "no metadata llama.block_count"),
        ({"without": ["output_norm.weight"]}, "no tensor output_norm.weight, which llama needs"),
        ({"tensors": {"blk.0.attn_sub_norm.weight": (4,)}}, "blk.0.attn_sub_norm.weight of the GGUF file has no place"),
        ({"tensors": {"output_norm.weight": (31,)}}, r"\[31\], and its metadata requires \[32\]"),
        ({"without": ["blk.1.ffn_up.weight"]}, "does not hold model.layers.1.mlp.up_proj.weight"),
        ({"metadata": {"llama.attention.head_count": [4, 2]}}, "different numbers of heads"),
        ({"metadata": {"llama.attention.head_count": 5}}, "not valid|does not fit"),
        ({"metadata": {"split.count": np.uint16(3)}}, "is one of 3 parts"),
        ({"tensors": {"rope_freqs.weight": (4,)}}, "divisors that no rope type of transformers has"),
    ],
)
def test_other_files_are_rejected(changes, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load_net(write_changed(tmp_path / "model.gguf", **changes))


def test_types_that_cannot_be_dequantized_are_named(tmp_path):
    with open_writer(tmp_path / "model.gguf", {}, {"x": TensorInfo((1, 256), "iq2_s")}) as writer:
        writer.write("x", np.zeros(82, np.uint8))
    with pytest.raises(ModelError, match="stores x as iq2_s, which cannot be dequantized"):
        load_net(read_gguf(tmp_path / "model.gguf"))


def test_norms_of_gemma_are_exact_to_half_a_unit_of_one(tmp_path):
    model = tiny("gemma")
    write_float32(tmp_path / "model.gguf", model)
    found = load_net(read_gguf(tmp_path / "model.gguf")).state_dict()
    for name, weight in model.state_dict().items():
        error = (found[name] - weight).abs().max()
        assert error <= (2**-24 if "norm" in name else 0), name


def test_dtypes(tmp_path):
    write_float32(tmp_path / "model.gguf", net("deepseek_v3"))
    loaded = load_net(read_gguf(tmp_path / "model.gguf"), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}


@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8, 1, 4, 8192), (32, 1, 4, 8192), (8, 2, 6, 4096)])
def test_positions_of_llama_3_are_computed_and_recognized(factor, low, high, original):
    rope = LLAMA3 | {"factor": float(factor), "low_freq_factor": float(low), "high_freq_factor": float(high)}
    rope["original_max_position_embeddings"] = original
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 8, "vocab_size": 8, "max_position_embeddings": 131_072}
    config = AutoConfig.for_model("llama", **sizes, rope_parameters=dict(rope))
    model = AutoModelForCausalLM.from_config(config)
    mapped = to_gguf(config, net_state(model))
    divisors = mapped.tensors["rope_freqs.weight"].load()
    default = 500_000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert torch.allclose(default / divisors, model.model.rotary_emb.inv_freq, rtol=1e-5)
    shapes = {name: tensor.shape for name, tensor in mapped.tensors.items()}
    restored = restore(mapped.metadata, shapes, {"rope_freqs.weight": divisors}).config
    assert restored.rope_parameters.pop("rope_type") == rope.pop("rope_type")
    assert restored.rope_parameters == pytest.approx(rope, rel=1e-3)


def test_tensors_are_read_one_by_one(tmp_path):
    write_float32(tmp_path / "model.gguf", net("llama"))
    file = read_gguf(tmp_path / "model.gguf")
    assert torch.equal(read_tensor(file, "output_norm.weight"), net("llama").model.norm.weight)
