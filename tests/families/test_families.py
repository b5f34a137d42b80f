"""Every family describes its net correctly: blocks, linears, head, tensors, and what the named classes compute."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCTC, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mowa.families import get_family, list_families, list_model_types
from mowa.families.registry import CAPABILITIES
from mowa.types import Family
from tests.checkpoints import SMALLEST
from tests.families.tiny import CAUSAL, EMBEDDING, TEXT, VISION, VOCABULARY, tiny

SPEECH = tuple(family.name for family in list_families() if family.task == "ctc")
TINY_SPEECH = SMALLEST | {"vocab_size": 8}
OPERATIONS = {"rms_norm", "rms_norm_plus_one", "swiglu", "geglu"}
OTHER_OPERATIONS = {"packing", "packing_unaccelerated", "attention", "fused_loss", "experts"}


@cache
def _net(name: str) -> PreTrainedModel:
    return tiny(name)


def _blocks(net: nn.Module, family: Family) -> list[nn.Module]:
    return [module for module in net.modules() if type(module).__name__ in family.blocks]


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {f".{name}": linear for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}


def test_every_family_has_a_tiny_net() -> None:
    tasks = {"causal": CAUSAL, "vision-language": VISION, "embedding": EMBEDDING, "ctc": SPEECH}
    for family in list_families():
        assert family.name in tasks[family.task]
    assert sorted(TEXT + SPEECH) == [family.name for family in list_families()]


@pytest.mark.parametrize("name", TEXT)
def test_a_tiny_net_is_small_seeded_and_runs(name: str) -> None:
    net, ids = tiny(name), torch.randint(3, 80, (2, 21), generator=torch.Generator().manual_seed(0))
    assert sum(weight.numel() for weight in net.parameters()) < 120_000
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
    assert not net.training
    with torch.no_grad():
        out, again = net(input_ids=ids)[0], tiny(name)(input_ids=ids)[0]
    assert out.shape == (2, 21, VOCABULARY if get_family(name).head else 32)
    assert torch.equal(out, again)
    assert not torch.equal(out, tiny(name, seed=1)(input_ids=ids)[0])
    assert out.std() > 0.1
    assert tiny(name, num_hidden_layers=4, layer_types=None).config.get_text_config().num_hidden_layers == 4


@pytest.mark.parametrize("name", TEXT)
def test_blocks_linears_and_head(name: str) -> None:
    family, net = get_family(name), _net(name)
    assert type(net).__name__ in family.architectures
    assert net.config.model_type in family.model_types
    blocks = _blocks(net, family)
    assert len(blocks) == net.config.get_text_config().num_hidden_layers
    existing = {suffix for block in blocks for suffix in _linears(block)}
    if name.startswith("deepseek"):  # V2-Lite has one linear where the others have two
        existing |= {suffix for block in _blocks(tiny(name, q_lora_rank=None), family) for suffix in _linears(block)}
    named = [linear for group in family.linears.values() for linear in group]
    for linear in named:
        assert any(suffix.endswith(f".{linear}") for suffix in existing), linear
    left = {suffix for suffix in existing if not any(suffix.endswith(f".{linear}") for linear in named)}
    if name == "qwen3_moe":  # a config may have blocks without experts, but no known checkpoint does
        left -= {".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj"}
    assert left <= {".mlp.shared_expert_gate", ".feed_forward.router"}
    if family.head:
        assert net.get_output_embeddings() is net.get_submodule(family.head)
    else:
        assert net.get_output_embeddings() is None
    for part in family.frozen:
        assert net.base_model.get_submodule(part) is not None


@pytest.mark.parametrize("name", TEXT)
def test_every_linear_named_is_called(name: str) -> None:
    """A module in place of a linear has no effect if the net uses only the linear's weight."""
    family, net = get_family(name), tiny(name)
    named = tuple(f".{linear}" for group in family.linears.values() for linear in group)
    waiting = {
        id(linear)
        for block in _blocks(net, family)
        for suffix, linear in _linears(block).items()
        if suffix.endswith(named)
    }
    assert waiting
    for module in net.modules():
        module.register_forward_hook(lambda module, *_: waiting.discard(id(module)))
    with torch.no_grad():
        net(input_ids=torch.randint(3, 80, (1, 9)))
    assert not waiting


