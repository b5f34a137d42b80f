"""`mowa adapter`, `mowa explain` and `mowa train` for language models."""

import errno
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mowa.adapters import causal
from mowa.cli.main import main
from mowa.training.config import dispatch
from tests.training.causal import chats


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    plan = dispatch.parse(chats.recipe(folder, optimizer__max_steps=10, evaluation__eval_steps=5), "test")
    dispatch.train(plan, folder / "adapter", threads=1)
    return folder / "adapter"


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code, *capsys.readouterr()


def test_show(capsys, adapter):
    code, out, _ = run(capsys, "adapter", "show", adapter)
    assert code == 0
    assert "LoRA of a language model" in out
    assert "accuracy" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_writes_a_checkpoint_that_agrees(capsys, adapter, tmp_path, dtype):
    code, out, err = run(capsys, "adapter", "merge", adapter, "-o", tmp_path / "whole", "--dtype", dtype)
    assert (code, out.endswith(f"\n{tmp_path / 'whole'}\n")) == (0, True), err
    assert f"merged in {dtype}, held-out data  " in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype == getattr(torch, dtype)


def test_merge_compares_on_data_or_on_built_in_prompts(capsys, adapter, tmp_path):
    named = chats.conversations(tmp_path / "others.jsonl", 5)
    code, out, _ = run(
        capsys, "adapter", "merge", adapter, "-o", tmp_path / "one", "--data", named, "--dtype", "float32"
    )
    assert (code, f"merged in float32, {named}  " in out) == (0, True)
    data = adapter.parent / "chats.jsonl"
    data.rename(tmp_path / "away")
    try:
        code, out, _ = run(capsys, "adapter", "merge", adapter, "-o", tmp_path / "two", "--dtype", "float32")
    finally:
        (tmp_path / "away").rename(data)
    assert (code, "eight built-in prompts  " in out) == (0, True)


def test_a_merge_that_differs_is_not_written(capsys, adapter, tmp_path, monkeypatch):
    merge = causal.merge_adapter

    def flipped(model, dtype):
        merged = merge(model, dtype)
        with torch.no_grad():
            merged.net.lm_head.weight.copy_(merged.net.lm_head.weight.flip(0))
        return merged

    monkeypatch.setattr(causal, "merge_adapter", flipped)
    code, _, err = run(capsys, "adapter", "merge", adapter, "-o", tmp_path / "whole", "--dtype", "bfloat16")
    assert (code, "the merged model differs from the trained one" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(capsys, adapter, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    code, _, err = run(capsys, "adapter", "merge", adapter, "-o", tmp_path / "whole")
    assert (code, "cannot be written: No space left on device" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_another_base_model_is_refused(capsys, adapter, tmp_path):
    other = chats.model(tmp_path / "other", hidden_size=16)
    code, _, err = run(capsys, "adapter", "merge", adapter, "-o", tmp_path / "whole", "-m", other)
    assert (code, "was trained over" in err) == (2, True)


def test_explain(capsys, adapter):
    code, out, _ = run(capsys, "explain", adapter.parent / "base", "--packing", "--device", "cpu")
    assert code == 0
    assert "documents" in out
    code, out, _ = run(capsys, "explain", adapter.parent / "base", "--device", "cuda:9.0")
    assert (code, "sdpa" in out or "flash" in out) == (0, True)


def test_training_from_options(capsys, adapter, tmp_path):
    base, data = adapter.parent / "base", adapter.parent / "chats.jsonl"
    options = {
        "task": "causal",
        "model": base,
        "data": data,
        "max-steps": 3,
        "data.hold-out": 0.2,
        "batch.tokens": 2048,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    code, out, err = run(capsys, "train", *flags, "-o", tmp_path / "out", "--threads", 1)
    assert (code, out) == (0, f"{tmp_path / 'out'}\n"), err
    assert "⟦" in err  # the trained tokens are highlighted
    assert json.loads((tmp_path / "out" / "report.json").read_text())["global_step"] == 3


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([[("user", "hi"), ("robot", "hello")]], "robot"),
        ([[("user", ""), ("assistant", "hello")]], "empty"),
        ([[("user", "hi")]], "assistant"),
    ],
)
def test_invalid_conversations_are_reported(capsys, adapter, tmp_path, rows, word):
    data = tmp_path / "bad.jsonl"
    turns = [[{"role": role, "content": content} for role, content in row] for row in rows]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    base = adapter.parent / "base"
    code, _, err = run(
        capsys, "train", "--task", "causal", "--model", base, "--data", data, "--dev", data, "-o", tmp_path / "out"
    )
    assert (code, word in err) == (2, True), err
