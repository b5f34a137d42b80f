"""GGUF files of every architecture give the logits of transformers in llama.cpp, and in transformers' own reader."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mowa.io.gguf import TensorInfo, open_writer, read_gguf
from tests.families.tiny import tiny
from tests.models.gguf.tiny_files import CASES, MINIMAL_TOKENIZER, NO_TOKENIZER, logits, net, token_ids, write_float32
from tests.parity import llama_cpp

MAX_KL = 1e-6  # nats per token; the largest found is 5e-7
MIN_MARGIN = 0.05  # of logits, for tokens that must be the same
# Sizes that transformers' reader takes from its defaults, and not from the file.
DEFAULTS = {
    "llama": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {
        **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        **{"num_experts_per_tok": 4, "num_experts": 8},
    },
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {
        **{"head_dim": 128, "mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 768},
        **{"num_experts_per_tok": 8, "num_local_experts": 16},
    },
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096} | CASES["gemma3"][1],
    "phi3": {"sliding_window": None},
}


def divergence(expected, found):
    """Return KL divergences in nats, float32 [T]."""
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def assert_alike(expected, found):
    """Compare logits, float32 [T, V]: same next token wherever it is clear, and small divergence."""
    assert divergence(expected, found).max() < MAX_KL
    best, second = expected.topk(2).values.unbind(-1)
    clear = best - second > MIN_MARGIN
    assert clear.float().mean() > 0.3
    assert torch.equal(expected.argmax(-1)[clear], found.argmax(-1)[clear])


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, tmp_path):
    path = tmp_path / "model.gguf"
    write_float32(path, net(case))
    found = torch.from_numpy(llama_cpp.logits(path, token_ids()))
    assert_alike(logits(net(case), token_ids()), found)


def test_long_factors_beyond_the_original_context(tmp_path):
    path, ids = tmp_path / "model.gguf", token_ids(300)
    write_float32(path, net("phi3-longrope"))
    assert_alike(logits(net("phi3-longrope"), ids), torch.from_numpy(llama_cpp.logits(path, ids)))


@pytest.mark.parametrize(("case", "name"), [("llama", "blk.0.attn_q.weight"), ("gemma2", "blk.1.ffn_norm.weight")])
def test_a_wrong_layout_is_seen(case, name, tmp_path):
    path, wrong = tmp_path / "model.gguf", tmp_path / "wrong.gguf"
    mapped = write_float32(path, net(case))
    source = read_gguf(path)
    with open_writer(wrong, source.metadata, source.tensors, value_types=source.value_types) as writer:
        for other in source.tensors:
            writer.write(
                other, source.blocks(other)[::-1] if other == name and case == "llama" else source.blocks(other)
            )
    if case == "gemma2":  # without the 1 that is added
        infos = {other: TensorInfo(tensor.shape, "f32") for other, tensor in mapped.tensors.items()}
        with open_writer(wrong, mapped.metadata | NO_TOKENIZER, infos) as writer:
            for other, tensor in mapped.tensors.items():
                writer.write(other, (tensor.load() - float(other == name)).contiguous().numpy())
    found = torch.from_numpy(llama_cpp.logits(wrong, token_ids()))
    assert divergence(logits(net(case), token_ids()), found).max() > 1e-3


@pytest.mark.parametrize("family", DEFAULTS)
def test_transformers_reads_the_same(family, tmp_path):
    pytest.importorskip("gguf")
    model = tiny(family, **DEFAULTS[family])
    write_float32(tmp_path / "model.gguf", model, MINIMAL_TOKENIZER)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(logits(found.eval(), token_ids()), logits(model, token_ids()))
