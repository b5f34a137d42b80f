"""What is in a GGUF file, and how two of them differ."""

import json

import numpy as np
import pytest
import torch

from mowa.cli.main import main
from mowa.errors import DataError
from mowa.exporters.gguf.inspect import compare, shorten, summarize, to_json
from mowa.io.gguf import TensorInfo, open_writer
from mowa.kernels.quant.gguf_blocks import encode

METADATA = {
    "general.architecture": "llama",
    "llama.context_length": np.uint32(64),
    "tokenizer.ggml.tokens": [f"token {index}" for index in range(100)],
    "tokenizer.chat_template": "{{ messages }}\n" * 50,
    "nested": [[1, 2], [3]],
    "not a number": float("nan"),
}
WEIGHTS = {"a.weight": torch.linspace(-1, 1, 512).reshape(2, 256), "b.weight": torch.ones(3)}


def write(path, weights=WEIGHTS, types=None, **changes):
    types = {name: (types or {}).get(name, "f32") for name in weights}
    infos = {name: TensorInfo(tuple(weight.shape), types[name]) for name, weight in weights.items()}
    metadata = {key: value for key, value in (METADATA | changes).items() if value is not None}
    with open_writer(path, metadata, infos) as writer:
        for name, weight in weights.items():
            writer.write(name, encode(weight.reshape(-1, weight.shape[-1]), types[name]).numpy())
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "one.gguf", types={"a.weight": "q4_k"})


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["gguf", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


def test_a_summary(path):
    found = summarize(path)
    assert (found.architecture, found.version, found.num_weights) == ("llama", 3, 515)
    assert found.tensor_bytes == 2 * 144 + 12
    assert found.bits_per_weight == 8 * 300 / 515
    assert [(name, one.tensors, one.weights, one.bytes) for name, one in found.types.items()] == [
        ("q4_k", 1, 512, 288),
        ("f32", 1, 3, 12),
    ]
    assert found.size_bytes == path.stat().st_size


def test_a_file_without_tensors(tmp_path):
    found = summarize(write(tmp_path / "empty.gguf", {}, **{"general.architecture": None}))
    assert (found.architecture, found.bits_per_weight, found.types) == ("", 0, {})


def test_what_is_shown(path, capsys):
    code, out, _ = run(capsys, "show", path, "--tensors")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "bits per weight 4.66" in lines
    assert "q4_k 1 512 288 B" in lines
    assert "a.weight q4_k 2 × 256 288 B" in lines
    assert "llama.context_length 64" in lines
    assert (
        "tokenizer.ggml.tokens ['token 0', 'token 1', 'token 2', 'token 3', 'token 4', 'token 5', … (100 values)]"
        in lines
    )
    assert any(line.endswith("(750 characters)") for line in lines)
    assert "a.weight" not in run(capsys, "show", path)[1]


def test_json(path, capsys):
    content = json.loads(run(capsys, "show", path, "--json")[1])
    assert content["types"]["q4_k"] == {"tensors": 1, "weights": 512, "bytes": 288}
    assert content["tensors"][0] == {"name": "a.weight", "type": "q4_k", "shape": [2, 256], "bytes": 288}
    assert content["metadata"]["tokenizer.ggml.tokens"]["length"] == 100
    assert content["metadata"]["tokenizer.chat_template"] == METADATA["tokenizer.chat_template"]
    assert content["metadata"]["not a number"] == "nan"


def test_text_for_the_terminal():
    assert shorten("\x1b[31mred") == "\\x1b[31mred"
    assert shorten(np.arange(9, dtype=np.int32)) == "[0, 1, 2, 3, 4, 5, … (9 values)]"
    assert shorten([[1, 2], [3]]) == "[[1, 2], [3]]"
    assert to_json(np.float32(0.5)) == 0.5
    assert to_json([np.arange(2)]) == [[0, 1]]


def test_a_file_and_its_copy_in_another_order(path, tmp_path, capsys):
    other = write(tmp_path / "two.gguf", dict(reversed(WEIGHTS.items())), {"a.weight": "q4_k"})
    found = compare(path, other)
    assert found.is_empty
    assert found.num_equal == 2
    assert run(capsys, "diff", path, other)[:2] == (0, "0 keys and 0 tensors differ, 2 tensors are equal\n")


def test_every_difference_is_found(path, tmp_path, capsys):
    weights = {"a.weight": WEIGHTS["a.weight"], "c.weight": torch.ones(4)}
    changes = {"llama.context_length": np.int32(64), "nested": [[1, 2], [4]], "new": True, "not a number": None}
    other = write(tmp_path / "two.gguf", weights, {"a.weight": "q8_0"}, **changes)
    found = compare(path, other)
    assert sorted(one.key for one in found.metadata) == sorted(changes)
    assert {one.name: (one.first is None, one.second is None) for one in found.tensors} == {
        "a.weight": (False, False),
        "b.weight": (False, True),
        "c.weight": (True, False),
    }
    code, out, _ = run(capsys, "diff", path, other)
    assert code == 1
    assert out.endswith("4 keys and 3 tensors differ, 0 tensors are equal\n")
    code, out, _ = run(capsys, "diff", path, other, "--json")
    assert code == 1
    content = json.loads(out)
    assert content["tensors"][1] == {
        "name": "b.weight",
        "first": {"type": "f32", "shape": [3], "bytes": 12},
        "second": None,
        "relative_rmse": None,
    }


def test_the_relative_rmse_is_that_of_dequantized_weights(tmp_path):
    weight = WEIGHTS["a.weight"]
    one = write(tmp_path / "one.gguf", {"a.weight": weight})
    other = write(tmp_path / "two.gguf", {"a.weight": weight * 1.5})
    assert compare(one, other).tensors[0].relative_rmse == pytest.approx(0.5)
    exact = write(tmp_path / "three.gguf", {"a.weight": weight.half().float()}, {"a.weight": "f16"})
    same = write(tmp_path / "four.gguf", {"a.weight": weight.half().float()})
    assert compare(exact, same).tensors[0].relative_rmse == 0
    zeros = write(tmp_path / "five.gguf", {"a.weight": weight * 0})
    assert compare(zeros, one).tensors[0].relative_rmse == float("inf")


def test_tensors_of_other_shapes_have_no_rmse(path, tmp_path):
    other = write(tmp_path / "two.gguf", WEIGHTS | {"b.weight": torch.ones(4)}, {"a.weight": "q4_k"})
    found = compare(path, other)
    assert [(one.name, one.relative_rmse) for one in found.tensors] == [("b.weight", None)]
    assert found.num_equal == 1


def test_chunks_do_not_change_the_result(path, tmp_path, monkeypatch):
    other = write(tmp_path / "two.gguf")
    whole = compare(path, other).tensors[0].relative_rmse
    monkeypatch.setattr("mowa.exporters.gguf.inspect.CHUNK_WEIGHTS", 300)
    assert compare(path, other).tensors[0].relative_rmse == pytest.approx(whole)


def test_what_is_no_gguf_file_is_one_line(tmp_path, path, capsys):
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(DataError, match="is not a GGUF file"):
        summarize(tmp_path / "text.gguf")
    code, _, err = run(capsys, "diff", path, tmp_path / "none.gguf")
    assert code == 2
    assert err.count("\n") == 1
