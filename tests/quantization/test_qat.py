"""Training with rounded weights: what learns is what will be run, and rounding leaves what came of it as it is."""

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
from mowa.training.config import ctc, schema
from mowa.training.ctc import distillation, trainer
from mowa.training.distributed import launch
from tests.checkpoints import KINDS, corpus, tiny

WIDE = {"conv_dim": (8,) * 6 + (512,), "hidden_size": 64, "intermediate_size": 128}  # a projection that is kept in int8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny(tmp_path_factory.mktemp("base"), **WIDE)
    net = AutoModelForCTC.from_pretrained(folder)
    with torch.no_grad():  # blocks that were never trained hardly do anything; rounding these is heard
        for weight in net.wav2vec2.encoder.layers.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"), 24)


def plan(base, manifest, **settings):
    tree = {"model": str(base), "data": {"train": [manifest], "dev": [manifest], "measured": 6}, "qat": "int4"}
    tree |= {"optimise": {"steps": 6, "learning_rate": 1e-3, "precision": "float32"}, "masks": {"time": 0.0}}
    tree |= {"batch": {"seconds": 4.0}, "evaluate": {"every": 3}}
    return ctc.parse(schema.apply_overrides(tree, settings), "test")


def test_the_linears_that_shrinking_makes_narrow_and_no_others(base):
    model = loading.load(str(base))
    for to, scheme in qat.SCHEMES.items():
        blocks, beside = qat.select_linears(model.net, model.family, to, 32)
        shrunk = quantize(model, scheme)
        made = {name: one for name, one in shrunk.net.named_modules() if isinstance(one, QuantizedLinear)}
        assert made.keys() == blocks.keys() | beside.keys()
        assert set(beside) == {"wav2vec2.feature_projection.projection"}
        for name, (bits, columns) in (blocks | beside).items():
            assert (made[name].bits, made[name].group_size) == (bits, columns or made[name].in_features)


@pytest.mark.parametrize(("kind", "norm"), KINDS)
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_every_family_learns_rounded_and_is_a_stock_net_again(kind, norm, to, tmp_path):
    model = loading.load(str(tiny(tmp_path, kind, norm)))
    net, values = model.net, torch.randn(1, 8000)
    classes = {name: type(module) for name, module in net.named_modules()}
    wide = net(values).logits.detach()
    qat.prepare(net, model.family, to)
    net.requires_grad_(True)
    rounded = net(values).logits
    assert 0 < float((rounded - wide).detach().abs().max()) < float(wide.abs().max())
    rounded.square().mean().backward()
    names = qat.select_linears(copy.deepcopy(model.net), model.family, to, 32)[0]
    assert all(net.get_submodule(name).weight.grad.any() for name in names)
    qat.round_weights(net)
    settled = net(values).logits
    torch.testing.assert_close(settled, rounded, rtol=1e-2, atol=1e-2 * float(wide.abs().max()))
    qat.convert(net)
    assert {name: type(module) for name, module in net.named_modules()} == classes
    if to == "int4":  # in int8, inputs were rounded too
        assert torch.equal(net(values).logits, settled)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 0)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_codes_are_those_of_torchao_and_rounding_finds_them_again(bits, group, spread):
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
    torch.testing.assert_close(ours, fake, rtol=2e-3, atol=0)  # steps are now numbers that float16 has


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 0)])
def test_even_the_smallest_weights_end_on_their_grid(bits, group):
    """Where float16 has hardly any numbers left, codes may change once more, and then no more."""
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


def test_training_begins_about_where_rounding_to_nearest_is():
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(128, 256) ** 3)  # long tails, which rounding cuts off
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
def test_what_is_left_is_a_stock_checkpoint_that_shrinking_does_not_change(base, manifest, tmp_path, to, texts):
    spoken = manifest
    if not texts:
        rows = [json.loads(line) | {"text": ""} for line in Path(manifest).read_text().splitlines()]
        spoken = str(Path(manifest).parent / "mute.jsonl")
        Path(spoken).write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = plan(base, manifest, qat=to, **{"data.train": [{"path": spoken}], "train": "encoder"})
    out = trainer.train_ctc(how, loading.load(str(base)), tmp_path / "out", threads=1)
    net = AutoModelForCTC.from_pretrained(out)
    model = loading.load(str(out))
    assert net.config.qat == {"scheme": qat.SCHEMES[to], "group": 32 if to == "int4" else 0}
    assert net.lm_head.weight.dtype == torch.float32
    shrunk = quantize(model, qat.SCHEMES[to])
    blocks, beside = qat.select_linears(net, model.family, to, 32)
    for name in blocks | beside:
        assert torch.equal(shrunk.net.get_submodule(name).weight, net.get_submodule(name).weight), name
    before = AutoModelForCTC.from_pretrained(base)
    assert all(not torch.equal(before.get_submodule(n).weight, net.get_submodule(n).weight) for n in blocks)


