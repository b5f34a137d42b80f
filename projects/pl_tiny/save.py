"""Write the results of a run: an ordinary checkpoint, the recipe, the log and the training curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mowa.io import processor
from mowa.models.ctc_encoder.chunk_mask import TrainedChunking, set_trained_chunking
from mowa.training.save import atomic_output_dir
from mowa.types import Preprocessing, Vocabulary
from projects.pl_tiny.batches import seconds_to_frames
from projects.pl_tiny.recipe import StagedRecipe, write_recipe


def save_checkpoint(
    net: Any, recipe: StagedRecipe, vocabulary: Vocabulary, preprocessing: Preprocessing, out: Path
) -> None:
    """Save a float16 checkpoint that `AutoModelForCTC` and `pipeline` load, and the recipe beside it."""
    with torch.no_grad():
        net.lm_head.bias[vocabulary.blank] += recipe.blank_bias
    for stage in recipe.stages:
        if (streaming := stage.streaming) is not None:
            chunks = sorted({seconds_to_frames(net.config, length) for length in streaming.chunk_s})
            lookaheads = sorted({seconds_to_frames(net.config, length) for length in streaming.lookahead_s})
            left_context = seconds_to_frames(net.config, streaming.left_context_s) or None
            sizes = tuple(frames for frames in chunks if frames)
            set_trained_chunking(net.config, TrainedChunking(sizes, left_context, tuple(lookaheads)))
    with atomic_output_dir(out) as folder:
        net.half().save_pretrained(folder)
        processor.write_processor(vocabulary, preprocessing, folder)
    write_recipe(recipe, out / "recipe.yaml")


def write_history(log: list[dict[str, Any]], recipe: StagedRecipe, out: Path) -> None:
    """Write the log as `history.jsonl`, and losses and dev-set error rates as `curve.png`."""
    (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for stage in recipe.stages:
        losses = [(row["step"], row["loss"]) for row in log if "loss" in row and row["stage"] == stage.name]
        left.plot(*zip(*losses, strict=True), label=stage.name)
    left.set(xlabel="step", ylabel="loss (each stage has its own)", yscale="log")
    left.legend()
    for key in sorted({key for row in log for key in row if key.startswith("eval_") and key.endswith("_cer")}):
        errors = [(row["step"], row[key] * 100) for row in log if key in row]
        right.plot(*zip(*errors, strict=True), "o-", markersize=3, label=key[5:-4])
    right.set(xlabel="step", ylabel="CER on dev sets, %", ylim=(0, 100))
    if right.lines:
        right.legend()
    figure.savefig(out / "curve.png", dpi=110)
    pyplot.close(figure)
