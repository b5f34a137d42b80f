"""The arms of `train_text`: one fine-tuning run each, in the calling process, and what is measured of it.

An arm takes train_text's arguments and returns values that JSON can hold. This file is imported in Unsloth's
environment too, so it imports nothing but the standard library before an arm runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

BATCH, PER_STEP = 8, 16  # conversations per padded batch, and per step
RANK, ALPHA, RATE = 16, 32, 2e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_conversations(path: Path, count: int, start: int = 0) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, start, start + count)]


def training_conversations(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the conversations of this round: other ones in every round, the same ones for every arm."""
    count = PER_STEP * given.steps
    return read_conversations(given.data, count, given.round * count)


def resident_gib(net: Any) -> float:
    """GiB of memory that the process holds. Weights are mapped from their file until read, so they are read first."""
    for weight in net.parameters():
        weight.detach().sum()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def peak_gib() -> float:
    from mowa import hardware

    return hardware.peak_rss_bytes() / 2**30


def step_clock() -> Any:
    """Return a callback that notes the time and the process time at the end of every step."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.ticks: list[float] = []
            self.cpu_ticks: list[float] = []

        def note(self) -> None:
            self.ticks.append(time.perf_counter())
            self.cpu_ticks.append(time.process_time())

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.note()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.note()

    return StepClock()


def summarize(
    clock: Any, history: list[dict[str, float]], before_gib: float, net: Any, given: argparse.Namespace
) -> dict[str, Any]:
    """Return an arm's steps, memory, and the trained network's held-out loss.

    `history` is the trainer's log with a line per step: loss, grad_norm, num_tokens (TRL's count of real tokens).
    """
    peak = peak_gib()
    lines = [line for line in history if "loss" in line]
    norms = [line["grad_norm"] for line in lines]
    if len(lines) != len(clock.ticks) - 1 or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise SystemExit(f"{given.one} was not trained at every step: gradient norms {norms}")
    seen = [0.0] + [line["num_tokens"] for line in lines]
    return {
        "arm": given.one,
        "tokens": [after - before for before, after in pairwise(seen)],
        "seconds": [after - before for before, after in pairwise(clock.ticks)],
        "cpu_seconds": [after - before for before, after in pairwise(clock.cpu_ticks)],
        "loss": [line["loss"] for line in lines],
        "peak_gib": peak,
        "training_gib": peak - before_gib,
        "held_out_loss": held_out_loss(net, given),
        "versions": versions(),
    }


def held_out_loss(net: Any, given: argparse.Namespace) -> float | None:
    """Mean loss per token of the dev conversations, outside autocast, one at a time; None with random weights."""
    if given.vocabulary or not given.held_out:
        return None
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    net.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in read_conversations(given.dev, given.held_out):
            ids = torch.tensor([tokenizer.apply_chat_template(row["messages"])["input_ids"]])
            logits = net(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total / count


def versions() -> dict[str, str]:
    from benchmarks.record import versions as of_packages

    return of_packages(("torch", "transformers", "trl", "peft", "unsloth"))


def trl_arguments(given: argparse.Namespace, packed: bool) -> dict[str, Any]:
    """Return the arguments of trl.SFTConfig that TRL's and Unsloth's arms share."""
    return {
        "output_dir": str(given.folder / given.one),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1 if packed else BATCH,
        "gradient_accumulation_steps": 1 if packed else PER_STEP // BATCH,
        "max_length": given.length,
        "packing": packed,
        "optim": "adamw_torch_fused",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": given.precision != "float32",
        "gradient_checkpointing": given.checkpointing,
        "use_cpu": True,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_trl(net: Any, tokenizer: Any, given: argparse.Namespace, packed: bool, **also: Any) -> dict[str, Any]:
    """Train with TRL's trainer, or with what Unsloth put in its place."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    before_gib, clock = resident_gib(net), step_clock()
    trainer = SFTTrainer(
        model=net,
        args=SFTConfig(**trl_arguments(given, packed)),
        train_dataset=Dataset.from_list(training_conversations(given)),
        processing_class=tokenizer,
        callbacks=[clock],
        **also,
    )
    trainer.train()
    return summarize(clock, trainer.state.log_history, before_gib, trainer.model, given)


def trl_arm(given: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(given.model, dtype=base_dtype(given), attn_implementation="sdpa")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM")
    return run_trl(net, AutoTokenizer.from_pretrained(given.model), given, given.one == "packed", peft_config=lora)


def unsloth_arm(given: argparse.Namespace) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # before transformers and trl, which it changes

    keep = {"use_gradient_checkpointing": given.checkpointing}
    net, tokenizer = FastLanguageModel.from_pretrained(
        given.model, max_seq_length=given.length, dtype=base_dtype(given), load_in_4bit=False, **keep
    )
    net = FastLanguageModel.get_peft_model(
        net, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=LINEARS, random_state=0, **keep
    )
    return run_trl(net, tokenizer, given, packed=False)


def base_dtype(given: argparse.Namespace) -> Any:
    """The dtype of the frozen weights."""
    import torch

    return torch.bfloat16 if given.precision == "bfloat16" else torch.float32


def mowa_arm(given: argparse.Namespace) -> dict[str, Any]:
    from mowa import hardware

    hardware.enable_huge_pages()  # as `mowa train` does
    from mowa.loading import load
    from mowa.models.causal import accelerate
    from mowa.training import loop
    from mowa.training.causal import trainer as causal_trainer
    from mowa.training.config import causal

    train = given.folder / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in training_conversations(given)))
    bfloat16 = given.precision == "bfloat16"
    recipe = causal.parse(
        {
            "model": given.model,
            "method": "lora",
            "lora": {"rank": RANK, "alpha": ALPHA},
            "data": {
                "train": str(train),
                "dev": str(given.dev),
                "train_on": "all",
                "max_length": given.length,
                "max_eval_samples": 1,
            },
            "batch": {"tokens": given.length},
            "optimizer": {
                "epochs": 1,
                "lr_scheduler": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
                "learning_rate": RATE,
                "betas": [0.9, 0.999],
                "precision": "float32" if given.precision == "float32" else "bf16",
                "gradient_checkpointing": given.checkpointing,
            },
            "memory": {"base_scheme": "bf16" if bfloat16 else "float32"},
        },
        "benchmark",
    )
    model = load(given.model, dtype="bfloat16" if bfloat16 else "float32")
    before_gib, clock = resident_gib(model.net), step_clock()
    run = loop.prepare(causal_trainer.TASK, recipe, model, given.folder / "mowa")
    trainer, progress = causal_trainer.build_trainer(run, given.folder / "mowa", None)
    accelerate.accelerate(run.model.net, mlp_tiles=recipe.memory.mlp_tiles)
    trainer.args.logging_steps = 1
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.add_callback(clock)
    trainer.train()
    progress.close()
    accelerate.restore(run.model.net)
    return summarize(clock, trainer.state.log_history, before_gib, run.model.net, given)


RUNNERS = {"padded": trl_arm, "packed": trl_arm, "unsloth": unsloth_arm, "mowa": mowa_arm}
RUNNERS["unsloth-compiled"] = unsloth_arm
