"""Fine-tuning a full-size XLSR-53: seconds of sound a second and peak memory, beside transformers' usual loop.

    python benchmarks/train_speech.py [--steps 10] [--folder build/bench] [--what lora encoder]

The net is XLSR-53's (24 layers, 1024 wide, 315 M parameters) with random weights; the recordings are noise of 1 to
15 s, 8 s on average, with random letters. Both sides get the same recordings in the same order, eight a batch (64 s),
bf16 autocast, gradient checkpointing, a frozen convolutional front end, AdamW. The peer is what transformers'
run_speech_recognition_ctc.py does: `Trainer` with a collator that pads every batch to its longest recording; LoRA by
`peft.get_peft_model`. Every run is a process of its own; memory is the peak resident set (on a GPU, torch's peak).
Speeds on shared machines are noisy: read the ratios. `--rounds` repeats, and the medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transcribe import checkpoint

WARM = 2  # steps that are not timed
LETTERS = "aąbcćdeęfghijklłmnńoóprsśtuwyzźż"
RANK = 16


def corpus(folder: Path, count: int) -> Path:
    """Noise as files and a manifest, in the order in which both sides hear them."""
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
        text = "".join(rng.choice(list(LETTERS + "    "), int(seconds * 8)))
        rows.append({"id": str(index), "audio": file.name, "text": " ".join(text.split()), "duration_s": seconds})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ticks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ticks.append(time.perf_counter())

    return Clock()


def read(manifest: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return [row | {"audio": str(manifest.parent / row["audio"])} for row in rows]


def with_mowa(model: str, manifest: Path, what: str, steps: int, out: Path) -> dict[str, Any]:
    from mowa import hardware

    hardware.enable_huge_pages()  # as `mowa train` does
    from mowa.loading import load
    from mowa.training.config import ctc
    from mowa.training.ctc import trainer as tune
    from mowa.training.ctc.setup import prepare
    from mowa.types import Example

    rows = read(manifest)
    plan = ctc.parse(
        {
            "model": model,
            "data": {"train": str(manifest), "dev": str(manifest), "measured": 1},
            "train": what,
            "lora": {"rank": RANK, "alpha": 32},
            "optimise": {"steps": steps, "precision": "bf16", "checkpointing": True},
            "batch": {"seconds": 130.0},
            "evaluate": {"every": steps + 1},
        },
        "benchmark",
    )
    run = prepare(plan, load(model), out)
    examples = [Example(row["id"], row["audio"], row["text"], row["duration_s"]) for row in rows]
    run.batches[:] = [examples[8 * step : 8 * step + 8] for step in range(steps)]
    ticking = clock()
    with tune.training_patches(run.model.net, run):
        trainer, *_ = tune.build_trainer(run, out, None)
        trainer.add_callback(ticking)
        trainer.args.eval_on_start = False
        trainer.args.eval_strategy = "no"
        trainer.args.save_strategy = "no"
        trainer.train()
    return timed(rows, ticking.ticks)


def with_transformers(model: str, manifest: Path, what: str, steps: int, out: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCTC, AutoProcessor, Trainer, TrainingArguments

    rows = read(manifest)
    processor = AutoProcessor.from_pretrained(model)
    net = AutoModelForCTC.from_pretrained(model, ctc_loss_reduction="mean", ctc_zero_infinity=True)
    net.freeze_feature_encoder()
    if what == "lora":
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

    ticking = clock()
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
    trainer = Trainer(model=net, args=arguments, train_dataset=Clips(), data_collator=collate, callbacks=[ticking])
    trainer.train()
    return timed(rows, ticking.ticks)


def timed(rows: list[dict[str, Any]], ticks: list[float]) -> dict[str, Any]:
    import torch

    from mowa import hardware

    heard = sum(row["duration_s"] for row in rows[8 * WARM : 8 * len(ticks)])
    spent = ticks[-1] - ticks[WARM - 1]
    peak = hardware.peak_rss_bytes() / 2**30
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {"audio_s_per_s": heard / spent, "s_per_step": spent / (len(ticks) - WARM), "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--what", nargs="+", default=["lora", "encoder"])
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    model, manifest = given.folder / "xlsr", corpus(given.folder / "noise", 8 * given.steps)
    if given.one:
        side, what = given.one
        runner = {"mowa": with_mowa, "transformers": with_transformers}[side]
        out = given.folder / f"train-{side}-{what}"
        print(json.dumps(runner(str(model), manifest, what, given.steps, out)))
        return
    checkpoint(model)
    print("| what learns | side | s of sound a second | s a step | peak GiB |\n|---|---|---|---|---|")
    for what in given.what:
        found: dict[str, list[dict[str, float]]] = {"transformers": [], "mowa": []}
        for _ in range(given.rounds):
            for side, results in found.items():
                again = ["--one", side, what, "--steps", str(given.steps), "--folder", str(given.folder)]
                done = subprocess.run([sys.executable, __file__, *again], stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        middle = {
            side: {key: statistics.median(result[key] for result in results) for key in results[0]}
            for side, results in found.items()
        }
        for side, row in middle.items():
            print(f"| {what} | {side} | {row['audio_s_per_s']:.2f} | {row['s_per_step']:.1f} | {row['peak_gib']:.2f} |")
        ours, theirs = middle["mowa"], middle["transformers"]
        print(
            f"| {what} | ratio | {ours['audio_s_per_s'] / theirs['audio_s_per_s']:.2f} | "
            f"{ours['s_per_step'] / theirs['s_per_step']:.2f} | {ours['peak_gib'] / theirs['peak_gib']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
