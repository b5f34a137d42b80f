"""Exports against stock transformers, read by ONNX Runtime alone; and what becomes of an export that is not the net."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC, AutoTokenizer, Wav2Vec2FeatureExtractor

import mowa
from mowa import exporters as exporting
from mowa.adapters import checkpoint, merge
from mowa.data import audio
from mowa.errors import DataError, MissingDependency, ModelError
from mowa.exporters import manifest, verify
from mowa.exporters.onnx import exporter
from mowa.exporters.prepare import prepare_for_export
from mowa.quantization import quantize
from tests.adapters.made import OTHER, saved
from tests.checkpoints import KINDS, clip
from tests.checkpoints import tiny as whole_tiny

pytest.importorskip("onnxscript")
import onnxruntime

QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}


def tiny(folder, **changes):
    """Fewer convolutions with the hop of seven: quicker to trace."""
    return whole_tiny(folder, **QUICK | changes)


LENGTHS = [400, 401, 4_097, 20_000]


def write(model, out, **options):
    return exporting.export(model, "onnx", out, **options).folder


def run(folder, clips):
    """Logits of a batch by what the folder says, padded with zeros."""
    note = json.loads((folder / "mowa.json").read_text())["details"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    longest = max(map(len, clips))
    feed = {"input_values": np.stack([np.pad(one, (0, longest - len(one))) for one in clips])}
    if note["masked"]:
        feed["attention_mask"] = np.stack([(np.arange(longest) < len(one)).astype(np.int64) for one in clips])
    return session.run(["logits"], feed)[0]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("-".join(request.param))
    base = whole_tiny(root / "base", *request.param)
    return base, write(mowa.load(str(base)), root / "out")


def test_any_length_and_any_batch_give_what_transformers_gives(made):
    base, out = made
    net = AutoModelForCTC.from_pretrained(base).double().eval()
    clips = [audio.normalize(clip(index, length)) for index, length in enumerate(LENGTHS)]
    masked = json.loads((out / "mowa.json").read_text())["details"]["masked"]
    assert masked == (net.config.feat_extract_norm == "layer")
    together = run(out, clips) if masked else [None] * len(clips)
    for one, row in zip(clips, together, strict=True):
        with torch.inference_mode():
            expected = net(torch.from_numpy(one).double()[None]).logits[0].numpy()
        np.testing.assert_allclose(run(out, [one])[0], expected, atol=1e-4)
        if row is not None:
            np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-4)


@pytest.mark.slow
def test_pl_tiny_gives_its_probabilities_for_any_lengths_and_batches(tmp_path):
    """To 1e-4, of the net in float64. Its rarest letters (e⁻²⁰) are as far from that in torch's own float32."""
    model = mowa.load("pl-tiny")
    out, net = write(model, tmp_path / "out"), copy.deepcopy(model.net).double()
    sound, chance = verify.preprocess(model, audio.load_audio(verify.SAMPLE, 16_000)), np.random.default_rng(8)
    for rows in (1, 2, 3, 5):
        starts = chance.integers(0, 90_000, rows)
        clips = [sound[start : start + chance.integers(1_040, 90_000)] for start in starts]
        for one, row in zip(clips, run(out, clips), strict=True):
            with torch.inference_mode():
                meant = net(torch.from_numpy(one).double()[None]).logits[0].softmax(-1)
            said = torch.from_numpy(row[: len(meant)]).double().softmax(-1)
            torch.testing.assert_close(said, meant, rtol=0, atol=1e-4)


def test_the_folder_says_what_it_is(made):
    base, out = made
    found = exporting.read_artifact(out)
    loaded = mowa.load(str(base))
    assert (found.format, found.scheme.name, found.family) == ("onnx", "float32", loaded.family.name)
    assert (found.vocabulary, found.preprocessing) == (loaded.vocabulary, loaded.preprocessing)
    assert found.config.conv_stride == loaded.net.config.conv_stride
    assert found.origin.source == str(base)
    note = json.loads((out / "mowa.json").read_text())
    assert note["compared"]["farthest"] < 1e-4
    assert set(note["files"]) == {"model.onnx", "model.onnx.data"}
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert Wav2Vec2FeatureExtractor.from_pretrained(out).do_normalize == loaded.preprocessing.normalize


