"""Token ids of `GGUFTokenizer` and of the tokenizers they were exported from, against libllama itself.

Needs xllamacpp, whose library exports llama.cpp's C functions; `PYTHONPATH` may point to where it is installed.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mowa.exporters.gguf.tokenizer import GGUFTokenizer, convert_tokenizer
from mowa.exporters.gguf.tokenizer.battery import hard_texts
from mowa.exporters.gguf.tokenizer.gguf_tokenizer import BYTE_CHARACTERS
from mowa.exporters.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from mowa.io.gguf import open_writer
from tests.exporters.gguf.tokenizer.trained import (
    BYTE_LEVEL,
    SPACE_PREPENDED,
    SPACES_ESCAPED,
    train_sentencepiece,
    train_unigram,
    train_wordpiece,
)

pytestmark = pytest.mark.slow
VOCAB_ONLY = 72  # offset in bytes of that flag in llama_model_params, build 11549
KEY = "tokenizer.ggml."
MODEL = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 64,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


class _Parameters(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_ubyte * 512)]


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level, text, _):
    pass


@cache
def library():
    """Return libllama, or skip the test."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("needs xllamacpp, which holds libllama")
    lib = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    lib.llama_model_default_params.restype = _Parameters
    lib.llama_model_load_from_file.restype = lib.llama_model_get_vocab.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    lib.llama_model_get_vocab.argtypes = lib.llama_model_free.argtypes = [ctypes.c_void_p]
    integers = ctypes.POINTER(ctypes.c_int32)
    count, flag = ctypes.c_int32, ctypes.c_bool
    lib.llama_tokenize.argtypes = [ctypes.c_void_p, ctypes.c_char_p, count, integers, count, flag, flag]
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    return lib


class Libllama:
    """The vocabulary of a file, tokenized by libllama."""

    def __init__(self, path, metadata):
        with open_writer(path, MODEL | metadata, {}):
            pass
        parameters = library().llama_model_default_params()
        assert not any(parameters.raw[VOCAB_ONLY : VOCAB_ONLY + 2]), "llama_model_params has another layout"
        parameters.raw[VOCAB_ONLY] = 1
        self.model = library().llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, "llama.cpp does not load the vocabulary"
        self.vocab = library().llama_model_get_vocab(self.model)

    def encode(self, text, add_special=True):
        data = text.encode()
        ids = (ctypes.c_int32 * (4 * len(data) + 16))()
        count = library().llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, True)
        assert count >= 0
        return ids[:count]

    def close(self):
        library().llama_model_free(self.model)


def differing(one, other, texts):
    return [text for text in texts for special in (False, True) if one(text, special) != other(text, special)]


@pytest.fixture(scope="module")
def pairs():
    """Return merges of any two bytes, so that a different split shows in the ids."""
    order = np.random.default_rng(0).permutation(0x10000)
    merges = [f"{BYTE_CHARACTERS[index >> 8]} {BYTE_CHARACTERS[index & 255]}" for index in order]
    return merges, [*BYTE_CHARACTERS, *(merge.replace(" ", "") for merge in merges)]


FIRST = {(known.patterns, known.ignore_merges): name for name, known in reversed(PRE_TOKENIZERS.items())}
"""Rules → the first name that has them."""


@pytest.mark.parametrize("name", [name for name in FIRST.values() if PRE_TOKENIZERS[name].byte_level])
def test_every_pre_tokenizer_splits_as_libllama_does(name, pairs, tmp_path):
    merges, tokens = pairs
    entries = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": merges, "add_bos_token": False}
    metadata = {KEY + key: value for key, value in (entries | {"add_sep_token": False}).items()}
    libllama = Libllama(tmp_path / "x.gguf", metadata)
    texts = [text for text in hard_texts()[::2] if len(text) < 100]  # std::regex needs a deep stack for long ones
    assert not differing(libllama.encode, GGUFTokenizer(metadata).encode, texts)
    libllama.close()


OTHERS = {
    "sentencepiece": lambda: train_sentencepiece(SPACES_ESCAPED),
    "sentencepiece with prefix": lambda: train_sentencepiece(SPACE_PREPENDED),
    "sentencepiece of one merge per token": lambda: train_sentencepiece(SPACES_ESCAPED, complete=False),
    "wordpiece": train_wordpiece,
    "cased wordpiece": lambda: train_wordpiece(lowercase=False),
    "unigram": train_unigram,
}


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *OTHERS])
def test_exported_tokenizers_are_the_same_in_libllama(name, tmp_path):
    tokenizer = (BYTE_LEVEL | OTHERS)[name]()
    converted = convert_tokenizer(tokenizer, len(tokenizer) + 3)
    libllama = Libllama(tmp_path / "x.gguf", converted.metadata)
    special = [token for token in tokenizer.get_added_vocab() if not token.startswith("<0x")]
    texts = [text for text in hard_texts(special) if len(text) < 300]
    assert not differing(libllama.encode, GGUFTokenizer(converted.metadata).encode, texts)
    known = {one.text for found in converted.report.known.values() for one in found}
    assert set(differing(libllama.encode, tokenizer_encode(tokenizer), texts)) <= known
    libllama.close()


def tokenizer_encode(tokenizer):
    return lambda text, special: tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids
