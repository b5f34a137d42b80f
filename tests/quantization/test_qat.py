"""Quantization-aware training: it computes what the quantized model will, and quantizing afterwards changes nothing."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCTC

from mowa import loading
from mowa.errors import MissingDependency, RecipeError
from mowa.kernels.quant import weights
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.quantization import parse_scheme, qat, quantize
from mowa.training import checkpoints
from mowa.training.config import ctc, dispatch, schema
from mowa.training.ctc import distillation
from mowa.training.distributed import strategy
from tests.checkpoints import KINDS, corpus, tiny

# a feature projection large enough for int8
LARGE_PROJECTION = {"conv_dim": (8,) * 6 + (512,), "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny(tmp_path_factory.mktemp("base"), **LARGE_PROJECTION)
    net = AutoModelForCTC.from_pretrained(folder)
    with torch.no_grad():  # random blocks contribute little; larger weights make rounding matter
        for weight in net.wav2vec2.encoder.layers.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"), 24)


def plan(base, manifest, **settings):
    tree = {"model": str(base), "data": {"train": [manifest], "dev": [manifest], "max_eval_samples": 6}, "qat": "int4"}
    tree |= {
        "optimizer": {"max_steps": 6, "learning_rate": 1e-3, "precision": "float32"},
        "spec_augment": {"mask_time_prob": 0.0},
    }
    tree |= {"batch": {"seconds": 4.0}, "evaluation": {"eval_steps": 3}}
    return ctc.parse(schema.apply_overrides(tree, settings), "test")


def test_the_selected_linears_are_those_that_quantize_quantizes(base):
    model = loading.load(str(base))
    for to, scheme in qat.SCHEMES.items():
        blocks, others = qat.select_linears(model.net, model.family, to, 32)
        quantized = quantize(model, scheme)
        made = {name: one for name, one in quantized.net.named_modules() if isinstance(one, QuantizedLinear)}
        assert made.keys() == blocks.keys() | others.keys()
        assert set(others) == {"wav2vec2.feature_projection.projection"}
        for name, (bits, columns) in (blocks | others).items():
            assert (made[name].bits, made[name].group_size) == (bits, columns or made[name].in_features)


@pytest.mark.parametrize(("kind", "norm"), KINDS)
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_every_family_trains_and_converts_back_to_a_stock_net(kind, norm, to, tmp_path):
    model = loading.load(str(tiny(tmp_path, kind, norm)))
    net, values = model.net, torch.randn(1, 8000)
    classes = {name: type(module) for name, module in net.named_modules()}
    float32 = net(values).logits.detach()
    qat.prepare(net, model.family, to)
    net.requires_grad_(True)
    rounded = net(values).logits
    assert 0 < float((rounded - float32).detach().abs().max()) < float(float32.abs().max())
    rounded.square().mean().backward()
    names = qat.select_linears(copy.deepcopy(model.net), model.family, to, 32)[0]
    assert all(net.get_submodule(name).weight.grad.any() for name in names)
    qat.round_weights(net)
    settled = net(values).logits
    torch.testing.assert_close(settled, rounded, rtol=1e-2, atol=1e-2 * float(float32.abs().max()))
    qat.convert(net)
    assert {name: type(module) for name, module in net.named_modules()} == classes
    if to == "int4":  # in int8, inputs were rounded too
        assert torch.equal(net(values).logits, settled)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 0)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_integers_equal_torchaos_and_quantize_finds_them_again(bits, group, spread):
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    torch.manual_seed(bits + group)
    net = nn.Sequential(nn.Linear(256, 63))
    with torch.no_grad():
        net[0].weight.mul_(spread * (0.1 + torch.rand(63, 1)))
        net[0].weight[5] = 0
        net[0].weight[6, :128] = 0
    share = {"group_size": group} if group else {"granularity": "per_channel"}
    kind = getattr(torch, f"int{bits}")
    quantize_(net, QATConfig(weight_config=IntxFakeQuantizeConfig(kind, is_symmetric=True, **share), step="prepare"))
    theirs = copy.deepcopy(net)
    config = IntxWeightOnlyConfig(kind, PerGroup(group) if group else PerAxis(0))
    quantize_(theirs, QATConfig(config, step="convert"))
    fake = net[0].weight_fake_quantizer(net[0].weight).detach()
    assert torch.equal(theirs[0].weight.dequantize(), fake)
    qat.round_weights(net)
    qat.convert(net)
    ours = net[0].weight.detach()
    found = weights.quantize(ours, bits, group)
    assert torch.equal(found.qweight, theirs[0].weight.qdata)
    assert torch.equal(found.dequantize(), ours)
    torch.testing.assert_close(ours, fake, rtol=2e-3, atol=0)  # scales are now float16 numbers


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 0)])
def test_even_the_smallest_weights_end_on_their_grid(bits, group):
    """Where float16 has few scales left, integers may change once more, but not twice."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 63))
    with torch.no_grad():
        net[0].weight.mul_(10 ** torch.linspace(-7, 0, 63)[:, None])
    share = {"group_size": group} if group else {"granularity": "per_channel"}
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **share)
    quantize_(net, QATConfig(weight_config=config, step="prepare"))
    fake = net[0].weight_fake_quantizer(net[0].weight).detach()
    qat.round_weights(net)
    ours = net[0].weight.detach()
    assert torch.equal(weights.quantize(ours, bits, group).dequantize(), ours)
    torch.testing.assert_close(ours, fake, rtol=2e-3, atol=5e-6)


