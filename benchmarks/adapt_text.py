"""A language model tuned on a small real task, on a processor: what it gets right before, after, and merged.

    python benchmarks/adapt_text.py [--model build/smollm2] [--rows 1000] [--out build/adapt-text]

The task is that of packages_task.py: of which section of the Debian archive a package is, by its description (ten
sections, equally many of each; guessing gets 10 %). An answer is right if what the model says first, greedily and
without sampling, is the name of the section. `mowa train` learns from --rows descriptions, and `mowa adapt merge` makes
checkpoints in the base's precision and in bfloat16, each compared with base and adapter before it is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

TASK = Path("build/packages")
RECIPE = """\
task: causal
model: {model}
train: lora
lora: {{rank: 16, alpha: 32.0}}
data: {{train: {train}, dev: {dev}, length: 512, measured: 50}}
batch: {{tokens: 2048}}
optimise: {{epochs: 1, learning_rate: 5.0e-4}}
evaluate: {{every: {every}}}
"""


def mowa(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "mowa", *arguments], check=True)


def questions(path: Path) -> list[tuple[list[dict[str, str]], str]]:
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [(row[:-1], row[-1]["content"]) for row in rows]


def answered(net: Any, tokenizer: Any, asked: list[tuple[list[dict[str, str]], str]]) -> np.ndarray:
    """For each question, whether the greedy answer begins with what was wanted."""
    import torch

    right = []
    for turns, wanted in asked:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        said = net.generate(ids, **how, pad_token_id=tokenizer.eos_token_id)[0, ids.shape[1] :]
        right.append(tokenizer.decode(said, skip_special_tokens=True).strip().lower() == wanted.lower())
    return np.array(right)


def spoken(right: np.ndarray) -> str:
    """A share with its 95 % interval (bootstrap)."""
    draws = np.random.default_rng(0).choice(right, (2000, len(right))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{right.mean():.1%} ({low:.1%}–{high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=100, help="held-out descriptions to be asked about")
    parser.add_argument("--out", type=Path, default=Path("build/adapt-text"))
    given = parser.parse_args()
    from mowa.adapters import causal
    from mowa.loading.causal import load

    given.out.mkdir(parents=True, exist_ok=True)
    train = given.out / "train.jsonl"
    train.write_text("".join((TASK / "train.jsonl").read_text().splitlines(keepends=True)[: given.rows]))
    recipe = given.out / "recipe.yaml"
    steps = given.rows * 150 // 2048
    recipe.write_text(RECIPE.format(model=given.model, train=train, dev=TASK / "dev.jsonl", every=max(1, steps // 6)))
    asked = questions(TASK / "test.jsonl")[: given.questions]
    base = load(given.model)

    def ask(name: str, model: Any) -> None:
        print(f"{name:<18} {spoken(answered(model.net, model.tokenizer, asked))} of {len(asked)} right", flush=True)

    ask("before", base)
    began = time.time()
    mowa("train", str(recipe), "-o", str(given.out / "adapter"))
    minutes = (time.time() - began) / 60
    print(f"{given.rows} descriptions learnt in {minutes:.1f} minutes")
    ask("adapter", causal.load_adapter(base, given.out / "adapter"))
    for dtype in ("float32", "bfloat16"):
        folder = given.out / f"merged-{dtype}"
        mowa("adapt", "merge", str(given.out / "adapter"), "-o", str(folder), "--dtype", dtype)
        ask(f"merged, {dtype}", load(str(folder), dtype=dtype))


if __name__ == "__main__":
    main()
