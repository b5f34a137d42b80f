"""CTranslate2 says what the net says, or the export is refused; its engine and its example read the same text."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mowa
from mowa.data import audio
from mowa.engines import protocol
from mowa.engines.protocol import BatchPolicy
from mowa.errors import MissingDependency, ModelError
from mowa.exporters.protocol import export
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.weights import quantize
from mowa.types import Scheme
from tests.checkpoints import clip, tiny

pytest.importorskip("ctranslate2")
from mowa.engines import ctranslate2 as engines
from mowa.exporters import ctranslate2, verify

EXAMPLES = Path(__file__).parents[2] / "examples"
STOCK = {
    "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
}  # fmt: skip
LENGTHS = [400, 401, 4_097, 20_000]
INT8 = Scheme("int8-dynamic", "int8", "dynamic")
HALVES = [Scheme("fp16", "float16"), Scheme("bf16", "bfloat16")]


def stock(folder, family="wav2vec2", **changes):
    """A net of the one shape that CTranslate2 has, but small."""
    return tiny(folder, family, **STOCK | changes)


def narrowed(model):
    """`model` in int8-dynamic, all linears of its blocks."""
    net = model.net
    for name, module in list(net.named_modules()):
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            net.set_submodule(name, QuantizedLinear(quantize(module.weight.detach(), 8), module.bias, "dynamic"))
    return replace(model, scheme=INT8)


def halved(model, scheme):
    with torch.no_grad():
        for weight in model.net.parameters():
            weight.copy_(weight.to(getattr(torch, scheme.weights)))
    return replace(model, scheme=scheme)


@pytest.fixture(scope="module", params=["wav2vec2", "hubert"])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = stock(root / "base", request.param)
    return base, export(mowa.load(str(base)), "ctranslate2", root / "out").folder


def test_any_length_gives_what_transformers_gives(made):
    base, out = made
    net, engine = mowa.load(str(base)).net.double().eval(), engines.open_engine(out)
    assert (engine.name, engine.device, engine.dtype, engine.scheme) == ("ctranslate2", "cpu", "float32", "float32")
    for index, length in enumerate(LENGTHS):
        clips = [audio.normalize(clip(index + row, length)) for row in range(2)]
        with torch.inference_mode():
            expected = net(torch.from_numpy(np.stack(clips)).double()).logits.log_softmax(-1).numpy()
        np.testing.assert_allclose(np.stack(engine.emissions(clips)), expected, atol=1e-4)


def test_the_folder_says_what_it_is(made):
    base, out = made
    loaded, engine = mowa.load(str(base)), engines.open_engine(out)
    assert (engine.vocabulary, engine.preprocessing) == (loaded.vocabulary, loaded.preprocessing)
    assert engine.config.conv_stride == loaded.net.config.conv_stride
    note = json.loads((out / "mowa.json").read_text())
    assert note["compared"]["farthest"] < 1e-4
    assert note["details"] == {
        "model": "ctranslate2", "quantization": "float32", "computes": "float32", "masked": False,
    }  # fmt: skip
    assert set(note["files"]) == {f"ctranslate2/{name}" for name in ("model.bin", "config.json", "vocabulary.json")}
    assert json.loads((out / "config.json").read_text())["model_type"] == loaded.family.name


def test_it_transcribes_what_the_native_engine_does(made):
    base, out = made
    file = EXAMPLES / "dzien-dobry.flac"
    theirs = mowa.transcribe(file, str(base), device="cpu", dtype="float32").text
    settings = mowa.engines.settings.Settings()
    ours = next(iter(mowa.iter_transcripts([file], engines.open_engine(out), settings))).text
    assert ours == theirs
    assert len(theirs) > 20
    run = [sys.executable, str(EXAMPLES / "run_ctranslate2.py"), str(out), str(file)]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == theirs


def test_clips_that_may_not_share_are_refused(made):
    engine = engines.open_engine(made[1])
    assert engine.batch_policy is BatchPolicy.EQUAL_LENGTH
    clips = [clip(0, 4_000), clip(1, 4_001), clip(2, 4_000)]
    with pytest.raises(ValueError, match="may not share"):
        engine.emissions(clips)
    for group in protocol.batch_by_length([len(one) for one in clips], 60_000, engine.batch_policy):
        for index, scores in zip(group, engine.emissions([clips[i] for i in group]), strict=True):
            np.testing.assert_allclose(scores, engine.emissions([clips[index]])[0], atol=1e-4)


def test_int8_is_smaller_and_says_how_often_it_agrees(tmp_path, caplog):
    base = stock(tmp_path / "base")
    with caplog.at_level("INFO", "mowa"):
        narrow = export(narrowed(mowa.load(str(base))), "ctranslate2", tmp_path / "int8")
    whole = export(mowa.load(str(base)), "ctranslate2", tmp_path / "float32")
    assert verify.MIN_AGREEMENT <= narrow.agreement < 1
    assert f"{narrow.agreement * 100:.1f} % of frames" in caplog.text
    assert narrow.details["computes"] == "int8_float32"
    assert narrow.size_bytes < 0.4 * whole.size_bytes
    engine = engines.open_engine(narrow.folder)
    assert (engine.dtype, engine.scheme, engine.batch_policy) == ("int8", "int8-dynamic", BatchPolicy.SINGLE)
    with pytest.raises(ModelError, match="computes in int8"):
        engines.open_engine(narrow.folder, dtype="float32")
    with pytest.raises(ModelError, match="dtype 'bfloat16' is not one of"):
        engines.open_engine(narrow.folder, dtype="bfloat16")


@pytest.mark.parametrize("scheme", HALVES, ids=lambda scheme: scheme.name)
def test_halves_are_kept_and_multiplied_wide(tmp_path, scheme):
    model = halved(mowa.load(str(stock(tmp_path / "base"))), scheme)
    made = export(model, "ctranslate2", tmp_path / "out")
    assert made.details["quantization"] == scheme.weights
    assert made.size_bytes < 0.55 * 4 * sum(weight.numel() for weight in model.net.parameters())
    engine = engines.open_engine(made.folder)
    assert (engine.dtype, engine.batch_policy) == ("float32", BatchPolicy.EQUAL_LENGTH)
    with torch.inference_mode():
        expected = model.net(torch.from_numpy(clip(0, 8_000))[None]).logits[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(engine.emissions([clip(0, 8_000)])[0], expected, atol=0.02)


def test_the_model_is_left_as_it_was(tmp_path):
    model = narrowed(mowa.load(str(stock(tmp_path / "base"))))
    sound = torch.from_numpy(clip(0, 5_000))[None]
    before, names, state = (
        model.net(sound).logits,
        [name for name, _ in model.net.named_modules()],
        torch.get_rng_state(),
    )
    export(model, "ctranslate2", tmp_path / "out")
    assert torch.equal(model.net(sound).logits, before)
    assert [name for name, _ in model.net.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}, r"conv_kernel \[10, 8, 8\]"),
        ({"num_conv_pos_embeddings": 16}, "num_conv_pos_embeddings 16, and CTranslate2 computes only 128"),
        ({"num_conv_pos_embedding_groups": 8}, "num_conv_pos_embedding_groups 8"),
        ({"norm": "group"}, "feat_extract_norm group"),
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm False"),
        ({"conv_bias": False}, "conv_bias False"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation relu"),
        ({"layer_norm_eps": 1e-2}, r"layer_norm_eps 0\.01"),
        ({"adapter_attn_dim": 4}, "adapter_attn_dim 4"),
        ({"family": "wavlm"}, "no net like wavlm's"),
    ],
)
def test_other_nets_are_refused(tmp_path, changes, said):
    model = mowa.load(str(stock(tmp_path / "base", **changes)))
    with pytest.raises(ModelError, match=f"cannot be written as ctranslate2: .*{said}.*; use onnx"):
        export(model, "ctranslate2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_bundled_net_is_refused():
    assert "conv_kernel [400, 1, 3, 3]" in ctranslate2.unsupported_reason(mowa.load("pl-tiny"))


@pytest.mark.parametrize(
    ("scheme", "instead"),
    [
        (Scheme("int8-static", "int8", "static"), "anew each time; use int8-dynamic"),
        (Scheme("int8-weight", "int8"), "with int8 inputs alone; use int8-dynamic"),
        (Scheme("int4-weight", "int4", group_size=32), "four bits for these nets; use int8-dynamic"),
        (Scheme("nf4", "nf4", group_size=64), "no weights in nf4; use int8-dynamic"),
        (Scheme("mixed", "mixed", "dynamic", group_size=32), "one width for all layers; use int8-dynamic"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_schemes_are_refused(tmp_path, scheme, instead):
    model = mowa.load(str(stock(tmp_path / "base")))
    assert not ctranslate2.unsupported_reason(model)
    assert instead in ctranslate2.unsupported_reason(replace(model, scheme=scheme))


def test_what_is_not_the_net_leaves_nothing(tmp_path, monkeypatch):
    model, convert = mowa.load(str(stock(tmp_path / "base"))), ctranslate2._convert

    def broken(net, *rest):
        net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight * 1.01, requires_grad=False)
        convert(net, *rest)
        net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight / 1.01, requires_grad=False)

    monkeypatch.setattr(ctranslate2, "_convert", broken)
    with pytest.raises(ModelError, match="is not what the net is"):
        export(model, "ctranslate2", tmp_path / "out")
    monkeypatch.setattr(verify, "MIN_AGREEMENT", 1.1)
    with pytest.raises(ModelError, match="does not bear int8-dynamic as CTranslate2's int8_float32"):
        export(narrowed(model), "ctranslate2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_not_the_nets_is_seen(tmp_path, monkeypatch):
    """Were a size forgotten in `STOCK`, the comparison would see it."""
    model = mowa.load(str(stock(tmp_path / "base", num_conv_pos_embeddings=15)))
    monkeypatch.setattr(ctranslate2, "REQUIRED_CONFIG", {})
    with pytest.raises(ModelError, match=r"CTranslate2 cannot run .*base: .*; export it as onnx"):
        export(model, "ctranslate2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    model = mowa.load(str(stock(tmp_path / "base")))
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(MissingDependency, match=r"needs ctranslate2: pip install 'mowa\[ctranslate2\]'"):
        export(model, "ctranslate2", tmp_path / "out")


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no export"):
        engines.open_engine(stock(tmp_path / "base"))
