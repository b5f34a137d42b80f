"""A GGUF file becomes a model like any other; its tokenizer is transformers' own."""

import shutil

import numpy as np
import pytest
import torch

from mowa.errors import DataError, MissingDependency, ModelError
from mowa.io.gguf import TensorInfo, open_writer, read_gguf
from mowa.kernels.quant.gguf_blocks import decode, encode
from mowa.loading import gguf
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
    monkeypatch.setattr(gguf, "load_tokenizer", lambda path: Tokenizer(99))
    model = gguf.load(path, dtype="bfloat16")
    assert (model.family.name, model.task, model.scheme.name) == ("llama", "causal", "float32")
    assert model.origin.name == str(path)
    assert not model.net.training
    assert {parameter.dtype for parameter in model.net.parameters()} == {torch.bfloat16}
    assert model.net.config.eos_token_id == 2


def test_a_tokenizer_with_more_tokens_is_rejected(path, monkeypatch):
    monkeypatch.setattr(gguf, "load_tokenizer", lambda path: Tokenizer(100))
    with pytest.raises(ModelError, match="ids up to 99, but the model has 99 embeddings"):
        gguf.load(path)


def test_the_tokenizer_is_read_by_transformers(path):
    pytest.importorskip("gguf")
    assert gguf.load_tokenizer(path).convert_tokens_to_ids("$") == 3


def test_what_the_tokenizer_needs_is_named(path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install gguf"):
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
