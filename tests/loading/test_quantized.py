"""Narrow checkpoints back as the models that were shrunk, by no package but ours; and those that cannot be read."""

import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import mowa
from mowa.cli.main import main
from mowa.data import audio
from mowa.errors import ModelError
from mowa.exporters import protocol, safetensors
from mowa.loading import load
from tests.checkpoints import clip, tiny
from tests.quantized import QUICK, SCHEMES, narrows, same, shrunk


@pytest.fixture(scope="module", params=list(SCHEMES))
def made(request, tmp_path_factory):
    """A model, and the folder it was exported to; whether transformers can read it is `tests/export`'s affair."""
    root = tmp_path_factory.mktemp("made")
    model = shrunk(root / "base", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "find_spec", lambda name: None)
        return model, protocol.export(model, "safetensors", root / "out").folder


@pytest.fixture
def alone(monkeypatch):
    """None of the packages that read such files can be imported."""
    for package in ("compressed_tensors", "bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "find_spec", lambda name: None)
    return protocol.export(shrunk(tmp_path / "base", "int8-dynamic"), "safetensors", tmp_path / "out").folder


def emissions(model, **how):
    sound = audio.normalize(clip(3, 12_000))
    return mowa.open_engine(model, device="cpu", **how).emissions([sound])[0]


def change(folder, name, **values):
    data = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps(data))


def test_codes_scales_and_zeros_come_back(made, alone):
    model, folder = made
    loaded = mowa.load(str(folder))
    assert loaded.scheme == model.scheme
    assert (loaded.vocabulary, loaded.preprocessing) == (model.vocabulary, model.preprocessing)
    assert type(loaded.net) is type(model.net)
    before, after = narrows(model.net), narrows(loaded.net)
    spared = {name for name in before if "feature_projection" in name and name not in after}
    assert not spared or model.scheme.weights == "nf4" or not model.scheme.symmetric
    assert all(same(before[name], after[name]) for name in before.keys() - spared)
    theirs = loaded.net.state_dict()
    for name, value in model.net.state_dict().items():
        if not any(name.startswith(f"{one}.") for one in before):
            assert torch.equal(theirs[name], value), name
    assert {p.dtype for p in loaded.net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.net.parameters())
    assert not loaded.net.training


def test_it_says_what_was_said_before(made):
    model, folder = made
    sound = torch.from_numpy(clip(1, 9_000))[None]
    with torch.inference_mode():
        ours, theirs = (one(sound).logits.log_softmax(-1) for one in (load(str(folder)).net, model.net))
    wide = model.scheme.weights == "nf4" or not model.scheme.symmetric  # the projection is
    assert (ours - theirs).abs().max() <= (1e-3 if wide else 0)


def test_without_the_note_the_scheme_is_read_from_the_weights(made, tmp_path):
    model, folder = made
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "mowa.json").unlink()
    found, said = load(str(tmp_path / "bare")).scheme, model.scheme
    assert (found.name, found.weights, found.activations) == (said.name, said.weights, said.activations)
    assert (found.group, found.symmetric) == (said.group, said.symmetric)


@pytest.mark.parametrize(("name", "weights"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_halves_say_their_scheme(tmp_path, name, weights):
    from dataclasses import replace

    from mowa.types import Scheme

    model = replace(load(str(tiny(tmp_path / "base", **QUICK))), scheme=Scheme(name, weights))
    for parameter in model.net.parameters():
        parameter.data = parameter.data.to(getattr(torch, weights)).float()
    folder = protocol.export(model, "safetensors", tmp_path / "out").folder
    loaded = load(str(folder))
    assert loaded.scheme == model.scheme
    assert loaded.net.dtype is torch.float32
    assert all(torch.equal(p, q) for p, q in zip(loaded.net.parameters(), model.net.parameters(), strict=True))


def test_a_checkpoint_that_is_no_export_is_as_it_was(tmp_path):
    assert load(str(tiny(tmp_path, **QUICK))).scheme.name == "float32"


def test_engines_run_it(out):
    found = mowa.open_engine(load(str(out)), device="cpu")
    assert (found.scheme, found.dtype) == ("int8-dynamic", "int8")
    assert found.plan is not None
    wide = emissions(load(str(out)), dtype="float32")
    assert 0 < np.abs(emissions(load(str(out))) - wide).max() < 1


def test_mowa_transcribe_takes_the_folder(out, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", clip(0, 20_000), 16_000)
    with pytest.raises(SystemExit) as end:
        main(["transcribe", str(tmp_path / "a.wav"), "--speech", "0", "-m", str(out)])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip()


def test_it_cannot_learn(out):
    with pytest.raises(ModelError, match="in few bits, and those do not learn"):
        load(str(out), require_head=False)


def test_the_rest_may_be_in_half_precision(out):
    net = load(str(out), dtype="bfloat16").net
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert all(linear.scale.dtype is torch.float32 for linear in narrows(net).values())
    with torch.inference_mode():
        assert net(torch.zeros(1, 8_000, dtype=torch.bfloat16)).logits.isfinite().all()


FOREIGN = [
    ({"quant_method": "gptq", "bits": 4}, "are kept by gptq: name the checkpoint that they were made of"),
    ({"bits": 4}, "are kept by None"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "kept by bitsandbytes, of which only nf4"),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
         "bnb_4bit_use_double_quant": True},
        "kept by bitsandbytes, of which only nf4 with plain scales",
    ),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "kept by compressed-tensors, of which only int8"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "why"), FOREIGN)
