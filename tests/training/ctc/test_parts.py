"""Parts of recordings are trained on as if each were a file."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

from mowa import loading
from mowa.training.config import ctc, dispatch, schema
from tests.checkpoints import corpus, tiny

SHORT = {
    "method": "head",
    "optimizer.max_steps": 2,
    "optimizer.precision": "float32",
    "batch.seconds": 4.0,
    "evaluation.eval_steps": 2,
}


def train(base, source, out):
    """Return the recordings that were evaluated, and the head after training."""
    tree = {"model": str(base), "data": {"train": [str(source)], "dev": [str(source)]}}
    recipe = ctc.parse(schema.apply_overrides(tree, SHORT), "test")
    dispatch.train(recipe, out, model=loading.load(recipe.model), threads=1)
    report = json.loads((out / "report.json").read_text())
    return report["metrics"]["dev"]["recordings"], load_file(out / "model.safetensors")["lm_head.weight"]


def test_parts_of_a_recording_are_trained_on_like_files(tmp_path):
    base = tiny(tmp_path / "base", conv_dim=(8,) * 7, intermediate_size=32)
    manifest = Path(corpus(tmp_path / "corpus", 8))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    clips = [soundfile.read(manifest.parent / row["audio"], dtype="float32")[0] for row in rows]
    soundfile.write(tmp_path / "long.wav", np.concatenate(clips), 16_000)
    ends = np.cumsum([len(one) for one in clips]) / 16_000
    parts = [
        {"id": row["id"], "audio": "long.wav", "text": row["text"], "start": end - row["duration_s"], "end": end}
        for row, end in zip(rows, ends, strict=True)
    ]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts))
    before = load_file(base / "model.safetensors")["lm_head.weight"]
    (count, expected), (found_count, found) = (
        train(base, source, tmp_path / name) for name, source in (("a", manifest), ("b", tmp_path / "parts.jsonl"))
    )
    assert count == found_count == 8
    assert (expected - before).abs().max() > 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
