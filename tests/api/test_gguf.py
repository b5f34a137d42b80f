"""GGUF files in `mowa.generate`, `mowa generate` and other verbs."""

import json

import pytest

import mowa
from mowa.api.text import find_gguf, open_text_model
from mowa.cli.main import main
from mowa.engines.llama_cpp import LlamaCppModel, runtimes
from mowa.errors import DataError, MissingDependency, ModelError
from tests.engines.llama_cpp.tiny_file import tiny_model, write_file
from tests.tiny_causal import tiny_causal


@pytest.fixture
def path(tmp_path):
    model = tiny_model()
    model.tokenizer.save_pretrained(tmp_path / "out")
    return write_file(tmp_path / "out" / "tiny.gguf", model)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["generate", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


def test_both_engines_answer_alike(path):
    pytest.importorskip("xllamacpp")
    by_llama_cpp = mowa.generate(path, "Hello", max_new_tokens=6, threads=1)
    assert by_llama_cpp == mowa.generate(path.parent, "Hello", max_new_tokens=6, threads=1, engine="llama_cpp")
    assert by_llama_cpp == mowa.generate(path, "Hello", max_new_tokens=6, threads=1, engine="pytorch")
    assert by_llama_cpp == mowa.generate(mowa.load(path), "Hello", max_new_tokens=6)


def test_an_open_file_answers_several_times(path):
    pytest.importorskip("xllamacpp")
    model = open_text_model(path, threads=1)
    assert isinstance(model, LlamaCppModel)
    answers = mowa.generate(model, ["Hello", "Why"], max_new_tokens=4)
    assert [mowa.generate(model, one, max_new_tokens=4) for one in ("Hello", "Why")] == answers
    assert "".join(mowa.generate(model, "Hello", stream=True, max_new_tokens=4)) == answers[0].text
    model.close()


def test_the_command(path, capsys):
    pytest.importorskip("xllamacpp")
    options = ("-p", "Hello", "--max-new-tokens", 5, "--threads", 1)
    code, out, _ = run(capsys, path, *options)
    assert code == 0
    answer = json.loads(run(capsys, path.parent, *options, "--json")[1])
    assert (answer["text"], answer["completion_tokens"] <= 5) == (out.removesuffix("\n"), True)
    assert run(capsys, path, *options, "--engine", "pytorch")[1] == out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--adapter", "x"), "takes no adapter: omit it, or use engine pytorch"),
        (("--revision", "main"), "takes no revision"),
        (("--dtype", "bfloat16"), "takes no dtype"),
        (("--device", "mps"), "runs on cpu and cuda, not on 'mps'"),
        (("--engine", "pytorch", "--revision", "main"), "is a file and takes no revision"),
    ],
)
def test_options_that_do_not_apply_are_one_line(options, problem, path, capsys):
    code, _, err = run(capsys, path, "-p", "Hello", *options)
    assert code == 2
    assert problem in err
    assert err.count("\n") == 1


def test_without_llama_cpp_pytorch_is_named(path, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'mowa\[gguf\]', or run it in PyTorch .engine pytorch"):
        mowa.generate(path, "Hello")
    assert mowa.generate(path, "Hello", max_new_tokens=2, engine="pytorch").completion_tokens <= 2


def test_folders(path, tmp_path):
    assert find_gguf(path.parent) == path
    assert find_gguf(tmp_path) is None
    assert find_gguf(tiny_causal(tmp_path / "checkpoint")) is None
    (path.parent / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"has 2 GGUF files: name one of .*other.gguf, .*tiny.gguf"):
        mowa.generate(path.parent, "Hello")


def test_models_that_llama_cpp_does_not_run(tmp_path):
    with pytest.raises(ModelError, match=r"is no GGUF file, which llama\.cpp needs"):
        mowa.generate(tiny_causal(tmp_path / "checkpoint"), "Hello", engine="llama_cpp")
    with pytest.raises(ModelError, match="engine is 'vllm'"):
        mowa.generate(tmp_path, "Hello", engine="vllm")
    with pytest.raises(ModelError, match="name a GGUF file"):
        mowa.generate(tiny_model(), "Hello", engine="llama_cpp")
    with pytest.raises(DataError, match="No such file"):
        mowa.generate(tmp_path / "none.gguf", "Hello")
