"""Quantized checkpoints are loaded as the models that were exported, without other packages, or rejected."""

import json
import shutil
import sys
from dataclasses import replace

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
from mowa.types import Scheme
from tests.checkpoints import clip, tiny
from tests.quantized import SCHEMES, SHORT_FRONT_END, equal_linears, quantized_linears, tiny_quantized


@pytest.fixture(scope="module", params=list(SCHEMES))
def exported(request, tmp_path_factory):
    """A quantized model and the folder that it was exported to."""
    root = tmp_path_factory.mktemp("exported")
    model = tiny_quantized(root / "base", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "find_spec", lambda name: None)
        return model, protocol.export(model, "safetensors", root / "out").folder


@pytest.fixture
def without_packages(monkeypatch):
    """The packages that quantized these checkpoints cannot be imported."""
    for package in ("compressed_tensors", "bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "find_spec", lambda name: None)
    return protocol.export(tiny_quantized(tmp_path / "base", "int8-dynamic"), "safetensors", tmp_path / "out").folder


def emissions(model, **options):
    samples = audio.normalize(clip(3, 12_000))
    return mowa.open_engine(model, device="cpu", **options).emissions([samples])[0]


def change(folder, name, **values):
    data = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps(data))


def test_quantized_weights_are_restored_exactly(exported, without_packages):
    model, folder = exported
    loaded = mowa.load(str(folder))
    assert loaded.scheme == model.scheme
    assert (loaded.vocabulary, loaded.preprocessing) == (model.vocabulary, model.preprocessing)
    assert type(loaded.net) is type(model.net)
    before, after = quantized_linears(model.net), quantized_linears(loaded.net)
    dequantized = {name for name in before if "feature_projection" in name and name not in after}
    assert not dequantized or model.scheme.weights == "nf4" or not model.scheme.symmetric
    assert all(equal_linears(before[name], after[name]) for name in before.keys() - dequantized)
    state_dict = loaded.net.state_dict()
    for name, value in model.net.state_dict().items():
        if not any(name.startswith(f"{linear}.") for linear in before):
            assert torch.equal(state_dict[name], value), name
    assert {p.dtype for p in loaded.net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.net.parameters())
    assert not loaded.net.training


def test_log_probabilities_are_those_of_the_exported_model(exported):
    model, folder = exported
    samples = torch.from_numpy(clip(1, 9_000))[None]
    with torch.inference_mode():
        ours, theirs = (net(samples).logits.log_softmax(-1) for net in (load(str(folder)).net, model.net))
    is_dequantized = model.scheme.weights == "nf4" or not model.scheme.symmetric  # of the feature projection
    assert (ours - theirs).abs().max() <= (1e-3 if is_dequantized else 0)


def test_without_a_manifest_the_scheme_is_inferred(exported, tmp_path):
    model, folder = exported
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "mowa.json").unlink()
    found, expected = load(str(tmp_path / "bare")).scheme, model.scheme
    assert (found.name, found.weights, found.activations) == (expected.name, expected.weights, expected.activations)
    assert (found.group_size, found.symmetric) == (expected.group_size, expected.symmetric)


