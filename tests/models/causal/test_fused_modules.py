"""Fused modules on one net: same numbers, no effect on other nets, and restored."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from mowa.errors import ModelError
from mowa.families import get_family
from mowa.kernels.offload import OffloadedCheckpoint
from mowa.models.causal.fused_modules import OPS, fuse_modules, set_activation_offload, unfuse_modules
from mowa.training.gradient_checkpointing import set_gradient_checkpointing
from tests.families.tiny import tiny

FUSED = ("llama", "qwen3", "gemma3_text", "mistral", "granite", "phi3")
TOKENS = torch.arange(2, 65).remainder(97)[None]


def family_of(net):
    return get_family(net.config.model_type)


def with_updates(net, **how):
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **how)
    peft.inject_adapter_in_model(settings, net)
    torch.manual_seed(5)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    return net


def outcome(net):
    """Return the logits, and the gradient of every trainable weight."""
    learning = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    logits = net(input_ids=TOKENS).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:])
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    return logits.detach(), dict(zip(learning, found, strict=True))


def near(one, other, rtol=1e-4):
    (logits, gradients), (expected, truths) = one, other
    assert torch.allclose(logits, expected, rtol=rtol, atol=1e-4 * float(expected.abs().max()))
    assert gradients.keys() == truths.keys()
    for name, truth in truths.items():
        if truth is None:
            assert gradients[name] is None
        else:
            largest = float(truth.abs().max())
            assert torch.allclose(gradients[name], truth, rtol=rtol, atol=1e-4 * largest + 1e-8), name


def forwards(net):
    return [name for name, module in net.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", FUSED)
def test_every_operation_gives_the_same_numbers(name):
    net = tiny(name)
    expected = outcome(net)
    done = fuse_modules(net, family_of(net), ops=OPS)
    assert done.counts
    assert not [why for (_, why) in done.skipped if "computes something else" in why]
    near(outcome(net), expected)
    assert unfuse_modules(net) == sum(done.counts.values())
    assert forwards(net) == []
    assert torch.equal(outcome(net)[0], expected[0])


def test_default_operations_on_cpu():
    net = with_updates(tiny("llama"))
    done = fuse_modules(net, family_of(net))
    assert done.counts == {"rms_norm": 5, "lora_linear": 6}
    assert done.skipped == {("swiglu", "not faster on cpu"): 2}


def test_another_net_and_every_class_stay_as_they_are():
    from transformers.models.llama import modeling_llama

    before = {name: getattr(modeling_llama, name) for name in dir(modeling_llama)}
    methods = {kind: vars(kind).copy() for kind in before.values() if isinstance(kind, type)}
    net, other = tiny("llama"), tiny("llama")
    fuse_modules(net, family_of(net), ops=OPS)
    assert forwards(other) == []
    assert all(getattr(modeling_llama, name) is value for name, value in before.items())
    assert all(vars(kind) == was for kind, was in methods.items())


def test_lora_in_every_state():
    net = with_updates(tiny("llama"))
    layers = [module for module in net.modules() if isinstance(module, peft.tuners.lora.Linear)]
    with_update = outcome(net)
    for layer in layers:
        layer.enable_adapters(False)
    without = net(input_ids=TOKENS).logits.detach()
    for layer in layers:
        layer.enable_adapters(True)
    assert fuse_modules(net, family_of(net)).counts["lora_linear"] == len(layers)
    near(outcome(net), with_update)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.allclose(net(input_ids=TOKENS).logits, without, atol=1e-3)
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    assert torch.allclose(net(input_ids=TOKENS).logits, with_update[0], rtol=1e-3, atol=1e-2)
    for layer in layers:
        layer.unmerge()
    assert torch.allclose(net(input_ids=TOKENS).logits, with_update[0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "reason_part"),
    [
        ({"use_dora": True}, "not plain LoRA"),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"lora_bias": True}, "not plain LoRA"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_other_updates_are_skipped_with_a_reason(options, reason_part):
    net = with_updates(tiny("llama"), **options)
    done = fuse_modules(net, family_of(net))
    assert "lora_linear" not in done.counts
    (reason,) = [reason for (op, reason) in done.skipped if op == "lora_linear"]
    assert reason_part in reason


def test_hooks_on_parts_of_a_lora_linear_are_called():
    net = with_updates(tiny("llama"))
    layer = next(module for module in net.modules() if isinstance(module, peft.tuners.lora.Linear))
    fuse_modules(net, family_of(net))
    called = []
    handle = layer.base_layer.register_forward_pre_hook(lambda *_: called.append(True))
    net(input_ids=TOKENS)
    handle.remove()
    net(input_ids=TOKENS)
    assert called == [True]


def test_copies_are_fused_and_use_their_own_weights():
    net = tiny("llama")
    fuse_modules(net, family_of(net), ops=OPS)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert forwards(other) == forwards(net)
        before = net(input_ids=TOKENS).logits
        assert torch.equal(other(input_ids=TOKENS).logits, before)
        with torch.no_grad():
            for weight in other.parameters():
                weight.zero_()
        assert not other(input_ids=TOKENS).logits.any()
        assert torch.equal(net(input_ids=TOKENS).logits, before)
        unfuse_modules(other)
        assert forwards(other) == []
        assert forwards(net)


def test_saved_checkpoints_are_stock(tmp_path):
    net = tiny("llama")
    names = list(net.state_dict())
    fuse_modules(net, family_of(net), ops=OPS)
    assert list(net.state_dict()) == names
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert forwards(again) == []
    unfuse_modules(net)
    assert torch.equal(again(input_ids=TOKENS).logits, net(input_ids=TOKENS).logits)


def test_a_class_that_computes_something_else_is_skipped():
    net = tiny("llama")
    wrong = replace(
        family_of(net),
        fused_modules={"rms_norm_plus_one": ("LlamaRMSNorm",), "geglu": ("LlamaMLP",), "swiglu": ("LlamaModel",)},
    )
    done = fuse_modules(net, wrong, ops=OPS)
    assert done.counts == {}
    assert {op for op, _ in done.skipped} == {"rms_norm_plus_one", "geglu", "swiglu"}
    assert all("computes something else" in why for _, why in done.skipped)
    assert forwards(net) == []


def test_a_foreign_forward_is_kept():
    net = tiny("llama")
    norm = net.model.norm
    norm.forward = lambda x: x
    theirs = norm.forward
    done = fuse_modules(net, family_of(net))
    assert done.skipped["rms_norm", "its forward is replaced already"] == 1
    unfuse_modules(net)
    assert norm.forward is theirs


def test_fusing_twice_changes_nothing():
    net = tiny("llama")
    first = fuse_modules(net, family_of(net))
    assert fuse_modules(net, family_of(net)).counts == {}
    assert first.restore() == 5
    assert first.restore() == 0


def test_the_trial_keeps_modes_and_random_state():
    net = tiny("llama").train()
    net.model.layers[0].mlp.eval()
    modes, state = [module.training for module in net.modules()], torch.get_rng_state()
    fuse_modules(net, family_of(net), ops=OPS)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ops", [None, OPS])
def test_mlp_tiles(ops):
    net = with_updates(tiny("llama"))
    expected, lengths = outcome(net), []
    assert fuse_modules(net, family_of(net), ops=ops, mlp_tiles=5).counts["tiled_mlp"] == 2
    net.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda part, inputs, out: lengths.append(inputs[0].shape[1])
    )
    near(outcome(net), expected)
    assert max(lengths) == 13
    unfuse_modules(net)
    assert forwards(net) == []


def test_an_unknown_operation_is_refused():
    net = tiny("llama")
    with pytest.raises(ModelError, match="unknown operation rope"):
        fuse_modules(net, family_of(net), ops=["rope"])


def test_unmeasured_devices_are_skipped(monkeypatch):
    from mowa.models.causal import fused_modules

    monkeypatch.setattr(fused_modules, "FASTER_OPS", {})
    net = tiny("llama")
    done = fuse_modules(net, family_of(net))
    assert not done.counts
    assert ("rms_norm", "not measured to be faster on cpu") in done.skipped


def test_meta_weights_are_skipped():
    net = tiny("llama").to("meta")
    assert set(fuse_modules(net, family_of(net)).skipped) == {
        ("rms_norm", "it has no weights in memory"),
        ("swiglu", "it has no weights in memory"),
    }


def test_activation_offload():
    net = with_updates(tiny("llama")).train()
    assert set_activation_offload(net) == 0
    set_gradient_checkpointing(net)
    expected = outcome(net)
    before = {
        name: vars(module)["_gradient_checkpointing_func"]
        for name, module in net.named_modules()
        if "_gradient_checkpointing_func" in vars(module)
    }
    assert set_activation_offload(net) == len(before) >= 2
    assert set_activation_offload(net) == 0
    given = {id(vars(net.get_submodule(name))["_gradient_checkpointing_func"]) for name in before}
    assert len(given) == 1
    assert isinstance(net.model.layers[0]._gradient_checkpointing_func, OffloadedCheckpoint)
    ours = outcome(net)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in ours[1].items())
    copy.deepcopy(net)
    assert set_activation_offload(net, enabled=False) == len(before)
    assert all(net.get_submodule(name)._gradient_checkpointing_func is was for name, was in before.items())
