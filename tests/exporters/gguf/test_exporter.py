"""GGUF files of language models: schemes, streaming, comparison, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

import mowa
from mowa.errors import DataError, MissingDependency, ModelError
from mowa.exporters.gguf import convert
from mowa.exporters.gguf.mixes import FILE_TYPES
from mowa.exporters.gguf.verify import LIMITS, Limits
from mowa.exporters.registry import GGUF_SCHEMES
from mowa.io.gguf import open_writer, read_gguf
from mowa.kernels.quant.gguf_blocks import decode
from tests.exporters.gguf.tiny_lora import add_lora, save
from tests.exporters.gguf.tokenizer.trained import CHATML, GPT2_STEP, train_byte_level
from tests.families.tiny import tiny

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def save_model(folder, family="llama", *, dtype=torch.float32, extra_tokens=0, **changes):
    """Save a random net and a byte-level tokenizer that was trained for it into `folder`, and return the folder."""
    tokenizer = train_byte_level([GPT2_STEP])
    tokenizer.chat_template = CHATML
    if extra_tokens:
        tokenizer.add_tokens([f"<|extra_{number}|>" for number in range(extra_tokens)], special_tokens=True)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    net = tiny(family, **WIDE | ids | {"vocab_size": 700} | changes)
    if extra_tokens:
        net.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        net.get_output_embeddings().weight *= 0.2  # logits of the size that trained models have
    net.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gguf") / "tiny-llama", dtype=torch.bfloat16)


def read_files(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.gguf")}


@pytest.fixture(scope="module")
def exported(checkpoint):
    """An export in four schemes, from disk."""
    out = checkpoint.parent / "out"
    return mowa.export(checkpoint, "gguf", out, scheme=["f16", "Q8_0", "q4_k_m", "f16", "bf16"])


def test_schemes_are_files_that_pass(exported):
    assert exported.files == tuple(f"tiny-llama-{scheme}.gguf" for scheme in ("BF16", "F16", "Q4_K_M", "Q8_0"))
    assert exported.format == "gguf"
    assert exported.agreement == 1
    found = json.loads((exported.folder / "report.json").read_text())
    assert [one["scheme"] for one in found["files"]] == ["f16", "q8_0", "q4_k_m", "bf16"]
    assert all(one["passed"] for one in found["files"])
    assert found["tokenizer"]["texts_compared"] > 2000
    kl = {one["scheme"]: one["outputs"][0]["kl"] for one in found["files"]}
    assert kl["bf16"] < 1e-9 < kl["q8_0"] < kl["q4_k_m"]
    sizes = {one["scheme"]: one["size_bytes"] for one in found["files"]}
    assert all((exported.folder / one["name"]).stat().st_size == one["size_bytes"] for one in found["files"])
    assert sizes["q4_k_m"] < sizes["q8_0"] < sizes["f16"] == sizes["bf16"]


def test_files_say_what_they_hold(exported):
    file = read_gguf(exported.folder / "tiny-llama-Q4_K_M.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["general.name"] == "tiny-llama"
    assert file.metadata["general.file_type"] == 15
    assert file.metadata["tokenizer.chat_template"] == CHATML
    types = {name: info.type_name for name, info in file.tensors.items()}
    assert types["blk.0.attn_q.weight"] == "q4_k"
    assert types["output.weight"] == "q6_k"
    assert types["output_norm.weight"] == "f32"


def test_weights_in_memory_give_the_same_files(checkpoint, exported, tmp_path):
    loaded = mowa.load(checkpoint)
    mowa.export(loaded, "gguf", tmp_path / "out", scheme=["q4_k_m", "f16"], skip_outputs=True)
    expected = read_files(exported.folder)
    found = read_files(tmp_path / "out")
    assert len(found) == 2
    assert all(expected[name] == content for name, content in found.items())


def test_pieces_of_a_tensor_give_the_same_file(checkpoint, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK", 1000)
    mowa.export(checkpoint, "gguf", tmp_path / "out", scheme="q4_k_m", skip_outputs=True)
    found = read_files(tmp_path / "out")
    assert found == {"tiny-llama-Q4_K_M.gguf": read_files(exported.folder)["tiny-llama-Q4_K_M.gguf"]}


def test_no_weights_are_in_memory(checkpoint, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mowa.loading.causal._load_net", fail)
    artifact = mowa.export(checkpoint, "gguf", tmp_path / "out", skip_outputs=True)
    assert artifact.files == ("tiny-llama-Q8_0.gguf",)
    assert artifact.unverified_reason == "outputs were not compared"


def test_one_file(checkpoint, exported, tmp_path):
    artifact = mowa.export(checkpoint, "gguf", tmp_path / "new" / "mine.gguf", scheme="q8_0")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"mine.gguf", "mine.report.json", "mine.Modelfile"}
    assert artifact.files == ("mine.gguf",)
    assert artifact.size_bytes == (tmp_path / "new" / "mine.gguf").stat().st_size
    assert (tmp_path / "new" / "mine.gguf").read_bytes() == read_files(exported.folder)["tiny-llama-Q8_0.gguf"]
    assert "FROM ./mine.gguf" in (tmp_path / "new" / "mine.Modelfile").read_text()
    with pytest.raises(DataError, match=r"mine\.gguf already exists"):
        mowa.export(checkpoint, "gguf", tmp_path / "new" / "mine.gguf")


def test_tensor_types(checkpoint, tmp_path):
    options = {"scheme": "q4_k_m", "tensor_types": ["attn_v=q8_0", r"blk\.0\.ffn=f16"], "skip_outputs": True}
    mowa.export(checkpoint, "gguf", tmp_path / "out", **options)
    file = read_gguf(next((tmp_path / "out").glob("*.gguf")))
    types = {name: info.type_name for name, info in file.tensors.items()}
    assert {types[f"blk.{block}.attn_v.weight"] for block in (0, 1)} == {"q8_0"}
    assert types["blk.0.ffn_up.weight"] == "f16"
    assert types["blk.1.ffn_up.weight"] == "q4_k"
    with pytest.raises(ModelError, match="'attn_x' applies to no tensor: none that can be quantized"):
        mowa.export(checkpoint, "gguf", tmp_path / "other", tensor_types=["attn_x=q6_k"])


def test_importance_from_text(checkpoint, exported, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    stages = {}
    mowa.export(
        *(checkpoint, "gguf", tmp_path / "out"),
        **{"scheme": "q4_k_m", "imatrix": text, "check_data": text},
        on_progress=lambda stage, fraction: stages.setdefault(stage, []).append(fraction),
    )
    file = read_gguf(next((tmp_path / "out").glob("*.gguf")))
    assert file.metadata["quantize.imatrix.file"] == "text.txt"
    assert file.metadata["quantize.imatrix.entries_count"] > 0
    plain = read_gguf(exported.folder / "tiny-llama-Q4_K_M.gguf")
    name = "blk.0.attn_q.weight"
    assert (file.blocks(name) != plain.blocks(name)).any()
    assert {"importance matrix", "writing", "comparing"} <= set(stages)
    assert all(found == sorted(found) and found[-1] == 1 for found in stages.values())


def test_added_tokens_and_resized_embeddings(tmp_path):
    folder = save_model(tmp_path / "tuned", extra_tokens=3)
    artifact = mowa.export(folder, "gguf", tmp_path / "out", scheme=["f16", "q8_0"])
    file = read_gguf(artifact.folder / "tuned-F16.gguf")
    assert file.metadata["tokenizer.ggml.tokens"][-3:] == [f"<|extra_{number}|>" for number in range(3)]
    assert file.tensors["token_embd.weight"].shape == (703, 256)


def test_lora_is_merged(checkpoint, tmp_path):
    base = mowa.load(checkpoint)
    net = add_lora(base.net)
    artifact = mowa.export(
        str(checkpoint), "gguf", tmp_path / "out", scheme="f32", adapter=save(net, tmp_path / "adapter")
    )
    file = read_gguf(artifact.folder / artifact.files[0])
    weight = net.merge_and_unload().model.layers[0].mlp.down_proj.weight.detach()
    found = decode(torch.from_numpy(file.blocks("blk.0.ffn_down.weight").copy()), "f32")
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, base.net.model.layers[0].mlp.down_proj.weight)


def test_an_adapter_by_name_and_in_memory_gives_the_same_file(checkpoint, tmp_path, monkeypatch):
    adapter = save(add_lora(mowa.load(checkpoint).net), tmp_path / "adapter")
    in_memory = mowa.load(checkpoint, adapter=adapter)
    mowa.export(in_memory, "gguf", tmp_path / "memory", scheme="q8_0")
    artifact = mowa.export(str(checkpoint), "gguf", tmp_path / "disk", scheme="q8_0", adapter=adapter)
    assert json.loads((artifact.folder / "report.json").read_text())["files"][0]["outputs"][0]["kl"] < 5e-3
    one, other = (next((tmp_path / name).glob("*.gguf")) for name in ("memory", "disk"))
    assert one.name == other.name == "tiny-llama-adapter-Q8_0.gguf"
    assert one.read_bytes() == other.read_bytes()


def test_an_adapter_of_another_model(checkpoint, tmp_path):
    adapter = save(add_lora(tiny("llama")), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is LoRA of .*\.weight \[.*\], which is \[.*\] in its base model"):
        mowa.export(str(checkpoint), "gguf", tmp_path / "out", adapter=adapter)


def test_an_adapter_alone(checkpoint, tmp_path):
    adapter = save(add_lora(mowa.load(checkpoint).net), tmp_path / "adapter")
    artifact = mowa.export(checkpoint, "gguf", tmp_path / "lora.gguf", adapter=adapter, adapter_only=True, scheme="f32")
    file = read_gguf(tmp_path / "lora.gguf")
    assert (file.metadata["general.type"], file.metadata["adapter.type"]) == ("adapter", "lora")
    assert file.tensors["blk.0.attn_q.weight.lora_a"].shape == (4, 256)
    assert artifact.unverified_reason == "an adapter does not run without its model"
    assert artifact.details["files"][0]["types"] == {"f32": 28}
    with pytest.raises(ModelError, match="written in one scheme at a time, not 2"):
        mowa.export(checkpoint, "gguf", tmp_path / "o", adapter=adapter, adapter_only=True, scheme=["f16", "q8_0"])
    with pytest.raises(ModelError, match="adapter_only: name the folder of an adapter"):
        mowa.export(checkpoint, "gguf", tmp_path / "other.gguf", adapter_only=True)


def test_sampling_defaults(checkpoint, tmp_path):
    model = mowa.load(checkpoint)
    model.net.generation_config.update(do_sample=True, temperature=0.5, top_p=0.75)
    artifact = mowa.export(model, "gguf", tmp_path / "out", skip_outputs=True)
    metadata = read_gguf(artifact.folder / artifact.files[0]).metadata
    found = {key: value for key, value in metadata.items() if key.startswith("general.sampling.")}
    assert found["general.sampling.temp"] == 0.5
    assert found["general.sampling.top_p"] == 0.75


def test_schemes_are_the_same_everywhere():
    assert set(GGUF_SCHEMES) == set(FILE_TYPES) == set(LIMITS)


def test_a_speech_model(tmp_path):
    artifact = mowa.export("pl-tiny", "gguf", tmp_path / "out", scheme=["f16", "q8_0"])
    assert artifact.files == ("pl-tiny-F16.gguf", "pl-tiny-Q8_0.gguf")
    assert not (artifact.folder / "Modelfile").exists()
    clip = "examples/dzien-dobry.flac"
    assert mowa.load(artifact.folder / "pl-tiny-Q8_0.gguf").task == "ctc"
    text = mowa.transcribe(clip, model=artifact.folder / "pl-tiny-Q8_0.gguf", dtype="float32").text
    assert text == mowa.transcribe(clip, dtype="float32").text
    with pytest.raises(ModelError, match="imatrix is an option for language models, and this is a speech model"):
        mowa.export("pl-tiny", "gguf", tmp_path / "other", imatrix="text.txt")


def test_a_quantized_checkpoint_is_dequantized(checkpoint, tmp_path):
    pytest.importorskip("compressed_tensors")
    quantized = mowa.export(checkpoint, "safetensors", tmp_path / "int8", scheme="int8").folder
    artifact = mowa.export(quantized, "gguf", tmp_path / "out", scheme="f32")
    file = read_gguf(artifact.folder / artifact.files[0])
    found = decode(torch.from_numpy(file.blocks("blk.0.ffn_down.weight").copy()), "f32")
    assert torch.equal(found, mowa.load(quantized).net.model.layers[0].mlp.down_proj.weight)


def damage(folder, out, name, value):
    """Copy a checkpoint and set one weight."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("scheme", ["f16", "q4_k_m"])
