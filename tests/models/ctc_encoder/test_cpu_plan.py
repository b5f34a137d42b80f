"""The CPU plan compared with its net: every family and front end, odd lengths, adapters, quantized nets."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC

import mowa
from mowa.adapters import checkpoint, merge
from mowa.data import audio
from mowa.engines.protocol import BatchPolicy
from mowa.errors import ModelError
from mowa.families import get_family
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.weights import quantize
from mowa.models.ctc_encoder import cpu_plan
from mowa.models.ctc_encoder.cpu_plan import CpuPlan, unsupported_reason
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, save_tiny_adapter
from tests.checkpoints import KINDS, clip, tiny
from tests.quantized import RANGE, SCHEMES, dequantized_copy, tiny_quantized

LENGTHS = [400, 401, 719, 720, 4_097, 20_799, 20_800, 20_801, 45_001]
PLANNED = [kind for kind in KINDS if "cpu_plan" in get_family(kind[0]).supports]
SOUNDS = [torch.from_numpy(audio.normalize(clip(index, length))) for index, length in enumerate(LENGTHS)]


def net_of(folder, **how):
    return AutoModelForCTC.from_pretrained(folder, **how).eval().requires_grad_(False)


def truth(net, sounds=SOUNDS):
    exact = copy.deepcopy(net).double()
    with torch.inference_mode():
        return [exact(sound[None].double()).logits[0].log_softmax(-1) for sound in sounds]


@torch.inference_mode()
def planned(net, kind="float32", sounds=SOUNDS, **more):
    plan = CpuPlan(net, kind, **more)
    return [logits.double().log_softmax(-1) for sound in sounds for logits in plan([sound])]


@pytest.fixture(scope="module", params=PLANNED, ids="-".join)
def folder(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("-".join(request.param)), *request.param)


def test_float32_equals_the_net_alone_and_in_batches(folder):
    net = net_of(folder)
    assert unsupported_reason(net, "float32") == ""
    expected = truth(net)
    alone = planned(net)
    with torch.inference_mode():
        together = [logits.double().log_softmax(-1) for logits in CpuPlan(net, "float32")(SOUNDS)]
    for one, other, right in zip(alone, together, expected, strict=True):
        assert one.shape == other.shape == right.shape
        assert (one - right).abs().max() <= 1e-5
        assert (other - right).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_errors_of_bfloat16_and_int8(folder, kind):
    """bfloat16: at most twice the error of the net itself in bfloat16; int8: at most three times."""
    net, half = net_of(folder), net_of(folder, dtype=torch.bfloat16)
    expected = torch.cat(truth(net))
    with torch.inference_mode():
        theirs = torch.cat([half(sound[None].bfloat16()).logits[0].double().log_softmax(-1) for sound in SOUNDS])
    ours = torch.cat(planned(half if kind == "bfloat16" else net, kind))
    allowed = {"bfloat16": 2, "int8": 3}[kind] * (theirs - expected).norm()
    assert 0 < (ours - expected).norm() <= allowed


def test_the_net_is_not_changed(folder):
    net = net_of(folder)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.inference_mode():
        expected = net(SOUNDS[4][None]).logits
    planned(net, "int8", SOUNDS[:2])
    with torch.inference_mode():
        assert torch.equal(net(SOUNDS[4][None]).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not [name for name, module in net.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("kind", "words"), [("lora", None), ("lora", OTHER_VOCABULARY), ("bottleneck", OTHER_VOCABULARY)]
)
def test_adapters_share_packed_weights_and_equal_the_merged_net(tmp_path, kind, words):
    base = tiny(tmp_path / "base")
    save_tiny_adapter(base, kind, tmp_path / "adapter", vocabulary=words)
    model = mowa.load(str(base))
    under = CpuPlan(model.net, "float32")
    count = len(under._packs)
    adapted = checkpoint.load_adapter(model, tmp_path / "adapter")
    assert unsupported_reason(adapted.net, "float32") == ""
    ours = planned(adapted.net, share_weights_with=under)
    assert len(under._packs) == count  # nothing is packed twice
    for one, right in zip(ours, truth(merge.merge_adapter(adapted).net), strict=True):
        assert (one - right).abs().max() <= 1e-5
    for one, right in zip(planned(model.net, share_weights_with=under), truth(model.net), strict=True):
        assert (one - right).abs().max() <= 1e-5


def test_plans_of_other_dtypes_share_nothing(tmp_path):
    net = net_of(tiny(tmp_path))
    assert not set(map(id, CpuPlan(net, "int8", CpuPlan(net, "float32"))._packs.values())) & {
        id(pack) for pack in CpuPlan(net, "float32")._packs.values()
    }
    first = CpuPlan(net, "float32")
    assert CpuPlan(net, "int8", first)._packs is not first._packs


def test_convolutional_adapter(tmp_path):
    net = net_of(tiny(tmp_path, add_adapter=True, num_adapter_layers=2, adapter_stride=2, output_hidden_size=32))
    for one, right in zip(planned(net), truth(net), strict=True):
        assert one.shape == right.shape
        assert (one - right).abs().max() <= 1e-5


def test_absolute_positions():
    model = mowa.load("pl-tiny")
    expected = truth(model.net, SOUNDS[4:5])[0]
    from mowa.models.ctc_encoder.positions import precompute_absolute_positions

    assert precompute_absolute_positions(model.net)
    (ours,) = planned(model.net, "float32", SOUNDS[4:5])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("wavlm", {}, "has an attention of its own"),
        ("hubert", {"conv_pos_batch_norm": True}, "has batch norm"),
        ("wav2vec2", {"hidden_act": "relu"}, "not GELU"),
        ("wav2vec2", {"feat_extract_activation": "relu"}, "not GELU"),
    ],
)
def test_unsupported_nets(tmp_path, family, changes, why):
    assert why in unsupported_reason(net_of(tiny(tmp_path, family, **changes)), "float32")


def test_dora_is_refused(tmp_path):
    from mowa.adapters import lora

    model = mowa.load(str(tiny(tmp_path)))
    lora.add(model.net, model.family, rank=2, alpha=2, variant="dora")
    assert "has an update other than plain LoRA" in unsupported_reason(model.net, "float32")


def test_an_engine_without_a_plan_calls_the_net(tmp_path, monkeypatch):
    folder = tiny(tmp_path)
    sound = audio.normalize(clip(0, 9_000))
    ours = mowa.open_engine(mowa.load(str(folder)), device="cpu", dtype="float32")
    assert ours.plan is not None
    monkeypatch.setattr(cpu_plan, "unsupported_reason", lambda net, kind: "no plan in this test")
    plain = mowa.open_engine(mowa.load(str(folder)), device="cpu", dtype="float32")
    assert plain.plan is None
    np.testing.assert_allclose(ours.emissions([sound])[0], plain.emissions([sound])[0], atol=2e-5)
    with pytest.raises(ModelError, match="cannot run in int8: no plan in this test; use --dtype auto"):
        mowa.open_engine(mowa.load(str(folder)), device="cpu", dtype="int8")


QUANTIZED = [(scheme, "wav2vec2", "layer") for scheme in SCHEMES]
QUANTIZED += [("int8-dynamic", "hubert", "group"), ("int4-weight", "wav2vec2", "group")]


@pytest.fixture(scope="module", params=QUANTIZED, ids="-".join)
def model(request, tmp_path_factory):
    return tiny_quantized(tmp_path_factory.mktemp("quantized"), *request.param)


class TestQuantized:
    """Nets with QuantizedLinear modules, whose own forward pass is the reference."""

    def test_float32_equals_the_dequantized_net(self, model):
        assert unsupported_reason(model.net, "float32") == unsupported_reason(model.net, "int8") == ""
        with torch.inference_mode():
            plan = CpuPlan(model.net, "float32")
            together = [logits.double().log_softmax(-1) for logits in plan(SOUNDS[4:])]
        for one, other, right in zip(
            planned(model.net, sounds=SOUNDS[4:]), together, truth(dequantized_copy(model.net), SOUNDS[4:]), strict=True
        ):
            assert (one - right).abs().max() <= 1e-5
            assert (other - right).abs().max() <= 1e-5

    def test_errors_of_bfloat16_and_int8(self, model):
        """At most twice the error of the net's own modules plus twice that of bfloat16, used for the other layers."""
        sounds, dequantized = SOUNDS[4:], dequantized_copy(model.net)
        expected = torch.cat(truth(dequantized, sounds))
        half = copy.deepcopy(dequantized).bfloat16()
        with torch.inference_mode():
            own = torch.cat([model.net(sound[None]).logits[0].double().log_softmax(-1) for sound in sounds])
            halves = [half(sound[None].bfloat16()).logits[0].double().log_softmax(-1) for sound in sounds]
        allowed = 2 * ((own - expected).norm() + (torch.cat(halves) - expected).norm())
        for kind in ("bfloat16", "int8"):
            net = copy.deepcopy(model.net).bfloat16() if kind == "bfloat16" else model.net
            ours = torch.cat(planned(net, kind, sounds))
            assert 0 < (ours - expected).norm() <= allowed

    def test_the_net_is_not_changed(self, model):
        before = {name: value.clone() for name, value in model.net.state_dict().items()}
        planned(model.net, "int8", SOUNDS[4:5])
        assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())

    def test_nets_with_the_same_tensors_share_packed_weights(self, model):
        under = CpuPlan(model.net, "int8")
        count = len(under._packs)
        over = CpuPlan(checkpoint.copy_sharing_weights(model.net), "int8", share_weights_with=under)
        assert over._packs is under._packs
        assert len(under._packs) == count

    @pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
    def test_int8_weights_are_used_as_they_are(self, tmp_path, scheme):
        net = tiny_quantized(tmp_path, scheme).net
        layer = net.base_model.encoder.layers[0]
        (product,) = CpuPlan(net, "int8").blocks[0]._qkv.products
        parts = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
        assert torch.equal(product._scale, torch.cat([one.scale[:, 0] for one in parts]))
        assert product._input_qparams == (pytest.approx(RANGE) if scheme == "int8-static" else None)
        x = torch.randn(7, 64)
        theirs = torch.cat([one(x) for one in parts], -1)
        assert (product(x).float() - theirs).norm() <= 5e-3 * theirs.norm()  # its output is bfloat16

    def test_linears_with_different_qparams_are_separate_products(self, tmp_path):
        net = tiny_quantized(tmp_path, "int8-static").net
        attention = net.base_model.encoder.layers[0].attention
        attention.k_proj = QuantizedLinear(
            attention.k_proj.quantized_weight, attention.k_proj.bias, "static", (0.02, 100)
        )
        attention.v_proj = QuantizedLinear(quantize(attention.v_proj.weight, 4, 32), attention.v_proj.bias)
        plan = CpuPlan(net, "int8")
        assert len(plan.blocks[0]._qkv.products) == 3
        assert len(plan.blocks[1]._qkv.products) == 1
        x = torch.randn(7, 64)
        theirs = torch.cat([one(x) for one in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
        assert (plan.blocks[0]._qkv(x).float() - theirs).norm() <= 1e-2 * theirs.norm()

    def test_a_projection_without_a_norm(self, tmp_path):
        model = tiny_quantized(tmp_path, "int8-weight", "hubert", "layer", feat_proj_layer_norm=False)
        for one, right in zip(planned(model.net), truth(dequantized_copy(model.net)), strict=True):
            assert (one - right).abs().max() <= 1e-5

    def test_incomplete_groups(self, tmp_path):
        net = net_of(tiny(tmp_path))
        for name, linear in list(net.named_modules()):
            if name.endswith("_dense"):
                net.set_submodule(name, QuantizedLinear(quantize(linear.weight, 4, 48), linear.bias))
        for one, right in zip(planned(net), truth(dequantized_copy(net)), strict=True):
            assert (one - right).abs().max() <= 1e-5

    def test_absolute_positions_with_a_quantized_projection(self):
        model = mowa.load("pl-tiny")
        projection = model.net.base_model.feature_projection.projection
        model.net.base_model.feature_projection.projection = QuantizedLinear(
            quantize(projection.weight, 8, 32), projection.bias
        )
        expected = truth(dequantized_copy(model.net), SOUNDS[4:5])[0]
        from mowa.models.ctc_encoder.positions import precompute_absolute_positions

        assert precompute_absolute_positions(model.net)
        (ours,) = planned(model.net, "float32", SOUNDS[4:5])
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("scheme", list(SCHEMES))
    def test_engines_choose_the_dtype_of_the_scheme(self, tmp_path, scheme):
        model, sound = tiny_quantized(tmp_path, scheme), audio.normalize(clip(0, 9_000))
        engine = mowa.open_engine(model, device="cpu")
        assert engine.scheme == model.scheme.name
        assert engine.plan is not None
        assert (engine.dtype == "int8") == (model.scheme.activations != "none")
        assert engine.batch_policy is BatchPolicy.SINGLE or engine.dtype == "float32"
        assert np.isfinite(engine.emissions([sound])[0]).all()

    def test_a_named_dtype_does_not_quantize_inputs(self, tmp_path):
        model, sound = tiny_quantized(tmp_path, "int8-dynamic"), audio.normalize(clip(0, 9_000))
        engine = mowa.open_engine(model, device="cpu", dtype="float32")
        (expected,) = truth(dequantized_copy(model.net), [torch.from_numpy(sound)])
        np.testing.assert_allclose(engine.emissions([sound])[0], expected, atol=2e-5)
        assert engine.batch_policy is BatchPolicy.PADDED

    @pytest.mark.parametrize("scheme", ["int4-weight", "nf4"])
    def test_int8_needs_int8_weights(self, tmp_path, scheme):
        with pytest.raises(ModelError, match=f"scheme {scheme}, which does not compute in int8"):
            mowa.open_engine(tiny_quantized(tmp_path, scheme), device="cpu", dtype="int8")

    @pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight"])
    def test_without_a_plan_dynamic_ranges_are_per_recording(self, tmp_path, scheme):
        model, sounds = tiny_quantized(tmp_path, scheme, "wavlm"), [audio.normalize(clip(n, 9_000)) for n in range(2)]
        engine = mowa.open_engine(model, device="cpu", dtype="float32")
        assert engine.plan is None
        assert engine.batch_policy is (BatchPolicy.SINGLE if scheme == "int8-dynamic" else BatchPolicy.PADDED)
        with torch.inference_mode():
            expected = model.net(torch.from_numpy(sounds[0])[None]).logits[0].log_softmax(-1)
        np.testing.assert_allclose(engine.emissions(sounds[:1])[0], expected, atol=2e-5)
        assert mowa.open_engine(model, device="cpu").dtype != "int8"