def test_the_rounded_net_comes_nearer_to_what_it_was(base, manifest, tmp_path):
    """The net itself teaches: after training, rounding costs less than it does at once."""
    how = plan(base, manifest, **{"optimise.steps": 40, "evaluate.every": 40, "distil.letters": 0.0})
    whole = loading.load(str(base))
    out = trainer.train_ctc(how, loading.load(str(base)), tmp_path / "out", threads=1)
    values = torch.randn(4, 8000, generator=torch.Generator().manual_seed(0))

    def far(model):
        with torch.no_grad():
            truth, said = whole.net(values).logits, quantize(model, "int4-weight").net(values).logits
        return float(distillation.kl_loss(said, truth, [truth.shape[1]] * 4, 1.0))

    assert far(loading.load(str(out))) < 0.9 * far(whole)


def test_a_run_that_was_broken_off_ends_in_the_same_bits(base, manifest, tmp_path, monkeypatch):
    how = plan(base, manifest)
    whole = trainer.train_ctc(how, loading.load(str(base)), tmp_path / "whole", threads=1)
    marked = checkpoints.MarkCompleteCallback.on_save

    def broken(self, args, state, control, **more):
        marked(self, args, state, control, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.MarkCompleteCallback, "on_save", broken)
        with pytest.raises(KeyboardInterrupt):
            trainer.train_ctc(how, loading.load(str(base)), tmp_path / "broken", threads=1)
    out = trainer.train_ctc(how, loading.load(str(base)), tmp_path / "broken", threads=1)
    ours, theirs = (AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (out, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "top-1"},
        {"train": "all", "optimise.ema": 0.9, "batch.accumulate": 2},
        {"batch.layout": "padded", "distil.emissions": 0.0, "distil.hidden": 0.0},
        {"distil.layers": 1, "optimise.checkpointing": True},
        {"optimise.precision": "bf16", "qat_group": 64},
    ],
)
def test_it_goes_with_everything_else(base, manifest, tmp_path, settings):
    how = plan(base, manifest, **{"optimise.steps": 2, "evaluate.every": 2} | settings)
    out = trainer.train_ctc(how, loading.load(str(base)), tmp_path / "out", threads=1)
    model = loading.load(str(out))
    shrunk = quantize(model, replace(parse_scheme("int4-weight"), group_size=how.qat_group_size))
    for name in qat.select_linears(model.net, model.family, "int4", how.qat_group_size)[0]:
        assert torch.equal(shrunk.net.get_submodule(name).weight, model.net.get_submodule(name).weight), name


def test_tuned_again_without_it_a_checkpoint_no_longer_says_it(base, manifest, tmp_path):
    first = trainer.train_ctc(
        plan(base, manifest, **{"optimise.steps": 1}), loading.load(str(base)), tmp_path / "one", threads=1
    )
    again = plan(first, manifest, qat="none", **{"optimise.steps": 1})
    second = trainer.train_ctc(again, loading.load(str(first)), tmp_path / "two", threads=1)
    assert "qat" in json.loads((first / "config.json").read_text())
    assert "qat" not in json.loads((second / "config.json").read_text())


def test_what_cannot_be_rounded_is_refused(base, tmp_path):
    model = loading.load(str(base))
    with pytest.raises(RecipeError, match=r"^qat: int4: the 64 columns of .*k_proj do not fill groups of 128"):
        qat.prepare(model.net, model.family, "int4", 128)
    with pytest.raises(RecipeError, match=r"^qat: int4: none of this net's linears is wide"):
        qat.prepare(quantize(model, "int4-weight").net, model.family, "int4")
    with pytest.raises(RecipeError, match=r"^qat: int8: .* is in float16, in which small steps are lost"):
        qat.prepare(copy.deepcopy(model.net).half(), model.family, "int8")
    assert all(type(module) is nn.Linear for module in model.net.modules() if isinstance(module, nn.Linear))


def test_without_torchao_it_says_how_to_get_it(base, monkeypatch):
    model = loading.load(str(base))
    monkeypatch.setitem(sys.modules, "torchao.quantization.qat", None)
    with pytest.raises(MissingDependency, match=r"needs torchao: pip install 'mowa\[qat\]'"):
        qat.prepare(model.net, model.family, "int4")


def test_strategies_that_cut_up_the_weights_are_refused(base, manifest):
    net = loading.load(str(base)).net
    assert "use ddp or zero2" in launch.unsupported_reason("zero3", plan(base, manifest), net)
    assert not launch.unsupported_reason("zero2", plan(base, manifest), net)
    assert not launch.unsupported_reason("zero3", plan(base, manifest, qat="none"), net)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_leave_weights_on_the_grid(base, manifest, tmp_path, strategy):
    knobs = {"model": base, "data": manifest, "dev": manifest, "qat": "int4", "steps": 4, "devices": 2}
    knobs |= {
        "strategy": strategy,
        "optimise.precision": "float32",
        "masks.time": 0,
        "batch.seconds": 4,
        "out": tmp_path,
    }
    command = [sys.executable, "-m", "mowa", "train", "--threads", "2"]
    command += [str(part) for name, value in knobs.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = loading.load(str(tmp_path))
    shrunk = quantize(model, "int4-weight")
    for name in qat.select_linears(model.net, model.family, "int4", 32)[0]:
        assert torch.equal(shrunk.net.get_submodule(name).weight, model.net.get_submodule(name).weight), name