def test_training_begins_near_rounding_to_nearest():
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(128, 256) ** 3)  # heavy tails, which quantize clips
    weight = linear.weight.detach().clone()
    best = weights.quantize(weight, 4, 32).dequantize()
    qat._clip_outliers(linear.weight, 4, 32)
    linear.requires_grad_(False)
    top = linear.weight.reshape(128, 8, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(128, 256)
    step = top / 7.5
    begun = (linear.weight / step).round().clamp(-8, 7) * step
    whole = weight.reshape(128, 8, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(128, 256) / 7.5
    plain = (weight / whole).round().clamp(-8, 7) * whole
    errors = [float((made - weight).square().mean()) for made in (best, begun, plain)]
    assert errors[0] <= errors[1] < 1.1 * errors[0] < errors[2]


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("texts", [True, False])
def test_the_result_is_a_stock_checkpoint_that_quantize_does_not_change(base, manifest, tmp_path, to, texts):
    manifest_used = manifest
    if not texts:
        rows = [json.loads(line) | {"text": ""} for line in Path(manifest).read_text().splitlines()]
        manifest_used = str(Path(manifest).parent / "mute.jsonl")
        Path(manifest_used).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = plan(base, manifest, qat=to, **{"data.train": [{"path": manifest_used}], "method": "encoder"})
    out = dispatch.train(recipe, tmp_path / "out", threads=1)
    net = AutoModelForCTC.from_pretrained(out)
    model = loading.load(str(out))
    assert net.config.qat == {"scheme": qat.SCHEMES[to], "group_size": 32 if to == "int4" else 0}
    assert net.lm_head.weight.dtype == torch.float32
    quantized = quantize(model, qat.SCHEMES[to])
    blocks, others = qat.select_linears(net, model.family, to, 32)
    for name in blocks | others:
        assert torch.equal(quantized.net.get_submodule(name).weight, net.get_submodule(name).weight), name
    before = AutoModelForCTC.from_pretrained(base)
    assert all(not torch.equal(before.get_submodule(n).weight, net.get_submodule(n).weight) for n in blocks)


def test_training_reduces_the_loss_from_rounding(base, manifest, tmp_path):
    """The unquantized net is the teacher: after training, rounding changes its output less."""
    recipe = plan(
        base, manifest, **{"optimizer.max_steps": 40, "evaluation.eval_steps": 40, "distillation.ctc_weight": 0.0}
    )
    teacher = loading.load(str(base))
    out = dispatch.train(recipe, tmp_path / "out", threads=1)
    values = torch.randn(4, 8000, generator=torch.Generator().manual_seed(0))

    def divergence(model):
        with torch.no_grad():
            truth, logits = teacher.net(values).logits, quantize(model, "int4-weight").net(values).logits
        return float(distillation.kl_loss(logits, truth, [truth.shape[1]] * 4, 1.0))

    assert divergence(loading.load(str(out))) < 0.9 * divergence(teacher)


def test_a_resumed_run_ends_in_the_same_bits(base, manifest, tmp_path, monkeypatch):
    recipe = plan(base, manifest)
    whole = dispatch.train(recipe, tmp_path / "whole", threads=1)
    marked = checkpoints.MarkCompleteCallback.on_save

    def broken(self, args, state, control, **more):
        marked(self, args, state, control, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.MarkCompleteCallback, "on_save", broken)
        with pytest.raises(KeyboardInterrupt):
            dispatch.train(recipe, tmp_path / "broken", threads=1)
    out = dispatch.train(recipe, tmp_path / "broken", threads=1)
    ours, theirs = (AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (out, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "top-1"},
        {"method": "full", "optimizer.ema_decay": 0.9, "batch.gradient_accumulation_steps": 2},
        {"batch.packing": False, "distillation.logit_weight": 0.0, "distillation.hidden_weight": 0.0},
        {"distillation.student_layers": 1, "optimizer.gradient_checkpointing": True},
        {"optimizer.precision": "bf16", "qat_group_size": 64},
    ],
)
def test_it_combines_with_other_options(base, manifest, tmp_path, settings):
    recipe = plan(base, manifest, **{"optimizer.max_steps": 2, "evaluation.eval_steps": 2} | settings)
    out = dispatch.train(recipe, tmp_path / "out", threads=1)
    model = loading.load(str(out))
    quantized = quantize(model, replace(parse_scheme("int4-weight"), group_size=recipe.qat_group_size))
    for name in qat.select_linears(model.net, model.family, "int4", recipe.qat_group_size)[0]:
        assert torch.equal(quantized.net.get_submodule(name).weight, model.net.get_submodule(name).weight), name


def test_fine_tuning_without_qat_removes_the_config_entry(base, manifest, tmp_path):
    first = dispatch.train(plan(base, manifest, **{"optimizer.max_steps": 1}), tmp_path / "one", threads=1)
    again = plan(first, manifest, qat="none", **{"optimizer.max_steps": 1})
    second = dispatch.train(again, tmp_path / "two", threads=1)
    assert "qat" in json.loads((first / "config.json").read_text())
    assert "qat" not in json.loads((second / "config.json").read_text())


def test_unsuitable_nets_are_refused(base, tmp_path):
    model = loading.load(str(base))
    with pytest.raises(RecipeError, match=r"^qat: int4: the 64 columns of .*k_proj are not a multiple of 128"):
        qat.prepare(model.net, model.family, "int4", 128)
    with pytest.raises(RecipeError, match=r"^qat: int4: the net has no unquantized linears"):
        qat.prepare(quantize(model, "int4-weight").net, model.family, "int4")
    with pytest.raises(RecipeError, match=r"^qat: int8: .* is in float16, which loses small updates"):
        qat.prepare(copy.deepcopy(model.net).half(), model.family, "int8")
    assert all(type(module) is nn.Linear for module in model.net.modules() if isinstance(module, nn.Linear))


def test_without_torchao(base, monkeypatch):
    model = loading.load(str(base))
    monkeypatch.setitem(sys.modules, "torchao.quantization.qat", None)
    with pytest.raises(MissingDependency, match=r"needs torchao: pip install 'mowa\[qat\]'"):
        qat.prepare(model.net, model.family, "int4")


def test_strategies_that_shard_weights_are_refused(base, manifest):
    net = loading.load(str(base)).net
    assert "use ddp or zero2" in strategy.unsupported_reason("zero3", plan(base, manifest), net)
    assert not strategy.unsupported_reason("zero2", plan(base, manifest), net)
    assert not strategy.unsupported_reason("zero3", plan(base, manifest, qat="none"), net)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_leave_weights_on_the_grid(base, manifest, tmp_path, strategy):
    options = {"model": base, "data": manifest, "dev": manifest, "qat": "int4", "max-steps": 4, "devices": 2}
    options |= {
        "strategy": strategy,
        "optimizer.precision": "float32",
        "spec-augment.mask-time-prob": 0,
        "batch.seconds": 4,
        "out": tmp_path,
    }
    command = [sys.executable, "-m", "mowa", "train", "--threads", "2"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = loading.load(str(tmp_path))
    quantized = quantize(model, "int4-weight")
    for name in qat.select_linears(model.net, model.family, "int4", 32)[0]:
        assert torch.equal(quantized.net.get_submodule(name).weight, model.net.get_submodule(name).weight), name