def test_what_others_wrote_otherwise_is_refused(tmp_path, how, why):
    folder = tiny(tmp_path, **QUICK)
    change(folder, "config.json", quantization_config=how)
    with pytest.raises(ModelError, match=why):
        load(str(folder))


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("input_activations", {"strategy": "token"}),
        ("input_activations", {"symmetric": True}),
        ("weights", {"num_bits": 6}),
        ("weights", {"type": "float"}),
        ("weights", {"strategy": "block"}),
        ("weights", {"symmetric": False}),
    ],
)
def test_kinds_of_compressed_tensors_that_are_not_ours_are_refused(out, part, values):
    how = json.loads((out / "config.json").read_text())["quantization_config"]
    for group in how["config_groups"].values():
        if group[part]:
            group[part] |= values
    change(out, "config.json", quantization_config=how)
    with pytest.raises(ModelError, match="kept by compressed-tensors, of which only int8 and int4"):
        load(str(out))


def broken(out, **changes):
    """The weights with some changed (None: left out), and no note that would tell."""
    kept = {name: changes.get(name, value) for name, value in load_file(out / "model.safetensors").items()}
    kept |= {name: value for name, value in changes.items() if name not in kept}
    save_file({name: value for name, value in kept.items() if value is not None}, out / "model.safetensors")
    (out / "mowa.json").unlink()
    with pytest.raises(ModelError) as refused:
        load(str(out))
    return str(refused.value)


def test_weights_that_do_not_fit_are_refused(out):
    q = "wav2vec2.encoder.layers.0.attention.q_proj"
    copies = [shutil.copytree(out, out.parent / f"copy{index}") for index in range(6)]
    message = broken(copies[0], **{f"{q}.weight": torch.zeros(64, 63, dtype=torch.int8)})
    assert f"the weights hold {q} [64, 63], for which config.json has no place" in message
    message = broken(copies[1], **{f"{q}.weight": None})
    assert f"the narrow weights of {q} are damaged: 'weight'" in message
    message = broken(copies[2], **{f"{q}.weight_scale": torch.ones(64, 2)})
    assert "2 scales a row are not for groups of 64 of 64 columns" in message
    assert "lm_head.bias is in one and not in the other" in broken(copies[3], **{"lm_head.bias": None})
    assert "no.place is in one and not" in broken(copies[4], **{"no.place": torch.zeros(1)})
    message = broken(copies[5], **{"lm_head.bias": torch.zeros(1)})
    assert "do not fit config.json: size mismatch for lm_head.bias" in message


def test_files_that_are_not_there_or_cut_are_refused(out):
    file = out / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or damaged: export the model again"):
        load(str(out))
    (out / "mowa.json").unlink()
    with pytest.raises(ModelError, match="are damaged"):
        load(str(out))
    file.unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(str(out))


def test_a_note_that_says_too_little_is_refused(out):
    note = json.loads((out / "mowa.json").read_text())
    del note["scheme"]
    (out / "mowa.json").write_text(json.dumps(note))
    with pytest.raises(ModelError, match=r"mowa\.json is damaged: it does not say 'scheme'"):
        load(str(out))
