"""The examples of docs/python.md run, in order, with small models under the names that the page uses."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import soundfile

from mowa.io import hub
from tests.checkpoints import clip, corpus
from tests.training.causal import chats

ROOT = Path(__file__).parents[2]


def test_the_examples_run(tmp_path, monkeypatch):
    chats.model(tmp_path / "chat")
    chats.conversations(tmp_path / "chats.jsonl")
    monkeypatch.setitem(hub.MODEL_ALIASES, "polish", str(ROOT / "tests" / "assets" / "micro"))
    monkeypatch.setitem(hub.MODEL_ALIASES, "HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "chat"))
    soundfile.write(tmp_path / "talk.wav", clip(0, 40_000), 16_000)
    corpus(tmp_path, 8)
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "dev.jsonl")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) > 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = "\n".join(blocks).replace("max_steps=20", "max_steps=2")
        exec(compile(code, "docs/python.md", "exec"), {})
    assert "is a speech model" in printed.getvalue()
    assert "missing.wav failed:" in printed.getvalue()
    assert {"medical", "medical-merged", "medical-int8", "clinic"} <= {one.name for one in tmp_path.iterdir()}
