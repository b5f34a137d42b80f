"""Prompts that are encoded here have the token ids and text that llama.cpp itself makes of them, in xllamacpp."""

import json
import secrets
import urllib.request

import pytest

from mowa.data.chat.encode import encode_prompt
from mowa.engines.llama_cpp.tokenizer import PromptTokenizer
from mowa.exporters.gguf.tokenizer.battery import hard_texts
from mowa.io.gguf import read_gguf
from tests.data.chat.tokenizers import FAMILIES
from tests.engines.llama_cpp.tiny_file import tiny_model, write_file

pytestmark = pytest.mark.slow  # thousands of requests to llama.cpp's server
CHATS = [
    [{"role": "user", "content": "Hello, Zoë! 2 < 3"}],
    [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": " two\nlines "},
    ],
]


class Server:
    """llama.cpp's server, over HTTP: in this process, it has no call that returns token ids."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp")
        self.key = secrets.token_hex()
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_gpu_layers = str(path), 256, 0
        parameters.verbosity, parameters.warmup, parameters.fit_params = -1, False, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.api_keys, parameters.use_jinja = [self.key], True
        self.server = xllamacpp.Server(parameters)

    def post(self, name, **body):
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.server.listening_address}/{name}", json.dumps(body).encode(), headers, method="POST"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text, **options):
        return self.post("tokenize", content=text, **options)["tokens"]


@pytest.fixture(params=[name for name in sorted(FAMILIES) if FAMILIES[name][0]])  # those with a chat template
def pair(request, tmp_path):
    model = tiny_model(chat=request.param)
    path = write_file(tmp_path / "tiny.gguf", model)
    return model.tokenizer, PromptTokenizer(read_gguf(path).metadata), Server(path)


def test_token_ids_are_those_of_llama_cpp(pair):
    _, ours, server = pair
    texts = hard_texts(ours.all_special_tokens, [])
    for text in filter(None, [*texts[:40], *texts[40::80]]):
        for split in (False, True):
            found = ours(text, split_special_tokens=split)["input_ids"]
            assert found == server.tokenize(text, add_special=True, parse_special=not split), (text, split)


def adds_spaces(tokenizer):
    """llama.cpp puts a space after special tokens too; the tokenizer of transformers does only at the beginning."""
    return tokenizer.gguf.add_space_prefix


def test_chats_are_those_of_llama_cpp_and_of_transformers(pair):
    theirs, ours, server = pair
    for messages in CHATS:
        ids = encode_prompt(ours, messages)
        assert (ids == encode_prompt(theirs, messages)) == (not adds_spaces(ours))
        text = server.post("apply-template", messages=messages, chat_template_kwargs={})["prompt"]
        assert ids == server.tokenize(text, add_special=True, parse_special=True)  # BOS is not in its text


def test_special_tokens_in_a_message_are_text(pair):
    theirs, ours, _ = pair
    spelled = [{"role": "user", "content": f"what is {ours.all_special_tokens[-1]}?"}]
    ids = encode_prompt(ours, spelled)
    assert (ids == encode_prompt(theirs, spelled)) == (not adds_spaces(ours))
    assert ids.count(ours.all_special_ids[-1]) == encode_prompt(theirs, spelled).count(ours.all_special_ids[-1])