@pytest.mark.parametrize("name", TEXT)
def test_tensor_names(name: str, tmp_path: Path) -> None:
    family, net = get_family(name), _net(name)
    net.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    stem = family.tensor_names["block"]
    blocks = {int(found[1]) for key in shapes if (found := re.match(re.escape(stem).replace(r"\{i\}", r"(\d+)"), key))}
    assert blocks == set(range(len(_blocks(net, family))))
    text = net.config.get_text_config()
    assert shapes[family.tensor_names["embeddings"]] == (VOCABULARY, text.hidden_size)
    assert shapes.get(family.tensor_names.get("norm", ""), (text.hidden_size,)) == (text.hidden_size,)
    assert not any(key.startswith(stem.format(i=0)) for part, key in family.tensor_names.items() if part != "block")
    assert bool(family.head) == ("head" in family.tensor_names)
    if family.head:
        tied = net.get_output_embeddings().weight is net.get_input_embeddings().weight
        assert tied or shapes[family.tensor_names["head"]] == (VOCABULARY, text.hidden_size)
        assert not tied or family.tensor_names["head"] not in shapes


def _fused_classes() -> Iterator[Any]:
    for family in list_families():
        for operation, classes in family.fused_modules.items():
            for kind in classes:
                yield pytest.param(family.name, operation, kind, id=f"{family.name}-{operation}-{kind}")


@pytest.mark.parametrize(("name", "operation", "kind"), list(_fused_classes()))
def test_the_named_classes_compute_the_operation(name: str, operation: str, kind: str) -> None:
    """In float64 compared with the formula; norms in bfloat16 bit for bit, rounded before or after the weight."""
    torch.manual_seed(0)
    net = tiny(name).double()
    module = next(module for module in net.modules() if type(module).__name__ == kind)
    gated = operation in ("swiglu", "geglu")
    width = module.down_proj.out_features if gated else module.weight.shape[-1]
    x = torch.randn(3, 7, width, dtype=torch.float64)
    # norms in transformers compute in float32 for any input
    tolerance = 1e-6 if operation.startswith("rms") else 1e-12
    torch.testing.assert_close(module(x), _formula(operation, module, x), atol=tolerance, rtol=tolerance)
    if not gated:
        low, x = module.bfloat16(), x.bfloat16()
        rounded = [_formula(operation, low, x, round_after=after) for after in (False, True)]
        assert any(torch.equal(low(x), one) for one in rounded)


def _formula(operation: str, module: Any, x: Tensor, *, round_after: bool = False) -> Tensor:
    if operation in ("swiglu", "geglu"):
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = module.gate_proj(x), module.up_proj(x)
        active = F.silu(gate) if operation == "swiglu" else F.gelu(gate, approximate="tanh")
        return module.down_proj(active * up)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    values = x.float()
    normalized = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if operation == "rms_norm_plus_one":
        return (normalized * (1 + module.weight.float())).to(x.dtype)
    return (normalized * module.weight).to(x.dtype) if round_after else normalized.to(x.dtype) * module.weight


@pytest.mark.parametrize("family", list_families(), ids=lambda family: family.name)
def test_unsupported_operations_have_a_reason(family: Family) -> None:
    assert set(family.fused_modules) <= OPERATIONS
    assert set(family.unsupported) <= OPERATIONS | OTHER_OPERATIONS | (CAPABILITIES if family.task == "ctc" else set())
    assert family.task == "ctc" or not family.supports
    assert not family.supports & set(family.unsupported)
    assert not set(family.fused_modules) & set(family.unsupported)
    if family.task == "ctc":
        return
    fused = {kind for classes in family.fused_modules.values() for kind in classes}
    for module in _net(family.name).modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            assert kind in fused, kind
        if kind.endswith("MLP") and kind not in ("GptOssMLP", "SiglipMLP"):  # a router with its experts; no gate
            assert kind in fused or {"swiglu", "geglu"} & set(family.unsupported), kind
        if kind.endswith("Experts"):
            assert "experts" in family.unsupported, kind


@pytest.mark.parametrize("name", [name for name in TEXT if name != "gemma3"])  # its reason is about images
def test_packing_works_unless_unsupported(name: str) -> None:
    """In plain transformers: two documents in one row with their own positions, compared with each alone."""
    net, ids = _net(name), torch.randint(3, 80, (1, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    if name == "mpnet":
        positions = positions + 1 + net.config.pad_token_id
    how = {"use_cache": False} if get_family(name).head else {}
    with torch.no_grad():
        packed = net(input_ids=ids, position_ids=positions, **how)[0][:, 10:]
        alone = net(input_ids=ids[:, 10:], position_ids=positions[:, 10:], **how)[0]
    assert torch.allclose(packed, alone, atol=1e-5) == (
        not {"packing", "packing_unaccelerated"} & get_family(name).unsupported.keys()
    )


class Called(Exception):
    pass


def _raise_called(*_: Any, **__: Any) -> None:
    raise Called


@pytest.mark.parametrize("name", TEXT + SPEECH)
def test_the_attention_interface_is_used_unless_unsupported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recorder", _raise_called)  # type: ignore[arg-type]
    if name in SPEECH:
        net, inputs = (
            AutoModelForCTC.from_config(AutoConfig.for_model(name, **TINY_SPEECH)),
            {"input_values": torch.randn(1, 800)},
        )
    else:
        net, inputs = tiny(name), {"input_ids": torch.tensor([[5, 6, 7]])}
    for config in {id(module.config): module.config for module in net.modules() if hasattr(module, "config")}.values():
        config._attn_implementation = "recorder"
    if "attention" in get_family(name).unsupported:
        net(**inputs)
    else:
        with pytest.raises(Called):
            net(**inputs)


@pytest.mark.parametrize("stable", [False, True], ids=["group-norm", "layer-norm"])
@pytest.mark.parametrize("model_type", SPEECH)
def test_speech_families_name_what_is_in_the_net(model_type: str, stable: bool) -> None:
    family = get_family(model_type)
    front = "layer" if stable else "group"
    config = AutoConfig.for_model(model_type, **TINY_SPEECH, do_stable_layer_norm=stable, feat_extract_norm=front)
    net = AutoModelForCTC.from_config(config)
    blocks = _blocks(net, family)
    assert len(blocks) == config.num_hidden_layers
    for block in blocks:
        linears = {name.rpartition(".")[2] for name in _linears(block)}
        assert {name for group in family.linears.values() for name in group} <= linears
    assert type(net).__name__ in family.architectures
    assert isinstance(net.get_submodule(family.head), nn.Linear)
    for name in family.frozen:
        assert net.base_model.get_submodule(name) is not None
    state = net.state_dict()
    assert family.tensor_names["head"] in state
    for index in range(len(blocks)):
        assert any(key.startswith(family.tensor_names["block"].format(i=index)) for key in state)


@pytest.mark.parametrize("model_type", SPEECH)
def test_every_linear_of_speech_families_is_called(model_type: str) -> None:
    family = get_family(model_type)
    net = AutoModelForCTC.from_config(AutoConfig.for_model(model_type, **TINY_SPEECH)).eval()
    wanted = {name for group in family.linears.values() for name in group}
    called: set[str] = set()
    for name, module in net.base_model.named_modules():
        if (leaf := name.rpartition(".")[2]) in wanted:
            module.register_forward_hook(lambda *_, leaf=leaf: called.add(leaf))
    with torch.no_grad():
        net(torch.randn(1, 800))
    assert called == wanted


def test_model_types_exist_in_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(list_model_types()) <= set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_deepseek_has_mlps_first_and_experts_later(name: str) -> None:
    kinds = [type(block.mlp).__name__ for block in _blocks(_net(name), get_family(name))]
    assert kinds[0].endswith("MLP")
    assert all(kind.lower().endswith("moe") for kind in kinds[1:])


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gemma3", "gpt_oss", "ministral", "modernbert"])
def test_windows_alternate_with_full_attention(name: str) -> None:
    text = _net(name).config.get_text_config()
    assert len(set(text.layer_types)) == 2
    assert text.sliding_window == 8
