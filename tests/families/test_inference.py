"""A plan against the net it was made of: every family and front end, odd lengths, adapters; the net is left alone."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC

import mowa
from mowa.adapt import merge, store
from mowa.data import audio
from mowa.errors import ModelError
from mowa.families import inference
from mowa.families.inference import Plan, refused
from tests.adapt.made import OTHER, saved
from tests.checkpoints import KINDS, clip, tiny

LENGTHS = [400, 401, 719, 720, 4_097, 20_799, 20_800, 20_801, 45_001]
PLANNED = [kind for kind in KINDS if kind[0] != "wavlm"]
SOUNDS = [torch.from_numpy(audio.normalize(clip(index, length))) for index, length in enumerate(LENGTHS)]


def net_of(folder, **how):
    return AutoModelForCTC.from_pretrained(folder, **how).eval().requires_grad_(False)


def truth(net, sounds=SOUNDS):
    exact = copy.deepcopy(net).double()
    with torch.inference_mode():
        return [exact(sound[None].double()).logits[0].log_softmax(-1) for sound in sounds]


@torch.inference_mode()
def planned(net, kind="float32", sounds=SOUNDS, **more):
    plan = Plan(net, kind, **more)
    return [logits.double().log_softmax(-1) for sound in sounds for logits in plan([sound])]


@pytest.fixture(scope="module", params=PLANNED, ids="-".join)
def folder(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("-".join(request.param)), *request.param)


def test_float32_is_the_net_alone_and_in_any_company(folder):
    net = net_of(folder)
    assert refused(net, "float32") == ""
    expected = truth(net)
    alone = planned(net)
    with torch.inference_mode():
        together = [logits.double().log_softmax(-1) for logits in Plan(net, "float32")(SOUNDS)]
    for one, other, right in zip(alone, together, expected, strict=True):
        assert one.shape == other.shape == right.shape
        assert (one - right).abs().max() <= 1e-5
        assert (other - right).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_narrow_arithmetic_errs_within_reason(folder, kind):
    """bfloat16: no more than twice what the net itself errs by in bfloat16. int8: three times that."""
    net, half = net_of(folder), net_of(folder, dtype=torch.bfloat16)
    expected = torch.cat(truth(net))
    with torch.inference_mode():
        theirs = torch.cat([half(sound[None].bfloat16()).logits[0].double().log_softmax(-1) for sound in SOUNDS])
    ours = torch.cat(planned(half if kind == "bfloat16" else net, kind))
    allowed = {"bfloat16": 2, "int8": 3}[kind] * (theirs - expected).norm()
    assert 0 < (ours - expected).norm() <= allowed


def test_the_net_is_left_as_it_was(folder):
    net = net_of(folder)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.inference_mode():
        expected = net(SOUNDS[4][None]).logits
    planned(net, "int8", SOUNDS[:2])
    with torch.inference_mode():
        assert torch.equal(net(SOUNDS[4][None]).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not [name for name, module in net.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("kind", "words"), [("lora", None), ("lora", OTHER), ("adapters", OTHER)])
def test_adapters_share_packed_weights_and_say_what_the_merged_net_says(tmp_path, kind, words):
    base = tiny(tmp_path / "base")
    saved(base, kind, tmp_path / "adapter", words=words)
    model = mowa.load(str(base))
    under = Plan(model.net, "float32")
    count = len(under._packs)
    adapted = store.load(model, tmp_path / "adapter")
    assert refused(adapted.net, "float32") == ""
    ours = planned(adapted.net, like=under)
    assert len(under._packs) == count  # nothing was packed a second time
    for one, right in zip(ours, truth(merge.merge(adapted).net), strict=True):
        assert (one - right).abs().max() <= 1e-5
    for one, right in zip(planned(model.net, like=under), truth(model.net), strict=True):
        assert (one - right).abs().max() <= 1e-5


def test_a_plan_of_another_arithmetic_shares_nothing(tmp_path):
    net = net_of(tiny(tmp_path))
    assert not set(map(id, Plan(net, "int8", Plan(net, "float32"))._packs.values())) & {
        id(pack) for pack in Plan(net, "float32")._packs.values()
    }
    first = Plan(net, "float32")
    assert Plan(net, "int8", first)._packs is not first._packs


def test_a_convolutional_adapter_is_asked(tmp_path):
    net = net_of(tiny(tmp_path, add_adapter=True, num_adapter_layers=2, adapter_stride=2, output_hidden_size=32))
    for one, right in zip(planned(net), truth(net), strict=True):
        assert one.shape == right.shape
        assert (one - right).abs().max() <= 1e-5


def test_positions_may_be_looked_up():
    model = mowa.load("pl-tiny")
    expected = truth(model.net, SOUNDS[4:5])[0]
    from mowa.families.patch import positions_by_table

    assert positions_by_table(model.net)
    (ours,) = planned(model.net, "float32", SOUNDS[4:5])
    assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("wavlm", {}, "attends in a way of its own"),
        ("hubert", {"conv_pos_batch_norm": True}, "normalises over the batch"),
        ("wav2vec2", {"hidden_act": "relu"}, "not GELU"),
        ("wav2vec2", {"feat_extract_activation": "relu"}, "not GELU"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path, family, changes, why):
    assert why in refused(net_of(tiny(tmp_path, family, **changes)), "float32")


def test_dora_is_refused(tmp_path):
    from mowa.adapt import lora

    model = mowa.load(str(tiny(tmp_path)))
    lora.add(model.net, model.family, rank=2, alpha=2, kind="dora")
    assert "computes in a way of its own" in refused(model.net, "float32")


def test_an_engine_without_a_plan_calls_the_net(tmp_path, monkeypatch):
    folder = tiny(tmp_path)
    sound = audio.normalize(clip(0, 9_000))
    ours = mowa.engine(mowa.load(str(folder)), device="cpu", dtype="float32")
    assert ours.plan is not None
    monkeypatch.setattr(inference, "refused", lambda net, kind: "it is forbidden here")
    plain = mowa.engine(mowa.load(str(folder)), device="cpu", dtype="float32")
    assert plain.plan is None
    np.testing.assert_allclose(ours.emissions([sound])[0], plain.emissions([sound])[0], atol=2e-5)
    with pytest.raises(ModelError, match="cannot run in int8: it is forbidden here; use --dtype auto"):
        mowa.engine(mowa.load(str(folder)), device="cpu", dtype="int8")
