"""Fine-tune a language model on a small real task on a CPU: right answers before, after, and merged.

    python -m benchmarks.finetune_text [--samples 1000] [--questions 60]
    python -m benchmarks.finetune_text --samples 40 --questions 4 --record ''      # a check, three minutes

The model is SmolLM2-135M-Instruct (`smollm2`), the task is `debian_packages`' sections: name the section of the Debian
archive that a package is in, by its description (ten sections, equally many of each; guessing gets 10 %). An answer is
right if the greedy output is the name of the section. `mowa train` fine-tunes on --samples descriptions, and `mowa
adapter merge` writes checkpoints in float32 and bfloat16. Loss and accuracy are those of the run's report over 50
held-out conversations; merged models are compared with base and adapter over the descriptions that are asked about,
and the base with itself in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.tables import markdown
from benchmarks.views import VIEWS

RECIPE = """\
task: causal
model: {model}
method: lora
lora: {{rank: 16, alpha: 32.0}}
data: {{train: {train}, dev: {dev}, max_length: 512, max_eval_samples: 50}}
batch: {{tokens: 2048}}
optimizer: {{epochs: 1, learning_rate: 5.0e-4}}
evaluation: {{eval_steps: {eval_steps}}}
"""


def run_mowa(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "mowa", *arguments], check=True)


def read_samples(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def right_answers(model: Any, samples: list[list[dict[str, str]]]) -> np.ndarray:
    """For each sample, whether the greedy answer is its last message."""
    import torch

    right = []
    for messages in samples:
        ids = model.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        output = model.net.generate(ids, **options, pad_token_id=model.tokenizer.eos_token_id)[0, ids.shape[1] :]
        answer = model.tokenizer.decode(output, skip_special_tokens=True).strip().lower()
        right.append(answer == messages[-1]["content"].lower())
    return np.array(right)


def estimate(right: np.ndarray) -> dict[str, float]:
    """The share of right answers with its 95 % interval (bootstrap)."""
    from mowa.tasks.metrics import bootstrap_mean

    return {edge: round(value, 4) for edge, value in asdict(bootstrap_mean(right)).items()}


def drift(first: Any, second: Any, samples: list[list[dict[str, str]]]) -> dict[str, float]:
    """How far two models' next-token distributions are apart."""
    import torch

    from mowa.adapters import causal

    def batches() -> Iterator[dict[str, Any]]:
        for messages in samples:
            ids = torch.tensor([first.tokenizer.apply_chat_template(messages)["input_ids"]])
            yield {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    found = causal.compare_logits(first, second, batches())
    return {"agreement": round(found.agreement, 5), "kl": round(found.kl, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in transformers' format instead of SmolLM2")
    parser.add_argument("--samples", type=int, default=1000, help="descriptions to train on [1000]")
    parser.add_argument("--questions", type=int, default=60, help="held-out descriptions to ask about [60]")
    parser.add_argument("--folder", type=Path, default=Path("build/finetune-text"))
    record.add_argument(parser, "finetune-text")
    given = parser.parse_args()
    from benchmarks import debian_packages, smollm2
    from mowa.adapters import causal
    from mowa.loading.causal import load

    name, task = given.model or str(smollm2.prepare()), debian_packages.prepare()
    given.folder.mkdir(parents=True, exist_ok=True)
    train, recipe, run = (given.folder / part for part in ("train.jsonl", "recipe.yaml", "adapter"))
    train.write_text("".join((task / "train.jsonl").read_text().splitlines(keepends=True)[: given.samples]))
    eval_steps = max(1, given.samples * 150 // 2048 // 6)
    recipe.write_text(RECIPE.format(model=name, train=train, dev=task / "dev.jsonl", eval_steps=eval_steps))
    samples = read_samples(task / "test.jsonl")[: given.questions]
    base = load(name)
    before: record.Row = {"stage": "before", "answers_right": estimate(right_answers(base, samples))}
    run_mowa("train", str(recipe), "-o", str(run))
    report = json.loads((run / "report.json").read_text())
    adapted = causal.load_adapter(base, run)
    after: record.Row = {"stage": "adapter", "answers_right": estimate(right_answers(adapted, samples))}
    for row, metrics in ((before, report["baseline_metrics"]), (after, report["metrics"])):
        (found,) = metrics.values()
        row |= {"loss": round(found["loss"], 4), "token_accuracy": round(found["accuracy"], 4)}
    rows = [before, after]
    for dtype in ("float32", "bfloat16"):
        folder = given.folder / f"merged-{dtype}"
        run_mowa("adapter", "merge", str(run), "-o", str(folder), "--dtype", dtype)
        merged = load(str(folder), dtype=dtype)
        row = {"stage": f"merged, {dtype}", "answers_right": estimate(right_answers(merged, samples))}
        rows.append(row | drift(adapted, merged, samples))
    rows.append({"stage": "base, bfloat16"} | drift(base, load(name, dtype="bfloat16"), samples))
    print(markdown(VIEWS["finetune-text"]["table"], rows))
    record.write(given.record, rows, samples=given.samples, questions=given.questions)


if __name__ == "__main__":
    main()
