"""Fine-tuning a language model: tokens a second and peak memory, beside TRL (padded, packed) and Unsloth.

    python benchmarks/train_text.py [--model build/smollm2] [--steps 20] [--arms padded packed unsloth mowa]
    python benchmarks/train_text.py --vocabulary 262144 --length 4096 --steps 3     # peak memory, random weights

Every arm learns once from the same conversations (benchmarks/packages_task.py makes them: their lengths have the long
tail that chats have), 16 for each of `--steps`, with the same LoRA (rank 16 on every linear), AdamW at a constant
rate, precision, seed and loss (every token). Each is a process of its own on two threads, the arms take turns, and the
medians of `--rounds` are printed. A step is about 2,100 real tokens: the padded arms take two batches of 8
conversations, the packed ones one row of `--length`. Tokens are the real ones; a step's speed counts from the third on;
memory is the peak resident set of the process, and what of it came after the model was loaded. Every step's gradient
norm must be above 0. Held-out loss is measured on the trained net by transformers' own loss, one conversation at a
time. Losses are drawn over the tokens seen.

padded: TRL's SFTTrainer as it comes; packed: with `packing=True` (bfd; attention "sdpa"); unsloth: FastLanguageModel
and its own SFTTrainer, which turns packing off on a CPU; unsloth-compiled: the same with UNSLOTH_CPU_COMPILE=1; mowa:
`mowa train`. TRL and Unsloth turn gradient checkpointing on by default; here it is off in every arm unless
`--checkpointing`. Speeds on shared machines are noisy: read the ratios.
Unsloth lives in an environment of its own (benchmarks/unsloth_env.sh); its arm is left out where that is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from arms import RUNNERS

ARMS = ("padded", "packed", "unsloth", "mowa")
UNSLOTH = Path("build/envs/unsloth/bin/python")
WARM = 2  # steps that are not timed
COLOURS = {"padded": "#888888", "packed": "#1f77b4", "unsloth": "#2ca02c", "mowa": "#d62728"}


def wide(model: str, vocabulary: int, folder: Path) -> str:
    """Four layers of random weights with that vocabulary and the model's tokenizer, for the memory of the logits."""
    out = folder / f"wide-{vocabulary}"
    if (out / "config.json").exists():
        return str(out)
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


def run(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """One arm in a process of its own."""
    python = str(UNSLOTH.absolute()) if arm.startswith("unsloth") else sys.executable
    again = [python, str(Path(__file__).resolve()), "--one", arm, "--model", given.model]
    for name in ("data", "dev", "steps", "length", "precision", "folder", "vocabulary"):
        again += [f"--{name}", str(getattr(given, name))]
    again += ["--checkpointing"] if given.checkpointing else []
    around = os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    if arm == "unsloth-compiled":
        around["UNSLOTH_CPU_COMPILE"] = "1"
    # Unsloth writes what it generates into the folder it is run in, so no arm runs here.
    place = given.folder / "run"
    place.mkdir(parents=True, exist_ok=True)
    errors = given.folder / f"{arm}.log"
    with errors.open("w") as log:
        done = subprocess.run(again, cwd=place, env=around, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode:
        last = "\n".join(errors.read_text().splitlines()[-8:])
        raise SystemExit(f"{arm} failed; its last lines ({errors}):\n{last}")
    return json.loads(done.stdout.splitlines()[-1])


def speed(result: dict[str, Any], of: str = "seconds") -> float:
    """Real tokens a second, the median of the steps after the warm-up."""
    pairs = list(zip(result["tokens"], result[of], strict=True))
    return statistics.median(tokens / spent for tokens, spent in pairs[WARM:] or pairs)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    columns: dict[str, Any] = {
        "tokens a second": speed,
        "tokens a processor second": lambda one: speed(one, "processor_s"),
        "peak GiB": lambda one: one["peak_gib"],
        "of it training": lambda one: one["grown_gib"],
        "tokens": lambda one: sum(one["tokens"]),
        "steps": lambda one: len(one["tokens"]),
        "held-out loss": lambda one: one["held_out"],
    }
    middle = {
        arm: {name: statistics.median(value(one) for one in runs) for name, value in columns.items()}
        for arm, runs in results.items()
    }
    lines = ["| arm | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for arm, row in middle.items():
        cells = [f"{row[name]:.0f}" if row[name] > 40 or name == "steps" else f"{row[name]:.3f}" for name in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    ours = middle.get("mowa")
    for arm, row in middle.items():
        if ours and arm != "mowa":
            ratios = [f"{name} {ours[name] / row[name]:.2f}" for name in list(columns)[:4]]
            lines.append(f"\nmowa over {arm}: " + ", ".join(ratios))
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for arm, runs in results.items():
        seen, total = [], 0.0
        for tokens in runs[0]["tokens"]:
            total += tokens
            seen.append(total / 1000)
        axes.plot(seen, runs[0]["loss"], label=arm, color=COLOURS.get(arm), linewidth=1.4)
    axes.set_xlabel("thousand tokens learnt from")
    axes.set_ylabel("loss of a token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2", help="a folder of transformers' format")
    parser.add_argument("--data", type=Path, default=Path("build/packages/synopses/train.jsonl"))
    parser.add_argument("--dev", type=Path, default=Path("build/packages/synopses/dev.jsonl"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(RUNNERS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument(
        "--precision",
        default="autocast",
        choices=("autocast", "bfloat16", "float32"),
        help="autocast: float32 weights, bf16 computing (TRL's default); bfloat16: bf16 frozen weights too (Unsloth's)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in every arm")
    parser.add_argument("--vocabulary", type=int, default=0, help="random weights with so large a vocabulary")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/text"))
    parser.add_argument("--picture", type=Path, help="where the losses are drawn; docs/pictures/text-losses.png")
    parser.add_argument("--one", choices=list(RUNNERS), help="run one arm in this process and print its JSON")
    given = parser.parse_args()
    for name in ("data", "dev", "folder"):
        setattr(given, name, getattr(given, name).resolve())
    given.model = str(Path(given.model).resolve())
    if given.one:
        print(json.dumps(RUNNERS[given.one](given)))
        return
    if given.vocabulary:
        given.model = wide(given.model, given.vocabulary, given.folder)
    if not UNSLOTH.exists():
        print(f"no {UNSLOTH}: run benchmarks/unsloth_env.sh to measure Unsloth too", file=sys.stderr)
        given.arms = [arm for arm in given.arms if not arm.startswith("unsloth")]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in given.arms}
    for _ in range(given.rounds):
        for arm, runs in results.items():
            runs.append(run(arm, given))
    (given.folder / "results.json").write_text(json.dumps(results))
    print(table(results))
    if given.picture:
        draw(results, given.picture)


if __name__ == "__main__":
    main()
