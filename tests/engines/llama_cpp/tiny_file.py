"""A tiny random llama with a trained tokenizer, as a GGUF file in float16 and as the same model in PyTorch."""

import torch

from mowa.exporters.gguf.tokenizer import tokenizer_metadata
from mowa.families import family_of
from mowa.io.gguf import TensorInfo, open_writer
from mowa.kernels.quant.gguf_blocks import encode
from mowa.models.gguf import net_state, to_gguf
from mowa.types import Model, Origin, TextProcessor
from tests.data.chat.tokenizers import tokenizer as make_tokenizer
from tests.families.tiny import tiny

CONTEXT = 64


def tiny_model(family="llama", chat="chatml", **changes):
    """Return a CausalModel in float32 whose weights are float16 numbers, and whose logits are far apart."""
    tokenizer = make_tokenizer(chat)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": CONTEXT}
    net = tiny(family, **sizes | ids | {"vocab_size": len(tokenizer)} | changes)
    with torch.no_grad():
        net.lm_head.weight.mul_(40)
        for weight in net.parameters():
            weight.copy_(weight.half().float() if weight.ndim > 1 else weight)
    net.generation_config.update(eos_token_id=tokenizer.eos_token_id)
    return Model(net.eval(), family_of(net), Origin("tiny", "tiny", "."), TextProcessor(tokenizer))


def write_file(path, model, type_name="f16", **metadata):
    """Write a model with its tokenizer; vectors are float32. Return the path."""
    mapped = to_gguf(model.net.config, net_state(model.net))
    own = tokenizer_metadata(model.tokenizer, model.net.config.vocab_size)
    infos = {
        name: TensorInfo(tensor.shape, type_name if len(tensor.shape) > 1 else "f32")
        for name, tensor in mapped.tensors.items()
    }
    with open_writer(path, mapped.metadata | own | metadata, infos) as writer:
        for name, info in infos.items():
            weight = mapped.tensors[name].load().float()
            writer.write(name, encode(weight.reshape(-1, info.shape[-1]), info.type_name).numpy())
    return path
