"""Exported language models: stock transformers loads the same weights and tokenizer, and mowa loads and runs them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import mowa
from mowa.errors import DataError, ModelError, RecipeError
from mowa.exporters import protocol, safetensors
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.training.config import dispatch
from tests.quantized import equal_linears, quantized_linears
from tests.tiny_causal import is_tied, load_in_transformers, logits, tiny_causal
from tests.training.causal import chats

pytest.importorskip("compressed_tensors")
pytest.importorskip("bitsandbytes")

KINDS = [
    ("int8", "llama", torch.float32),
    ("int8", "gemma3_text", torch.bfloat16),
    ("int4", "qwen3", torch.bfloat16),
    ("int4+asym", "phi", torch.float32),
    ("nf4", "llama", torch.float32),
    ("nf4", "phi", torch.bfloat16),
    ("fp16", "qwen2", torch.float32),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def exported(request, tmp_path_factory):
    """A quantized model, its export, and the dtype of the checkpoint it came from."""
    scheme, family, dtype = request.param
    root = tmp_path_factory.mktemp("causal")
    model = mowa.quantize(mowa.load(tiny_causal(root / "base", family, dtype)), scheme)
    return model, mowa.export(model, "safetensors", root / "out"), torch.float16 if scheme == "fp16" else dtype


def test_transformers_loads_the_same_weights_and_computes_the_same(exported):
    model, artifact, dtype = exported
    net = load_in_transformers(artifact.folder)
    assert net.dtype == dtype
    weights = dict(net.named_parameters())
    for name, value in model.net.named_parameters():
        assert torch.equal(weights[name].float(), value), name
    ours, theirs = (logits(one).log_softmax(-1) for one in (model.net, net))
    if dtype is torch.float32 and model.scheme.weights != "nf4":
        assert (ours - theirs).abs().max() < 1e-3
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    assert kl.mean() < 0.01
    if model.scheme.weights != "nf4":  # bitsandbytes keeps the dtype of the file
        assert (
            logits(load_in_transformers(artifact.folder, dtype=torch.float32)) - logits(model.net)
        ).abs().max() < 1e-3


def test_mowa_loads_the_same_model(exported):
    model, artifact, _ = exported
    loaded = mowa.load(artifact.folder)
    assert (loaded.task, loaded.scheme, type(loaded.net)) == ("causal", model.scheme, type(model.net))
    assert all(
        torch.equal(one, other) for one, other in zip(loaded.net.parameters(), model.net.parameters(), strict=True)
    )
    ours, theirs = quantized_linears(model.net), quantized_linears(loaded.net)
    assert ours.keys() == theirs.keys()
    assert all(equal_linears(linear, theirs[name]) for name, linear in ours.items())
    assert torch.equal(logits(loaded.net), logits(model.net))
    assert not any(buffer.is_meta for buffer in loaded.net.buffers())
    options = {"max_new_tokens": 5, "temperature": 0}
    assert mowa.generate(loaded, "one", **options) == mowa.generate(model, "one", **options)
    half = mowa.load(artifact.folder, dtype="bfloat16").net
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert not [name for name, one in half.named_buffers() if "inv_freq" in name and one.dtype is not torch.float32]
    assert logits(half).isfinite().all()


def test_tokenizer_chat_template_and_generation_config_survive(exported):
    model, artifact, _ = exported
    tokenizer = AutoTokenizer.from_pretrained(artifact.folder)
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(artifact.folder).max_new_tokens == 7
    manifest = json.loads((artifact.folder / "mowa.json").read_text())
    assert manifest["format"] == "safetensors"
    assert manifest["verification"]["agreement"] == 1
    assert artifact.details["transformers"]["agreement"] > 0.9
    with pytest.raises(ModelError, match="holds a language model"):
        _ = artifact.vocabulary


@pytest.mark.parametrize("scheme", ["int8", "nf4", "bf16", ""])
def test_tied_weights_are_stored_once(tmp_path, scheme):
    model = mowa.load(tiny_causal(tmp_path / "base", tie_word_embeddings=True))
    artifact = mowa.export(model, "safetensors", tmp_path / "out", scheme=scheme)
    assert "lm_head.weight" not in load_file(artifact.folder / "model.safetensors")
    assert is_tied(load_in_transformers(artifact.folder))
    assert is_tied(mowa.load(artifact.folder).net)
    assert is_tied(mowa.load(artifact.folder, dtype="bfloat16").net)


def test_weights_that_the_dtype_of_the_checkpoint_cannot_hold_stay_float32(tmp_path):
    model = mowa.load(tiny_causal(tmp_path / "base", dtype=torch.bfloat16))
    model.net.lm_head.weight.data += 1e-3
    artifact = mowa.export(model, "safetensors", tmp_path / "out", scheme="int8")
    tensors = load_file(artifact.folder / "model.safetensors")
    assert tensors["lm_head.weight"].dtype is torch.float32
    assert tensors["model.embed_tokens.weight"].dtype is torch.bfloat16
    assert torch.equal(mowa.load(artifact.folder).net.lm_head.weight, model.net.lm_head.weight)


def test_without_a_manifest_the_scheme_is_inferred(exported, tmp_path):
    model, artifact, _ = exported
    folder = shutil.copytree(artifact.folder, tmp_path / "bare")
    (folder / "mowa.json").unlink()
    found = mowa.load(folder).scheme
    expected = model.scheme if model.scheme.weights != "float16" else mowa.types.FLOAT32
    assert found == expected


def test_shards_and_targets_by_class_are_read(tmp_path):
    """As other programs write compressed-tensors."""
    model = mowa.quantize(str(tiny_causal(tmp_path / "base")), "int4")
    out = mowa.export(model, "safetensors", tmp_path / "out").folder
    (out / "mowa.json").unlink()
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    shards = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, out / shard)
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert torch.equal(logits(mowa.load(out).net), logits(model.net))


def test_an_accelerated_quantized_model_computes_the_same(tmp_path):
    out = mowa.export(str(tiny_causal(tmp_path / "base")), "safetensors", tmp_path / "out", scheme="int8").folder
    plain, fast = mowa.load(out), mowa.load(out, accelerate=True)
    torch.testing.assert_close(logits(fast.net), logits(plain.net), rtol=1e-4, atol=1e-4)
    exported = mowa.export(fast, "safetensors", tmp_path / "again")
    assert torch.equal(logits(mowa.load(exported.folder).net), logits(plain.net))
    options = {"max_new_tokens": 5, "temperature": 0}
    assert mowa.generate(fast, "one", **options) == mowa.generate(plain, "one", **options)


@pytest.mark.parametrize("to", ["onnx", "coreml", "tensorrt", "ctranslate2"])
def test_other_formats_refuse_language_models(tmp_path, monkeypatch, to):
    monkeypatch.setattr(protocol, "require_packages", lambda to: None)
    folder = tiny_causal(tmp_path / "base")
    with pytest.raises(
        ModelError, match=rf"is a language model and cannot be exported to {to}: .*\. Formats for it: safetensors"
    ):
        mowa.export(str(folder), to, tmp_path / "out", scheme="int8")
    assert not (tmp_path / "out").exists()


def test_an_export_that_differs_in_transformers_is_rejected(tmp_path, monkeypatch):
    model = mowa.load(tiny_causal(tmp_path / "base"))
    other = mowa.quantize(model, "int4").net
    monkeypatch.setattr(safetensors, "_load_in_transformers", lambda *_: other)
    with pytest.raises(ModelError, match=r"in transformers export of .* differs .* nats \(limit 0\.001\); use bf16"):
        mowa.export(model, "safetensors", tmp_path / "out", scheme="int8")
    message = r"nf4 is too lossy .*: the KL divergence of the next token is .* nats \(limit .*\); use bf16"
    with pytest.raises(ModelError, match=message):
        mowa.export(model, "safetensors", tmp_path / "out", scheme="nf4")
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_cannot_be_fine_tuned(tmp_path):
    out = mowa.export(str(tiny_causal(tmp_path / "base")), "safetensors", tmp_path / "out", scheme="int8").folder
    chats.conversations(tmp_path / "chats.jsonl")
    plan = dispatch.parse(chats.recipe(tmp_path) | {"model": str(out)}, "test")
    with pytest.raises(RecipeError, match=r"is quantized \(int8-weight\) and cannot be fine-tuned"):
        dispatch.train(plan, tmp_path / "run")


def test_damaged_exports_are_rejected(tmp_path):
    out = mowa.export(str(tiny_causal(tmp_path / "base")), "safetensors", tmp_path / "out", scheme="int8").folder
    file = out / "model.safetensors"
    tensors = load_file(file)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="missing or damaged: export the model again"):
        mowa.load(out)
    (out / "mowa.json").unlink()
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"cannot be loaded: .*: model\.norm\.weight is missing"):
        mowa.load(out)
    file.write_bytes(data[:-100])
    with pytest.raises(ModelError, match="are damaged"):
        mowa.load(out)
    with pytest.raises(DataError, match="already exists"):
        mowa.export(str(tmp_path / "base"), "safetensors", out)


def test_loss_of_the_export_is_that_of_the_quantized_model(tmp_path):
    model = mowa.quantize(str(tiny_causal(tmp_path / "base")), "int4")
    assert any(isinstance(module, QuantizedLinear) for module in model.net.modules())
    artifact = mowa.export(model, "safetensors", tmp_path / "out")
    data = chats.conversations(tmp_path / "chats.jsonl", count=6)
    assert mowa.evaluate(artifact.folder, data).metrics == mowa.evaluate(model, data).metrics
