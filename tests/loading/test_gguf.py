"""A GGUF file becomes a model like any other; its tokenizer is transformers' own."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import mowa
from mowa import loading
from mowa.errors import DataError, MissingDependency, ModelError, RecipeError
from mowa.io.gguf import TensorInfo, open_writer, read_gguf
from mowa.kernels.quant.gguf_blocks import decode, encode
from mowa.loading import gguf
from mowa.types import TextProcessor
from tests.engines.llama_cpp.tiny_file import tiny_model, write_file
from tests.exporters.gguf.tokenizer.trained import BYTE_LEVEL, SPACE_PREPENDED, train_sentencepiece
from tests.models.gguf.tiny_files import MINIMAL_TOKENIZER, logits, net, token_ids, write_float32
from tests.tiny_causal import tiny_causal


@pytest.fixture
def path(tmp_path):
    write_float32(tmp_path / "model.gguf", net("llama"), MINIMAL_TOKENIZER)
    return tmp_path / "model.gguf"


class Tokenizer:
    """What `validate_tokenizer` needs of one."""

    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {str(index): index for index in range(self.size)}


def test_a_model_with_its_tokenizer(path, monkeypatch):
    monkeypatch.setattr(gguf, "load_tokenizer", lambda path, tokens: Tokenizer(99))
    model = gguf.load(path, dtype="bfloat16")
    assert (model.family.name, model.task, model.scheme.name) == ("llama", "causal", "float32")
    assert model.origin.name == str(path)
    assert not model.net.training
    assert {parameter.dtype for parameter in model.net.parameters()} == {torch.bfloat16}
    assert model.net.config.eos_token_id == 2


def test_a_tokenizer_with_more_tokens_is_rejected(path, monkeypatch):
    monkeypatch.setattr(gguf, "load_tokenizer", lambda path, tokens: Tokenizer(100))
    with pytest.raises(ModelError, match="ids up to 99, but the model has 99 embeddings"):
        gguf.load(path)


def test_the_tokenizer_is_read_by_transformers(path):
    pytest.importorskip("gguf")
    assert gguf.load_tokenizer(path).convert_tokens_to_ids("$") == 3


def test_what_the_tokenizer_needs_is_named(path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'mowa\[gguf\]'"):
        gguf.load(path)


def test_wrong_options_and_files(path, tmp_path):
    with pytest.raises(ModelError, match="dtype 'int8' is not one of"):
        gguf.load(path, dtype="int8")
    with pytest.raises(ModelError, match="device 'abacus' cannot be used"):
        gguf.load(path, device="abacus")
    with pytest.raises(DataError, match="No such file"):
        gguf.load(tmp_path / "other.gguf")
    shutil.copy(tiny_causal(tmp_path / "checkpoint") / "model.safetensors", path)
    with pytest.raises(DataError, match="is not a GGUF file"):
        gguf.load(path)


@pytest.mark.parametrize("type_name", ["f16", "bf16", "q8_0"])
def test_weights_are_dequantized(type_name, path, tmp_path):
    source = read_gguf(path)
    infos = {
        name: TensorInfo(info.shape, type_name if len(info.shape) > 1 and info.shape[-1] % 32 == 0 else "f32")
        for name, info in source.tensors.items()
    }
    with open_writer(tmp_path / "small.gguf", source.metadata, infos) as writer:
        for name, info in infos.items():
            weight = torch.from_numpy(source.blocks(name).copy().view(np.float32)).reshape(info.shape)
            writer.write(name, encode(weight.reshape(-1, info.shape[-1]), info.type_name).numpy())
    loaded = gguf.load_net(read_gguf(tmp_path / "small.gguf"))
    weight = net("llama").model.layers[1].self_attn.v_proj.weight.detach()
    expected = decode(encode(weight, type_name), type_name)
    assert torch.equal(loaded.model.layers[1].self_attn.v_proj.weight, expected)
    assert not torch.equal(expected, weight)
    assert torch.allclose(logits(loaded, token_ids()), logits(net("llama"), token_ids()), atol=0.05)


# --- as any other model -----------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    """A file with the tokenizer beside it, and the model that it was made from."""
    model = tiny_model()
    model.tokenizer.save_pretrained(tmp_path)
    return write_file(tmp_path / "tiny.gguf", model, "f32"), model


def test_the_tokenizer_beside_the_file_is_used(exported, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    path, model = exported
    loaded = mowa.load(path)
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert torch.equal(logits(loaded.net, token_ids()), logits(model.net, token_ids()))
    answer = mowa.generate(loaded, "Hello", max_new_tokens=4)
    assert answer == mowa.generate(model, "Hello", max_new_tokens=4)


def test_a_tokenizer_that_is_named_after_the_file(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    path, model = exported
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).rename(tmp_path / f"tiny.{name}")
    assert mowa.load(path).tokenizer.chat_template == model.tokenizer.chat_template


def test_the_tokenizer_of_another_model_is_not_used(exported, tmp_path, caplog):
    pytest.importorskip("gguf")
    path, model = exported
    BYTE_LEVEL["gpt-2"]().save_pretrained(tmp_path)
    loaded = mowa.load(path)
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert "the tokenizer beside" in caplog.text
    assert " in the file" in caplog.text


def test_other_token_ids_than_llama_cpp_are_a_warning(tmp_path, caplog):
    pytest.importorskip("gguf")
    tokenizer = BYTE_LEVEL["smollm"]()  # whose pre-tokenizer transformers does not read
    model = replace(tiny_model(vocab_size=len(tokenizer)), processor=TextProcessor(tokenizer))
    mowa.load(write_file(tmp_path / "tiny.gguf", model))
    assert "hard texts have other token ids, such as" in caplog.text
    tokenizer.save_pretrained(tmp_path)
    caplog.clear()
    mowa.load(tmp_path / "tiny.gguf")
    assert not caplog.text


def test_a_sentencepiece_vocabulary_fits_the_tokenizer_it_was_made_from():
    from mowa.exporters.gguf.tokenizer import tokenizer_metadata

    for tokenizer in (train_sentencepiece(SPACE_PREPENDED), *(make() for make in BYTE_LEVEL.values())):
        tokens = tokenizer_metadata(tokenizer, len(tokenizer))[gguf.TOKENS_KEY]
        assert gguf._first_difference(tokenizer, tokens) is None
        assert gguf._first_difference(tokenizer, tokens[:-1]) is not None


def test_it_is_loaded_by_name(exported):
    path, _ = exported
    assert loading.read_task(str(path)) == "causal"
    assert mowa.load(str(path), task="causal", dtype="bfloat16").net.dtype == torch.bfloat16
    for options, problem in (
        ({"revision": "main"}, "takes no revision: omit 'main'"),
        ({"target_lang": "pol"}, "takes no target_lang: omit 'pol'"),
        ({"task": "ctc"}, "is a language model; a speech model is needed here"),
    ):
        with pytest.raises(ModelError, match=problem):
            mowa.load(path, **options)


def test_files_of_speech_models_are_recognized(tmp_path):
    with open_writer(tmp_path / "speech.gguf", {"general.architecture": "wav2vec2-ctc"}, {}):
        pass
    assert loading.read_task(str(tmp_path / "speech.gguf")) == "ctc"
    with pytest.raises(ModelError, match="is a speech model; a language model is needed here"):
        mowa.load(tmp_path / "speech.gguf", task="causal")


@pytest.mark.parametrize(("type_name", "dtype"), [("f16", "float16"), ("bf16", "bfloat16"), ("q8_0", "bfloat16")])
def test_the_dtype_on_a_gpu(type_name, dtype, tmp_path):
    assert gguf.stored_dtype(write_file(tmp_path / "tiny.gguf", tiny_model(), type_name)) == dtype


def test_training_starts_from_a_checkpoint_of_it(exported, tmp_path):
    path, model = exported
    (tmp_path / "data.jsonl").write_text('{"text": "hello world"}\n' * 8)
    recipe = {"data": str(tmp_path / "data.jsonl"), "out": tmp_path / "run", "method": "full", "max_steps": 2}
    recipe["dev"] = recipe["data"]
    command = f"mowa export {path} --to safetensors -o FOLDER"
    for source in (path, mowa.load(path)):
        with pytest.raises((ModelError, RecipeError), match=command):
            mowa.train(model=source, **recipe)
    mowa.export(path, "safetensors", tmp_path / "checkpoint")
    again = mowa.load(tmp_path / "checkpoint")
    assert torch.equal(logits(again.net, token_ids()), logits(model.net, token_ids()))
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    run = mowa.train(model=tmp_path / "checkpoint", **recipe)
    assert run.report["global_step"] == 2
