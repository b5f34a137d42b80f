"""The arms of train_text.py, a fine-tuning each, in the process that calls it: what they share, what is measured.

An arm takes train_text's arguments and returns what JSON can hold. This file is read in Unsloth's environment too, so
it imports nothing but the standard library before an arm runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

BATCH, PER_STEP = 8, 16  # conversations a padded batch, and a step
RANK, ALPHA, RATE = 16, 32, 2e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HELD_OUT = 40  # conversations


def conversations(path: Path, count: int) -> list[dict[str, Any]]:
    with path.open() as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def resident(net: Any) -> float:
    """GiB of memory that the process holds now. Weights are mapped from their file until read: they are read first."""
    for weight in net.parameters():
        weight.detach().sum()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def peak() -> float:
    from mowa import hardware

    return hardware.peak_rss_bytes() / 2**30


def clock() -> Any:
    """A callback that notes when each step ends, and the processor time spent by then."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ticks: list[float] = []
            self.spent: list[float] = []

        def note(self) -> None:
            self.ticks.append(time.perf_counter())
            self.spent.append(time.process_time())

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.note()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.note()

    return Clock()


def found(
    clock: Any, history: list[dict[str, float]], before: float, net: Any, given: argparse.Namespace
) -> dict[str, Any]:
    """What an arm prints: its steps, memory, and the trained net's held-out loss.

    `history` is the trainer's log with a line a step: loss, grad_norm, num_tokens (TRL's count of real tokens so far).
    """
    most = peak()
    lines = [line for line in history if "loss" in line]
    norms = [line["grad_norm"] for line in lines]
    if len(lines) != len(clock.ticks) - 1 or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise SystemExit(f"{given.one} did not learn at every step: gradient norms {norms}")
    seen = [0.0] + [line["num_tokens"] for line in lines]
    tokens = [after - already for already, after in pairwise(seen)]
    return {
        "arm": given.one,
        "tokens": tokens,
        "seconds": [b - a for a, b in pairwise(clock.ticks)],
        "processor_s": [b - a for a, b in pairwise(clock.spent)],
        "loss": [line["loss"] for line in lines],
        "grad_norm": norms,
        "peak_gib": most,
        "grown_gib": most - before,
        "held_out": held_out(net, given),
        "versions": versions(),
    }


def held_out(net: Any, given: argparse.Namespace) -> float:
    """Mean negative log-likelihood of a token of the dev conversations, outside autocast, one at a time."""
    if given.vocabulary:
        return math.nan
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    net.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in conversations(given.dev, HELD_OUT):
            ids = torch.tensor([tokenizer.apply_chat_template(row["messages"])["input_ids"]])
            scores = net(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total / count


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    names = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo")
    out = {}
    for name in names:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def settings(given: argparse.Namespace, packed: bool) -> dict[str, Any]:
    """The arguments of trl.SFTConfig that the three peers share."""
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


def taught(net: Any, tokenizer: Any, given: argparse.Namespace, packed: bool, **more: Any) -> dict[str, Any]:
    """TRL's trainer, or what Unsloth has put in its place, on a net as it was loaded."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    before, ticking = resident(net), clock()
    trainer = SFTTrainer(
        model=net,
        args=SFTConfig(**settings(given, packed)),
        train_dataset=Dataset.from_list(conversations(given.data, PER_STEP * given.steps)),
        processing_class=tokenizer,
        callbacks=[ticking],
        **more,
    )
    trainer.train()
    return found(ticking, trainer.state.log_history, before, trainer.model, given)


def trl_arm(given: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(given.model, dtype=held_in(given), attn_implementation="sdpa")
    low = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM")
    return taught(net, AutoTokenizer.from_pretrained(given.model), given, given.one == "packed", peft_config=low)


def unsloth_arm(given: argparse.Namespace) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # before transformers and trl, which it changes

    keep = {"use_gradient_checkpointing": given.checkpointing}
    net, tokenizer = FastLanguageModel.from_pretrained(
        given.model, max_seq_length=given.length, dtype=held_in(given), load_in_4bit=False, **keep
    )
    net = FastLanguageModel.get_peft_model(
        net, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=LINEARS, random_state=0, **keep
    )
    return taught(net, tokenizer, given, packed=False)


def held_in(given: argparse.Namespace) -> Any:
    """The dtype of the weights that do not learn."""
    import torch

    return torch.bfloat16 if given.precision == "bfloat16" else torch.float32


def mowa_arm(given: argparse.Namespace) -> dict[str, Any]:
    from mowa import hardware

    hardware.enable_huge_pages()  # as `mowa train` does
    from mowa.loading import load
    from mowa.models.causal import accelerate
    from mowa.training.causal import trainer as sft
    from mowa.training.config import causal

    few = given.folder / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in conversations(given.data, PER_STEP * given.steps)))
    plan = causal.parse(
        {
            "model": given.model,
            "data": {"train": str(few), "dev": str(given.dev), "learn": "all", "length": given.length, "measured": 1},
            "train": "lora",
            "lora": {"rank": RANK, "alpha": ALPHA},
            "batch": {"tokens": given.length},
            "optimise": {
                "epochs": 1,
                "schedule": "constant",
                "warmup": 0.0,
                "weight_decay": 0.0,
                "learning_rate": RATE,
                "betas": [0.9, 0.999],
                "precision": "float32" if given.precision == "float32" else "bf16",
                "checkpointing": given.checkpointing,
            },
            "memory": {"base": "bf16" if given.precision == "bfloat16" else "float32"},
        },
        "benchmark",
    )
    model = load(given.model, dtype="bfloat16" if given.precision == "bfloat16" else "float32")
    before, ticking = resident(model.net), clock()
    run = sft.prepare(plan, model)
    trainer, live = sft.build_trainer(run, given.folder / "mowa", None)
    accelerate.accelerate(run.model.net, mlp_tiles=plan.memory.mlp_tiles)
    trainer.args.logging_steps = 1
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.add_callback(ticking)
    trainer.train()
    live.close()
    accelerate.restore(run.model.net)
    return found(ticking, trainer.state.log_history, before, run.model.net, given)


RUNNERS = {"padded": trl_arm, "packed": trl_arm, "unsloth": unsloth_arm, "mowa": mowa_arm}
RUNNERS["unsloth-compiled"] = unsloth_arm