def test_the_model_is_left_as_it_was(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base")))
    sound = torch.from_numpy(clip(0, 5_000))[None]
    before, how = model.net(sound).logits, model.net.config._attn_implementation
    names = list(model.net.state_dict())
    write(model, tmp_path / "out")
    assert torch.equal(model.net(sound).logits, before)
    assert model.net.config._attn_implementation == how
    assert list(model.net.state_dict()) == names


@pytest.mark.parametrize("kind", ["lora", "adapters"])
def test_an_adapter_is_part_of_it(tmp_path, kind):
    base = tiny(tmp_path / "base")
    saved(base, kind, tmp_path / "adapter", words=OTHER)
    adapted = checkpoint.load_adapter(mowa.load(str(base)), tmp_path / "adapter")
    out = write(adapted, tmp_path / "out")
    sound = clip(0, 8_000)
    with torch.inference_mode():
        expected = merge.merge_adapter(adapted).net(torch.from_numpy(sound)[None]).logits[0].numpy()
    np.testing.assert_allclose(run(out, [sound])[0], expected, atol=1e-4)
    assert exporting.read_artifact(out).vocabulary == OTHER


def test_half_precision_is_written_as_float32(tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base")), dtype="bfloat16")
    out = write(model, tmp_path / "out")
    with torch.inference_mode():
        expected = model.net.float()(torch.from_numpy(clip(0, 5_000))[None]).logits[0].numpy()
    np.testing.assert_allclose(run(out, [clip(0, 5_000)])[0], expected, atol=1e-4)


WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_conv_pos_embedding_groups": 4}
SCHEMES = ("fp16", "bf16", "int8-dynamic", "int8-static", "int8-weight", "int4-weight", "int4-weight+asym+64", "nf4")
AT_MOST = {"fp16": 0.51, "bf16": 0.51, "int8": 0.32, "int4": 0.26, "nf4": 0.26}  # vectors and graphs weigh here
# Weights are on their grids already, but for positions, whose weight norm is multiplied in and rounded again. Inputs in
# eight bits: a rounding that tips moves what comes after.
APART = {"bf16": (0.1, 0.01), "int8": (0.5, 0.05)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("none")
    model = mowa.load(str(tiny(folder / "base", **WIDE | {"num_hidden_layers": 2, "conv_dim": (64,) * 3})))
    return model, write(model, folder / "float32")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_says_what_the_shrunk_net_says(wide, tmp_path, scheme):
    model, whole = wide
    sounds = [audio.normalize(clip(index, 16_000)) for index in range(4)]
    shrunk = quantize(model, scheme, sounds)
    out = write(shrunk, tmp_path / "out")
    found = manifest.read_artifact(out)
    assert found.scheme == shrunk.scheme
    net = prepare_for_export(shrunk)
    for sound in (sounds[0], audio.normalize(clip(9, 4_097))):
        with torch.inference_mode():
            expected = net(torch.from_numpy(sound)[None]).logits[0].log_softmax(-1).numpy()
        logits = torch.from_numpy(run(out, [sound])[0]).log_softmax(-1).numpy()
        most, mean = APART.get(scheme[:4], (1e-2, 1e-3))
        assert np.abs(logits - expected).max() < most
        assert np.abs(logits - expected).mean() < mean
        assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    size = manifest.read_artifact(whole).size_bytes
    assert found.size_bytes < next(share for kind, share in AT_MOST.items() if scheme.startswith(kind)) * size


def test_narrow_weights_share_batches_as_wide_ones_do(wide, tmp_path):
    """int4 and halves are multiplied in float32, so padding changes nothing."""
    model, _ = wide
    out = write(quantize(model, "int4-weight"), tmp_path / "out")
    clips = [audio.normalize(clip(index, length)) for index, length in enumerate(LENGTHS)]
    for one, row in zip(clips, run(out, clips), strict=True):
        alone = run(out, [one])[0]
        np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-4)


def test_the_graph_alone_says_how_it_is_run(made):
    _, out = made
    found = manifest.read_artifact(out)
    said = onnxruntime.InferenceSession(str(out / "model.onnx")).get_modelmeta().custom_metadata_map
    assert tuple(json.loads(said["vocabulary"])) == found.vocabulary.tokens
    assert (int(said["blank"]), int(said["delimiter"])) == (found.vocabulary.blank, found.vocabulary.delimiter)
    assert (said["sample_rate"], said["normalize"], said["scheme"]) == ("16000", "1", "float32")
    assert bool(int(said["masked"])) == found.details["masked"]


def test_the_vocabulary_is_there_as_others_read_it(made):
    _, out = made
    lines = (out / "tokens.txt").read_text(encoding="utf-8").splitlines()
    words = manifest.read_artifact(out).vocabulary
    assert len(lines) == len(words)
    assert lines[words.blank] == f"<blk> {words.blank}"
    assert lines[words.delimiter] == f"▁ {words.delimiter}"


def test_a_mask_can_be_left_out_and_operators_chosen(tmp_path):
    out = write(mowa.load(str(tiny(tmp_path / "base"))), tmp_path / "out", masked=False, opset=18)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert [one.name for one in session.get_inputs()] == ["input_values"]
    assert manifest.read_artifact(out).details["opset"] == 18
    with pytest.raises(ModelError, match="opset 7 is not among 18 to 23"):
        write(mowa.load(str(tmp_path / "base")), tmp_path / "other", opset=7)


def test_what_is_not_the_net_leaves_nothing(tmp_path, monkeypatch):
    model = mowa.load(str(tiny(tmp_path / "base")))
    trace = exporter.export_graph

    def broken(graph, *rest):
        head = graph.net.lm_head
        head.weight = torch.nn.Parameter(head.weight * 1.01, requires_grad=False)
        trace(graph, *rest)
        head.weight = torch.nn.Parameter(head.weight / 1.01, requires_grad=False)

    monkeypatch.setattr(exporter, "export_graph", broken)
    with pytest.raises(ModelError, match="is not what the net is"):
        write(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_says_other_letters_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "MIN_AGREEMENT", 1.1)
    shrunk = quantize(mowa.load(str(tiny(tmp_path / "base"))), "int8-dynamic")
    with pytest.raises(ModelError, match="does not bear int8-dynamic"):
        write(shrunk, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="is there already"):
        write(mowa.load(str(tiny(tmp_path / "base"))), tmp_path / "out")


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    base = tiny(tmp_path / "base")
    with pytest.raises(ModelError, match="holds no export"):
        exporting.read_artifact(base)
    saved(base, "lora", tmp_path / "adapter")
    with pytest.raises(ModelError, match="is lora of format 1, not an export of format 2"):
        exporting.read_artifact(tmp_path / "adapter")
    out = write(mowa.load(str(base)), tmp_path / "out")
    weights = out / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx\.data is missing or damaged"):
        exporting.read_artifact(out)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data is missing or damaged"):
        exporting.read_artifact(out)
    (out / "mowa.json").write_text(json.dumps({"format": 2, "kind": "onnx", "files": {}}))
    with pytest.raises(ModelError, match="is damaged: it does not say 'vocabulary'"):
        exporting.read_artifact(out)


def test_an_export_is_no_model_to_change(tmp_path):
    out = write(mowa.load(str(tiny(tmp_path / "base"))), tmp_path / "out")
    with pytest.raises(ModelError, match="was exported as onnx, to be run as it is: name the model it was made of"):
        mowa.load(str(out))


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    model = mowa.load(str(tiny(tmp_path / "base")))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match=r"ONNX needs onnxscript: pip install 'mowa\[onnx\]'"):
        write(model, tmp_path / "out")


def test_the_digest_is_of_all_that_makes_the_numbers(tmp_path):
    base = tiny(tmp_path / "base")
    saved(base, "lora", tmp_path / "adapter")
    one, same = mowa.load(str(base)), mowa.load(str(base))
    assert manifest.model_sha256(one) == manifest.model_sha256(same)
    assert manifest.model_sha256(checkpoint.load_adapter(one, tmp_path / "adapter")) != manifest.model_sha256(one)
    with torch.no_grad():
        next(same.net.parameters()).view(-1)[0] += 1e-6
    assert manifest.model_sha256(one) != manifest.model_sha256(same)


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.tensors, "rewrite_graphs", full)
    with pytest.raises(DataError, match=r"the disk of .*out is full .*nothing was left there"):
        write(mowa.load(str(tiny(tmp_path / "base"))), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_no_number_agrees_with_nothing():
    """torch finds the first of no numbers likeliest, and that is often the blank."""
    truth = torch.zeros(5, 3)
    truth[:, 0] = 9
    farthest, agreeing = verify.compare_logits([torch.full((5, 3), torch.nan)], [truth])
    assert (farthest, agreeing) == (float("inf"), 0)
