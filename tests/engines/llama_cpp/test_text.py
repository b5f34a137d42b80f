"""Text by llama.cpp is that of the PyTorch engine, from the same prompts and settings."""

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mowa.engines import generation, llama_cpp
from mowa.engines.llama_cpp import runtimes, text
from mowa.engines.llama_cpp.protocol import Sampling
from mowa.engines.settings import GenerationSettings
from mowa.errors import DataError, MissingDependency, ModelError
from mowa.types import Generation
from tests.engines.llama_cpp.tiny_file import CONTEXT, tiny_model, write_file

MIN_GAP = 0.05  # of the two largest logits; smaller ones may swap between implementations
PROMPTS = ["Hello there", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why <|im_end|>?"}]]


@pytest.fixture(scope="module")
def pytorch():
    return tiny_model()


@pytest.fixture(scope="module")
def path(pytorch, tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf", pytorch)


@pytest.fixture(params=["xllamacpp", "llama_cpp"])
def model(request, path, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setattr(runtimes, "find_runtime", lambda: request.param)
    opened = llama_cpp.open_model(path, threads=1)
    yield opened
    opened.close()


def greedy(model, prompt, count, penalty=1.0):
    """Greedy token ids in PyTorch, up to the first step whose top two logits are close."""
    ids, found = generation.encode(model, prompt), []
    for _ in range(count):
        with torch.no_grad():
            logits = model.net(torch.tensor([ids + found])).logits[0, -1]
        seen = torch.tensor(sorted({*ids, *found}))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        top = logits.topk(2).values
        if top[0] - top[1] < MIN_GAP:
            break
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_greedy_text_is_that_of_pytorch(prompt, penalty, pytorch, model):
    settings = GenerationSettings(max_new_tokens=16, temperature=0.0, repetition_penalty=penalty)
    expected = generation.generate(pytorch, [prompt], settings)[0]
    found = llama_cpp.generate(model, [prompt], settings)[0]
    certain = greedy(pytorch, prompt, 16, penalty)
    assert len(certain) >= 8
    if len(certain) == 16:
        assert found == expected
    assert found.prompt_tokens == expected.prompt_tokens
    start = pytorch.tokenizer.decode(certain, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert start
    assert found.text.startswith(start)


def test_pieces_of_a_stream_are_the_text(model):
    settings = GenerationSettings(max_new_tokens=20)
    answer = llama_cpp.generate(model, ["Hello"], settings)[0]
    pieces = list(llama_cpp.stream_text(model, "Hello", settings))
    assert len(pieces) > 2
    assert "".join(pieces) == answer.text


def test_a_stream_can_be_closed(model):
    stream = llama_cpp.stream_text(model, "Hello", GenerationSettings(max_new_tokens=50))
    next(stream)
    stream.close()
    assert llama_cpp.generate(model, ["Hello"], GenerationSettings(max_new_tokens=1))[0].completion_tokens == 1


def test_a_stop_string_ends_the_answer(pytorch, model):
    whole = llama_cpp.generate(model, ["Hello"], GenerationSettings(max_new_tokens=20))[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    settings = GenerationSettings(max_new_tokens=20, stop=(stop,))
    found = llama_cpp.generate(model, ["Hello"], settings)[0]
    assert found.text == whole[: whole.find(stop)]
    assert (found.finish_reason, found.completion_tokens < 20) == ("stop", True)
    assert "".join(llama_cpp.stream_text(model, "Hello", settings)) == found.text
    assert found == generation.generate(pytorch, ["Hello"], settings)[0]


def test_seeds_repeat_and_differ(model):
    def draw(seed):
        settings = GenerationSettings(max_new_tokens=12, temperature=30.0, seed=seed)
        return llama_cpp.generate(model, ["Hello"], settings)[0].text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) == 4
    assert (
        llama_cpp.generate(model, ["Hello"], GenerationSettings(max_new_tokens=12, temperature=30.0, top_k=1))[0]
        == (llama_cpp.generate(model, ["Hello"], GenerationSettings(max_new_tokens=12))[0])
    )


def test_the_context_is_the_limit(pytorch, model):
    settings = GenerationSettings(max_new_tokens=500)
    prompt = "a" * 200
    count = len(generation.encode(pytorch, prompt, chat=False))
    with pytest.raises(DataError, match=f"{count} tokens, and .*tiny.gguf reads at most {CONTEXT} with its answer"):
        llama_cpp.generate(model, [prompt], settings, chat=False)
    found = llama_cpp.generate(model, ["Hello"], settings)[0]
    if found.finish_reason == "length":
        assert found.prompt_tokens + found.completion_tokens == CONTEXT


def test_bad_input_is_refused_as_in_pytorch(model):
    with pytest.raises(ModelError, match="top_p is 2"):
        llama_cpp.generate(model, ["Hello"], GenerationSettings(top_p=2.0))
    with pytest.raises(ModelError, match="special token"):
        llama_cpp.generate(model, ["Hello"], GenerationSettings(stop=("x<|im_end|>",)))
    with pytest.raises(DataError, match="the prompt is empty"):
        llama_cpp.stream_text(model, "")
    with pytest.raises(DataError, match="does not read nothing"):
        llama_cpp.generate(model, ["Hello"], chat_template_kwargs={"nothing": 1})


def test_the_file_decides_how_tokens_are_drawn(path):
    def sampling(settings, **metadata):
        model = llama_cpp.LlamaCppModel(path, {f"general.sampling.{key}": value for key, value in metadata.items()})
        return text._sampling(model, settings)

    assert sampling(GenerationSettings()) == Sampling(0.0, 1.0, 0, 1.0, None)
    assert sampling(GenerationSettings(top_p=0.5, seed=7)) == Sampling(1.0, 0.5, 0, 1.0, 7)
    assert sampling(GenerationSettings(repetition_penalty=1.2)) == Sampling(0.0, 1.0, 0, 1.2)
    stored = {"temp": np.float32(0.5), "top_k": np.int32(20), "penalty_repeat": 1.5}
    assert sampling(GenerationSettings(), **stored) == Sampling(0.5, 1.0, 20, 1.5)
    assert sampling(GenerationSettings(temperature=0.0), **stored) == Sampling(0.0, 1.0, 20, 1.5)


def test_what_is_missing_is_named(path, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'mowa\[gguf\]', or run it in PyTorch"):
        llama_cpp.open_model(path)


def test_files_and_devices_that_do_not_run(path, pytorch, tmp_path):
    pytest.importorskip("xllamacpp")
    with pytest.raises(ModelError, match="runs on cpu and cuda, not on 'tpu'"):
        llama_cpp.open_model(path, device="tpu")
    with pytest.raises(ModelError, match="threads is 0"):
        llama_cpp.open_model(path, threads=0)
    with pytest.raises(ModelError, match="GGUF of type 'adapter'"):
        llama_cpp.open_model(write_file(tmp_path / "a.gguf", pytorch, **{"general.type": "adapter"}))
    other = llama_cpp.open_model(write_file(tmp_path / "b.gguf", pytorch, **{"llama.block_count": np.uint32(9)}))
    with pytest.raises(ModelError, match=r"llama.cpp .xllamacpp. cannot load .*b.gguf"):
        llama_cpp.generate(other, ["Hello"])


def test_nothing_is_printed(model, capfd):
    llama_cpp.generate(model, ["Hello"], GenerationSettings(max_new_tokens=2))
    assert capfd.readouterr() == ("", "")


def test_log_probabilities_are_those_of_pytorch(pytorch, tmp_path):
    pytest.importorskip("xllamacpp")
    path = write_file(tmp_path / "float32.gguf", pytorch, "f32")
    sequences = [generation.encode(pytorch, "Hello there"), [5, 200, 300, 7]]
    found = llama_cpp.score(path, sequences, threads=1)
    for ids, log_probs in zip(sequences, found, strict=True):
        with torch.inference_mode():
            expected = pytorch.net(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert log_probs.shape == expected.shape
        kl = (expected.exp() * (expected - log_probs)).sum(-1)
        assert kl.abs().max() < 1e-5
        assert (log_probs - expected.clamp(min=-87)).abs().max() < 0.01


def test_the_most_probable_tokens_only(path):
    pytest.importorskip("xllamacpp")
    whole, some = (llama_cpp.score(path, [[5, 200, 300]], top=top, threads=1)[0] for top in (None, 7))
    kept = some > -math.inf
    assert kept.sum(-1).tolist() == [7, 7, 7]
    assert torch.equal(some[kept], whole[kept])
    assert torch.equal(some.topk(7).indices, whole.topk(7).indices)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([], "no tokens"),
        ([1] * (CONTEXT + 1), f"{CONTEXT + 1} tokens, and .* {CONTEXT}"),
        ([10**6], "1000000 is no token"),
    ],
)
def test_sequences_that_cannot_be_scored(ids, problem, model):
    with pytest.raises(DataError, match=problem):
        llama_cpp.score(model, [[1], ids])


def test_openmp_waits_passively_while_the_library_is_loaded(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    with runtimes._passive_openmp():
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
        assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    with runtimes._passive_openmp():
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
        assert "GOMP_SPINCOUNT" not in os.environ


def test_the_command_chooses_before_torch_is_imported(path):
    """torch loads the libgomp that llama.cpp shares, and libgomp reads the environment once."""
    code = (
        "import sys, mowa.hardware as hardware\n"
        "def check(): assert 'torch' not in sys.modules; print('called')\n"
        "hardware.set_passive_openmp = check\n"
        f"from mowa.cli.main import main; main(['generate', {str(path)!r}, '-p', 'x', '--revision', 'y'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "called" in done.stdout, done.stderr


def test_answers_are_values(model):
    answer = llama_cpp.generate(model, ["Hello"], GenerationSettings(max_new_tokens=3))[0]
    assert isinstance(answer, Generation)
    assert dataclasses.asdict(answer).keys() == {"text", "prompt_tokens", "completion_tokens", "finish_reason"}