@pytest.mark.parametrize(("name", "weights"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_half_precision_keeps_its_scheme(tmp_path, name, weights):
    model = replace(load(str(tiny(tmp_path / "base", **SHORT_FRONT_END))), scheme=Scheme(name, weights))
    for parameter in model.net.parameters():
        parameter.data = parameter.data.to(getattr(torch, weights)).float()
    folder = protocol.export(model, "safetensors", tmp_path / "out").folder
    loaded = load(str(folder))
    assert loaded.scheme == model.scheme
    assert loaded.net.dtype is torch.float32
    assert all(torch.equal(p, q) for p, q in zip(loaded.net.parameters(), model.net.parameters(), strict=True))


def test_other_checkpoints_are_float32(tmp_path):
    assert load(str(tiny(tmp_path, **SHORT_FRONT_END))).scheme.name == "float32"


def test_the_engine_runs_it_in_int8(out):
    engine = mowa.open_engine(load(str(out)), device="cpu")
    assert (engine.scheme, engine.dtype) == ("int8-dynamic", "int8")
    assert engine.plan is not None
    dequantized = emissions(load(str(out)), dtype="float32")
    assert 0 < np.abs(emissions(load(str(out))) - dequantized).max() < 1


def test_mowa_transcribe_takes_the_folder(out, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", clip(0, 20_000), 16_000)
    with pytest.raises(SystemExit) as end:
        main(["transcribe", str(tmp_path / "a.wav"), "--vad-threshold", "0", "-m", str(out)])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip()


def test_it_cannot_be_fine_tuned(out):
    message = "is quantized and cannot be fine-tuned; start from the full-precision checkpoint"
    with pytest.raises(ModelError, match=message):
        load(str(out), require_head=False)


def test_other_weights_may_be_in_half_precision(out):
    net = load(str(out), dtype="bfloat16").net
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert all(linear.scale.dtype is torch.float32 for linear in quantized_linears(net).values())
    with torch.inference_mode():
        assert net(torch.zeros(1, 8_000, dtype=torch.bfloat16)).logits.isfinite().all()


UNSUPPORTED = [
    ({"quant_method": "gptq", "bits": 4}, "method gptq is not supported; use the full-precision checkpoint"),
    ({"bits": 4}, "quantization method None is not supported"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "of bitsandbytes only nf4"),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
         "bnb_4bit_use_double_quant": True},
        "of bitsandbytes only nf4 without double quantization",
    ),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "of compressed-tensors only int8"),
]  # fmt: skip


@pytest.mark.parametrize(("quantization_config", "message"), UNSUPPORTED)
def test_unsupported_quantization_is_rejected(tmp_path, quantization_config, message):
    folder = tiny(tmp_path, **SHORT_FRONT_END)
    change(folder, "config.json", quantization_config=quantization_config)
    with pytest.raises(ModelError, match=message):
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
        ("weights", {"actorder": "group"}),
    ],
)
def test_unsupported_compressed_tensors_are_rejected(out, part, values):
    quantization_config = json.loads((out / "config.json").read_text())["quantization_config"]
    for group in quantization_config["config_groups"].values():
        if group[part]:
            group[part] |= values
    change(out, "config.json", quantization_config=quantization_config)
    with pytest.raises(ModelError, match="of compressed-tensors only int8 and int4"):
        load(str(out))


def load_error(out, **changes):
    """Change weights (None: remove them), delete the manifest with its checksums, and return the error of loading."""
    tensors = {name: changes.get(name, value) for name, value in load_file(out / "model.safetensors").items()}
    tensors |= {name: value for name, value in changes.items() if name not in tensors}
    save_file({name: value for name, value in tensors.items() if value is not None}, out / "model.safetensors")
    (out / "mowa.json").unlink()
    with pytest.raises(ModelError) as raised:
        load(str(out))
    return str(raised.value)


def test_weights_that_do_not_match_are_rejected(out):
    q = "wav2vec2.encoder.layers.0.attention.q_proj"
    copies = [shutil.copytree(out, out.parent / f"copy{index}") for index in range(6)]
    message = load_error(copies[0], **{f"{q}.weight": torch.zeros(64, 63, dtype=torch.int8)})
    assert f"do not fit config.json: unexpected linear {q} [64, 63]" in message
    message = load_error(copies[1], **{f"{q}.weight": None})
    assert f"the quantized weights of {q} are damaged: 'weight'" in message
    message = load_error(copies[2], **{f"{q}.weight_scale": torch.ones(64, 2)})
    assert "2 scales per row do not fit 64 columns in groups of 64" in message
    assert "lm_head.bias is missing" in load_error(copies[3], **{"lm_head.bias": None})
    assert "no.place is unexpected" in load_error(copies[4], **{"no.place": torch.zeros(1)})
    message = load_error(copies[5], **{"lm_head.bias": torch.zeros(1)})
    assert "do not fit config.json: size mismatch for lm_head.bias" in message


def test_missing_and_truncated_files_are_rejected(out):
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


def test_an_incomplete_manifest_is_rejected(out):
    manifest = json.loads((out / "mowa.json").read_text())
    del manifest["scheme"]
    (out / "mowa.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"mowa\.json is damaged \('scheme' is missing\)"):
        load(str(out))


def test_an_export_of_an_older_version_is_rejected(out):
    manifest = json.loads((out / "mowa.json").read_text())
    manifest["format"], manifest["kind"] = 2, manifest["format"]
    del manifest["format_version"]
    (out / "mowa.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"written by an older version of mowa .*: export the model again"):
        load(str(out))
