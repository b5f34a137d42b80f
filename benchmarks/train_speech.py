"""Fine-tuning a full-size XLSR-53: seconds of audio per second and peak memory, beside transformers' usual loop.

    python -m benchmarks.train_speech [--steps 6] [--rounds 3] [--methods lora encoder]
    python -m benchmarks.train_speech --steps 3 --rounds 1 --methods lora --record ''      # a check, ten minutes

The network has XLSR-53's shape (24 layers of width 1024, 315 M parameters) and random weights; the recordings are noise
of 1 to 15 s, 8 s on average, with random characters. Both sides get the same recordings in the same order, eight per
batch (64 s), bf16 autocast, gradient checkpointing, a frozen convolutional front end, and AdamW. The peer does what
transformers' run_speech_recognition_ctc.py does: `Trainer` with a collator that pads every batch to its longest
recording; LoRA by `peft.get_peft_model`. Every run is a process of its own; memory is the peak resident set (on a GPU,
torch's peak). The first two steps are not timed.
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
import soundfile

from benchmarks import record
from benchmarks.tables import markdown
from benchmarks.transcribe import checkpoint
from benchmarks.views import VIEWS

WARMUP_STEPS = 2
CHARACTERS = "aąbcćdeęfghijklłmnńoóprsśtuwyzźż"
RANK = 16


def write_corpus(folder: Path, count: int) -> Path:
    """Write noise as files, and a manifest in the order in which both sides get them."""
    manifest = folder / f"noise-{count}.jsonl"
    if manifest.exists():
        return manifest
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        seconds = float(rng.uniform(1, 15))
        file = folder / f"noise-{index}.wav"
        soundfile.write(file, rng.standard_normal(int(seconds * 16_000)).astype(np.float32) * 0.1, 16_000)
        text = "".join(rng.choice(list(CHARACTERS + "    "), int(seconds * 8)))
        rows.append({"id": str(index), "audio": file.name, "text": " ".join(text.split()), "duration_s": seconds})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def step_clock() -> Any:
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.ticks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ticks.append(time.perf_counter())

    return StepClock()


def read_manifest(manifest: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return [row | {"audio": str(manifest.parent / row["audio"])} for row in rows]


def run_mowa(model: str, manifest: Path, method: str, steps: int, out: Path) -> dict[str, Any]:
    from mowa import hardware

    hardware.enable_huge_pages()  # as `mowa train` does
    from mowa.loading import load
    from mowa.training import loop
    from mowa.training.config import ctc
    from mowa.training.ctc import trainer as ctc_trainer
    from mowa.types import Example

    rows = read_manifest(manifest)
    recipe = ctc.parse(
        {
            "model": model,
            "method": method,
            "data": {"train": str(manifest), "dev": str(manifest), "max_eval_samples": 1},
            "lora": {"rank": RANK, "alpha": 32},
            "optimizer": {"max_steps": steps, "precision": "bf16", "gradient_checkpointing": True},
            "batch": {"seconds": 130.0},
            "evaluation": {"eval_steps": steps + 1},
        },
        "benchmark",
    )
    run = loop.prepare(ctc_trainer.TASK, recipe, load(model), out)
    examples = [Example(row["id"], row["audio"], row["text"], row["duration_s"]) for row in rows]
    run.batches[:] = [examples[8 * step : 8 * step + 8] for step in range(steps)]
    clock = step_clock()
    with ctc_trainer.training_patches(run.model.net, run):
        trainer, *_ = ctc_trainer.build_trainer(run, out, None)
        trainer.add_callback(clock)
        trainer.args.eval_on_start = False
        trainer.args.eval_strategy = "no"
        trainer.args.save_strategy = "no"
        trainer.train()
    return summarize(rows, clock.ticks)


def run_transformers(model: str, manifest: Path, method: str, steps: int, out: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCTC, AutoProcessor, Trainer, TrainingArguments

    rows = read_manifest(manifest)
    processor = AutoProcessor.from_pretrained(model)
    net = AutoModelForCTC.from_pretrained(model, ctc_loss_reduction="mean", ctc_zero_infinity=True)
    net.freeze_feature_encoder()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        linears = ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]
        settings = LoraConfig(r=RANK, lora_alpha=32, target_modules=linears, modules_to_save=["lm_head"])
        net = get_peft_model(net, settings)

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            samples, _ = soundfile.read(rows[index]["audio"], dtype="float32")
            values = processor.feature_extractor(samples, sampling_rate=16_000).input_values[0]
            return {"input_values": values, "labels": processor.tokenizer(rows[index]["text"]).input_ids}

    def collate(items: list[dict[str, Any]]) -> Any:
        batch = processor.feature_extractor.pad(
            [{"input_values": item["input_values"]} for item in items], padding=True, return_tensors="pt"
        )
        labels = processor.tokenizer.pad(
            {"input_ids": [item["labels"] for item in items]}, padding=True, return_tensors="pt"
        )
        batch["labels"] = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), -100)
        return batch

    clock = step_clock()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=True,
        learning_rate=3e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=1,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(model=net, args=arguments, train_dataset=Clips(), data_collator=collate, callbacks=[clock])
    trainer.train()
    return summarize(rows, clock.ticks)


def summarize(rows: list[dict[str, Any]], ticks: list[float]) -> dict[str, Any]:
    import torch

    from mowa import hardware

    audio_s = sum(row["duration_s"] for row in rows[8 * WARMUP_STEPS : 8 * len(ticks)])
    spent = ticks[-1] - ticks[WARMUP_STEPS - 1]
    peak = hardware.peak_rss_bytes() / 2**30
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {"audio_s_per_s": audio_s / spent, "s_per_step": spent / (len(ticks) - WARMUP_STEPS), "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["lora", "encoder"])
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    record.add_argument(parser, "train-speech")
    given = parser.parse_args()
    if given.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be above {WARMUP_STEPS}, which are not timed")
    model, manifest = checkpoint(given.folder / "xlsr-random"), write_corpus(given.folder / "noise", 8 * given.steps)
    if given.one:
        side, method = given.one
        run = {"mowa": run_mowa, "transformers": run_transformers}[side]
        print(json.dumps(run(str(model), manifest, method, given.steps, given.folder / f"train-{side}-{method}")))
        return
    rows: list[record.Row] = [
        {"method": method, "side": side} for method in given.methods for side in ("transformers", "mowa")
    ]
    for _ in range(given.rounds):
        for row in rows:
            again = ["--one", row["side"], row["method"], "--steps", str(given.steps), "--folder", str(given.folder)]
            command = [sys.executable, "-m", "benchmarks.train_speech", *again]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                row.setdefault(key, []).append(round(value, 3))
    print(markdown(VIEWS["train-speech"]["table"], rows))
    record.write(given.record, rows, rounds=given.rounds)


if __name__ == "__main__":
    main()
