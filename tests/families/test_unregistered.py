"""Causal language models of transformers without a registry entry are described by their modules, not refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mowa
from mowa.errors import ModelError
from mowa.families import family_of, get_family, is_registered, resolve_family
from mowa.loading import causal
from tests.data.chat.tokenizers import tokenizer as make_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LINEARS = {  # dots where both groups have a linear layer of one name
    "gpt2": {"attention": ("attn.c_proj", "c_attn"), "mlp": ("c_fc", "mlp.c_proj")},
    "opt": {"attention": ("k_proj", "out_proj", "q_proj", "v_proj"), "mlp": ("fc1", "fc2")},
    "falcon": {"attention": ("dense", "query_key_value"), "mlp": ("dense_4h_to_h", "dense_h_to_4h")},
    "mamba": {"mixer": ("dt_proj", "in_proj", "x_proj")},  # PEFT refuses out_proj, which kernels read
}
HEADS = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm", "falcon": "transformer.ln_f"}


def unregistered(folder: Path, model_type: str, **changes: Any) -> Path:
    """Save a tiny net of a type without a registry entry, with a tokenizer, and return the folder."""
    tokenizer = make_tokenizer("chatml")
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | ids | {"pad_token_id": None} | changes)
    net = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", LINEARS)
def test_blocks_and_linear_layers_are_read_from_the_net(tmp_path: Path, model_type: str) -> None:
    family = causal.read_causal_family(unregistered(tmp_path, model_type))
    assert family.linears == LINEARS[model_type]
    assert (family.name, family.task, family.head) == (model_type, "causal", "lm_head")
    net = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert family == family_of(net)
    assert not is_registered(family)
    assert sum(type(module).__name__ in family.blocks for module in net.modules()) == 2
    assert family.tensor_names["norm"].startswith(HEADS.get(model_type, "backbone.norm_f"))
    for name in family.tensor_names.values():
        assert name.format(i=1) in dict(net.named_parameters()) or name.endswith("{i}.") or name == "lm_head.weight"


def test_a_registered_net_has_its_entry() -> None:
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=99, **SIZES))
    assert family_of(net) is get_family("llama")
    assert is_registered(family_of(net))


def test_routers_of_experts_are_no_targets(tmp_path: Path) -> None:
    few = {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]}
    few |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_key_value_heads": 2}
    few |= {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    family = causal.read_causal_family(unregistered(tmp_path, "qwen3_next", head_dim=8, **few))
    assert family.linears["mlp"] == ("down_proj", "gate_proj", "up_proj")  # not shared_expert_gate


def test_one_line_says_that_it_is_not_accelerated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    causal._warn_unregistered.cache_clear()
    with caplog.at_level(logging.WARNING, "mowa"):
        for folder in (unregistered(tmp_path / "a", "opt"), unregistered(tmp_path / "b", "opt")):
            model = mowa.load(str(folder))
    assert [record.getMessage() for record in caplog.records] == [
        "opt has no registry entry: it runs unaccelerated, with transformers' own modules"
    ]
    ids = torch.arange(3, 30)[None]
    assert torch.equal(model.net(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "b")(ids).logits)


def test_infinity_in_a_config_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    changes = {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16}
    folder = unregistered(tmp_path, "mamba2", **changes)
    assert "__float__" in (folder / "config.json").read_text()
    assert causal.read_causal_family(folder).linears == {"mixer": ("in_proj",)}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "chatglm", "architectures": ["ChatGLMModel"]},
            "transformers does not have it, and mowa",
        ),
        ({"model_type": "distilbert"}, "it is not a causal language model"),
        (
            {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
            "names RobertaForMaskedLM, and the",
        ),
        ({"model_type": "gpt2"}, "names nothing, and the causal language model is GPT2LMHeadModel"),
        ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}, "the causal language model is"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_with_a_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as raised:
        resolve_family("some/thing", config)
    assert "supported are" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_invalid_config_of_an_unregistered_type_is_one_line() -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": "wide"}
    with pytest.raises(ModelError, match=r"config\.json is not a valid gpt2 config") as raised:
        resolve_family("some/thing", config)
    assert "\n" not in str(raised.value)
