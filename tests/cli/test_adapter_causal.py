"""`mowa adapt` and `mowa explain` for language models, as somebody types them."""

import errno
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mowa import loading
from mowa.adapters import causal
from mowa.cli.main import main
from mowa.training.config import dispatch
from tests.training.causal import chats


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    plan = dispatch.parse(chats.recipe(folder, optimise__steps=10, evaluate__every=5), "test")
    dispatch.train(plan, loading.load(plan.model), folder / "adapter", threads=1)
    return folder / "adapter"


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_show_says_what_it_is(capsys, adapter):
    code, out, _ = run(capsys, "adapt", "show", adapter)
    assert code == 0
    assert "low-rank updates (LoRA) of a language model" in out
    assert "right" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_writes_a_checkpoint_that_agrees(capsys, adapter, tmp_path, dtype):
    code, out, err = run(capsys, "adapt", "merge", adapter, "-o", tmp_path / "whole", "--dtype", dtype)
    assert (code, out) == (0, f"{tmp_path / 'whole'}\n"), err
    assert f"merged in {dtype}, what the run held out: over" in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype == getattr(torch, dtype)


def test_merge_compares_over_data_that_is_named_or_questions(capsys, adapter, tmp_path):
    named = chats.conversations(tmp_path / "others.jsonl", 5)
    code, _, err = run(capsys, "adapt", "merge", adapter, "-o", tmp_path / "one", "--data", named, "--dtype", "float32")
    assert (code, f"{named}: over" in err) == (0, True)
    data = adapter.parent / "chats.jsonl"
    data.rename(tmp_path / "away")
    try:
        code, _, err = run(capsys, "adapt", "merge", adapter, "-o", tmp_path / "two", "--dtype", "float32")
    finally:
        (tmp_path / "away").rename(data)
    assert (code, "eight questions: over" in err) == (0, True)


def test_a_merge_that_is_something_else_is_not_written(capsys, adapter, tmp_path, monkeypatch):
    merge = causal.merge_adapter

    def spoilt(model, dtype):
        merged = merge(model, dtype)
        with torch.no_grad():
            merged.net.lm_head.weight.copy_(merged.net.lm_head.weight.flip(0))
        return merged

    monkeypatch.setattr(causal, "merge_adapter", spoilt)
    code, _, err = run(capsys, "adapt", "merge", adapter, "-o", tmp_path / "whole", "--dtype", "bfloat16")
    assert (code, "the merged model is not what was trained" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(capsys, adapter, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    code, _, err = run(capsys, "adapt", "merge", adapter, "-o", tmp_path / "whole")
    assert (code, "cannot be written: No space left on device" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_another_is_refused(capsys, adapter, tmp_path):
    other = chats.model(tmp_path / "other", hidden_size=16)
    code, _, err = run(capsys, "adapt", "merge", adapter, "-o", tmp_path / "whole", "-m", other)
    assert (code, "as its base" in err) == (2, True)


def test_explain_says_which_layer_and_why(capsys, adapter):
    code, out, _ = run(capsys, "explain", adapter.parent / "base", "--packed", "--device", "cpu")
    assert code == 0
    assert "documents" in out
    code, out, _ = run(capsys, "explain", adapter.parent / "base", "--device", "cuda:9.0")
    assert (code, "sdpa" in out or "flash" in out) == (0, True)


def test_a_whole_run_from_flags(capsys, adapter, tmp_path):
    base, data = adapter.parent / "base", adapter.parent / "chats.jsonl"
    knobs = {"task": "causal", "model": base, "data": data, "steps": 3, "data.hold-out": 0.2, "batch.tokens": 2048}
    flags = [part for name, value in knobs.items() for part in (f"--{name}", value)]
    code, out, err = run(capsys, "train", *flags, "-o", tmp_path / "out", "--threads", 1)
    assert (code, out) == (0, f"{tmp_path / 'out'}\n"), err
    assert "⟦" in err  # what is learnt was shown
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[("user", "hi"), ("robot", "hello")]], "robot"),
        ([[("user", ""), ("assistant", "hello")]], "empty"),
        ([[("user", "hi")]], "assistant"),
    ],
)
def test_conversations_that_are_none_are_said(capsys, adapter, tmp_path, rows, said):
    data = tmp_path / "bad.jsonl"
    turns = [[{"role": role, "content": content} for role, content in row] for row in rows]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    base = adapter.parent / "base"
    code, _, err = run(
        capsys, "train", "--task", "causal", "--model", base, "--data", data, "--dev", data, "-o", tmp_path / "out"
    )
    assert (code, said in err) == (2, True), err