def test_nan_is_refused_by_name(checkpoint, tmp_path, scheme):
    folder = damage(checkpoint, tmp_path / "nan", "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight: .* cannot store nan: row 0, column 7"):
        mowa.export(folder, "gguf", tmp_path / "out", scheme=scheme)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["nan"]


def test_too_little_space(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"0\.00 GB of free space, and the files need .* Nothing was written"):
        mowa.export(checkpoint, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["out", "one.gguf"])
def test_an_interrupted_export_leaves_nothing(checkpoint, tmp_path, out):
    def interrupt(stage, fraction):
        if stage == "writing" and fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mowa.export(checkpoint, "gguf", tmp_path / out, on_progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_lossy_file_fails(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(LIMITS, "q2_k", Limits(1e-9, 0.5))
    with pytest.raises(ModelError, match=r"q2_k is too lossy for .*tiny-llama: the KL divergence .* \(limit 1e-09\)"):
        mowa.export(checkpoint, "gguf", tmp_path / "out", scheme="q2_k")
    assert not list(tmp_path.iterdir())
    mowa.export(checkpoint, "gguf", tmp_path / "out", scheme="q2_k", keep_failed=True)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not found["files"][0]["passed"]
    assert "KL divergence" in found["files"][0]["problem"]


def test_what_is_refused(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="gguf has no scheme 'q4': choose from f32, f16"):
        mowa.export(checkpoint, "gguf", tmp_path / "out", scheme="q4")
    with pytest.raises(ModelError, match="one file, and 2 schemes are as many files: name a folder"):
        mowa.export(checkpoint, "gguf", tmp_path / "a.gguf", scheme=["f16", "q8_0"])
    with pytest.raises(ModelError, match="onnx is written in one scheme at a time, not 2"):
        mowa.export("pl-tiny", "onnx", tmp_path / "out", scheme=["int8", "int4"])
    falcon = save_model(tmp_path / "phi", "phi")
    with pytest.raises(ModelError, match="phi cannot be written as GGUF; supported are"):
        mowa.export(falcon, "gguf", tmp_path / "out")


def test_other_files_are_not_overwritten(checkpoint, tmp_path):
    (tmp_path / "y.Modelfile").write_text("mine")
    with pytest.raises(DataError, match=r"y\.Modelfile already exists"):
        mowa.export(checkpoint, "gguf", tmp_path / "y.gguf", skip_outputs=True)
    assert (tmp_path / "y.Modelfile").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        mowa.export(checkpoint, "gguf", tmp_path / "file" / "x.gguf", skip_outputs=True)


def test_a_suffix_in_capitals(checkpoint, tmp_path):
    artifact = mowa.export(checkpoint, "gguf", tmp_path / "X.GGUF", skip_outputs=True, scheme=["q8_0", "Q8_0"])
    assert artifact.files == ("X.gguf",)
    assert {one.name for one in tmp_path.iterdir()} == {"X.gguf", "X.Modelfile", "X.report.json"}
    report = json.loads((tmp_path / "X.report.json").read_text())
    assert (report["files"][0]["name"], report["files"][0]["passed"]) == ("X.gguf", None)


def test_a_template_that_cannot_be_parsed(checkpoint, tmp_path):
    model = mowa.load(checkpoint)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content "
    with pytest.raises(ModelError, match=r"cannot be parsed.*repair the chat template"):
        mowa.export(model, "gguf", tmp_path / "out", skip_outputs=True)


def test_options_that_do_not_apply(checkpoint, tmp_path):
    adapter = save(add_lora(mowa.load(checkpoint).net), tmp_path / "adapter")
    with pytest.raises(ModelError, match="imatrix does not apply to an adapter alone"):
        mowa.export(checkpoint, "gguf", tmp_path / "a.gguf", adapter=adapter, adapter_only=True, imatrix="x.gguf")
    with pytest.raises(ModelError, match="gguf takes no calibration_data"):
        mowa.export(checkpoint, "gguf", tmp_path / "out", calibration_data="x")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("context_length", np.uint32(4294967295), "must be a number from 1 to"),
        ("context_length", "many", "must be a number from 1 to"),
        ("block_count", np.uint32(0), "must be a number from 1 to"),
        ("attention.head_count", np.uint32(0), "must be a number from 1 to"),
        ("attention.layer_norm_rms_epsilon", np.float32("nan"), "is not finite"),
        ("rope.freq_base", np.float32("nan"), "is not finite"),
    ],
)
def test_hostile_metadata(exported, tmp_path, key, value, problem):
    file = read_gguf(exported.folder / "tiny-llama-F16.gguf")
    metadata = {**file.metadata, f"llama.{key}": value}
    types = {name: one for name, one in file.value_types.items() if name != f"llama.{key}"}
    with open_writer(tmp_path / "m.gguf", metadata, file.tensors, value_types=types) as writer:
        for name in file.tensors:
            writer.write(name, file.blocks(name))
    with pytest.raises(ModelError, match=problem):
        mowa.load(tmp_path / "m.gguf")
    with pytest.raises((ModelError, MissingDependency), match=problem):
        mowa.generate(tmp_path / "m.gguf", "hi", max_new_tokens=2)
