"""`mowa bench` of language models: speed, memory and size of checkpoints and their quantized exports."""

import json

import pytest

import mowa
from mowa.cli.main import main
from mowa.errors import DataError, ModelError
from mowa.evaluation import text_worker
from tests.tiny_causal import tiny_causal


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and its export in int8."""
    root = tmp_path_factory.mktemp("bench")
    base = tiny_causal(root / "base")
    return str(base), str(mowa.export(str(base), "safetensors", root / "int8", scheme="int8").folder)


@pytest.mark.slow
def test_a_table_and_json(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *folders, "--out", str(tmp_path / "bench.json")])
    assert end.value.code == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[-1] == "decode tokens/s"
    assert [line.split()[:3] for line in lines] == [[name, "pytorch", "float32"] for name in folders]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {"version", "mowa", "machine", "results"} == set(written)
    full, small = written["results"]
    assert small["size_bytes"] < full["size_bytes"]
    assert full["prompt_tokens"] + text_worker.NEW_TOKENS <= 256  # the context of the model
    for row in (full, small):
        assert min(row["prefill_tokens_per_s"], row["decode_tokens_per_s"], row["load_s"]) > 0
        assert row["peak_memory_bytes"] > 10**8


def test_what_cannot_be_measured(folders, tmp_path):
    (failed,) = mowa.bench(folders[0], dtypes=["int8"])
    assert failed.error == "dtype 'int8' is not one of float32, bfloat16, float16"
    with pytest.raises(ModelError, match="onnx: language models run with pytorch only"):
        mowa.bench(folders[0], engines=["onnx"])
    with pytest.raises(ModelError, match="is a language model and pl-tiny is not: benchmark them in two calls"):
        mowa.bench([folders[0], "pl-tiny"])
    with pytest.raises(DataError, match="language models are measured on random tokens"):
        mowa.bench(folders[0], data=str(tmp_path))
