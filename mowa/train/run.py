"""A recipe → a trained checkpoint, with the stock `transformers.Trainer`: nothing of it is overridden or patched.

A run that was broken off resumes from the last checkpoint in the output folder, with the very same batches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    Trainer,
    TrainingArguments,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
)
from transformers.trainer_utils import get_last_checkpoint

from mowa import machine
from mowa.data import synth
from mowa.decode import ctc as decoder
from mowa.errors import DataError, MissingPart, RecipeError
from mowa.families.patch import channel_last_front_end
from mowa.nouns import Preprocessing, Vocabulary
from mowa.tasks import ctc
from mowa.train import recipe as recipes
from mowa.train.batches import Batches, fill, plan
from mowa.train.recipe import Recipe

SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
DELIMITER = "|"
NEEDED = ("accelerate", "jiwer", "matplotlib")


def vocabulary(alphabet: str) -> Vocabulary:
    """The vocabulary of a new head: special tokens, the delimiter, then the letters."""
    tokens = (*SPECIALS.values(), DELIMITER, *alphabet)
    return Vocabulary(tokens, blank=0, delimiter=tokens.index(DELIMITER), specials=frozenset({1, 2, 3}))


def train(recipe: Recipe, out: Path, *, threads: int | None = None) -> Path:
    """Train from scratch as the recipe says; the finished checkpoint lies in `out`. → out.

    RecipeError where `out` holds the beginnings of a run by another recipe; MissingPart before the first step, not
    after the last, where a package that the run will need is not installed.
    """
    installed = machine.parts()
    if missing := [name for name in NEEDED if installed[name] is None]:
        raise MissingPart(f"training needs {', '.join(missing)}: pip install 'mowa[train]'")
    words, sound = vocabulary(recipe.alphabet), Preprocessing()
    steps = recipe.optimise
    torch.set_num_threads(threads or machine.cores())
    training = [e for e in synth.read_manifest(Path(recipe.data.train)) if e.duration_s <= recipe.data.longest_s]
    dev = list(synth.read_manifest(Path(recipe.data.dev)))
    if not training or not dev:
        raise DataError(f"{recipe.data.train if not training else recipe.data.dev}: no clips to learn from")
    batches = plan(
        training, count=steps.steps, budget_s=steps.batch_s, shortest_first=steps.shortest_first, seed=steps.seed
    )
    resume = _beginnings(recipe, out / "checkpoints")
    torch.manual_seed(steps.seed)
    net = AutoModelForCTC.from_config(_config(recipe, words))
    trainer = Trainer(
        model=net,
        args=_arguments(recipe, out),
        data_collator=_only,
        train_dataset=Batches(batches, words, sound, rough=recipe.augment, seed=steps.seed),
        eval_dataset=Batches(list(fill(sorted(dev, key=lambda e: e.duration_s), steps.batch_s)), words, sound),
        compute_metrics=lambda seen: _metrics(seen, words),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    with channel_last_front_end(net):
        trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        save(net, recipe, words, sound, out)
        history(trainer.state.log_history, out)
    return out


def _beginnings(recipe: Recipe, checkpoints: Path) -> str | None:
    """The last checkpoint of this very run, if there is one; and a note of the recipe, for the next to compare."""
    note = checkpoints / "recipe.yaml"
    if note.exists() and recipes.read(note) != recipe:
        raise RecipeError(f"{checkpoints} holds a run by another recipe: choose another folder, or delete that one")
    checkpoints.mkdir(parents=True, exist_ok=True)
    recipes.write(recipe, note)
    return get_last_checkpoint(str(checkpoints))


def _config(recipe: Recipe, words: Vocabulary) -> Any:
    fixed = {
        "vocab_size": len(words),
        "pad_token_id": words.blank,
        "bos_token_id": words.tokens.index(SPECIALS["bos"]),
        "eos_token_id": words.tokens.index(SPECIALS["eos"]),
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
    }
    return AutoConfig.for_model(recipe.model_type, **(recipe.net | fixed))


def _arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    how = recipe.optimise
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=how.steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        train_sampling_strategy="sequential",
        learning_rate=how.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=how.warmup_steps,
        weight_decay=how.weight_decay,
        adam_beta1=how.betas[0],
        adam_beta2=how.betas[1],
        max_grad_norm=how.clip,
        bf16=how.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=how.seed,
        eval_strategy="steps",
        eval_steps=how.evaluate_every,
        save_steps=how.evaluate_every,
        save_total_limit=2,
        logging_steps=min(50, how.evaluate_every),
        dataloader_num_workers=1,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = items
    return batch


def _metrics(seen: Any, words: Vocabulary) -> dict[str, float]:
    """CER and WER of the greedy path, and the share of blank frames (near 1: the net has collapsed)."""
    said, heard = [], []
    blanks, frames = 0, 0
    for ids, target in zip(seen.predictions, seen.label_ids, strict=True):
        ids = np.where(ids < 0, words.blank, ids).astype(np.int32)
        blanks, frames = blanks + int((ids == words.blank).sum()), frames + len(ids)
        path = decoder.Path(ids, np.ones(len(ids), np.float32))
        heard.append(decoder.text(decoder.read(path, words)))
        said.append("".join(words.tokens[i] for i in target if i >= 0).replace(DELIMITER, " "))
    return ctc.error_rates(said, heard) | {"blank": blanks / max(1, frames)}


def save(net: Any, recipe: Recipe, words: Vocabulary, sound: Preprocessing, out: Path) -> None:
    """An ordinary 16-bit checkpoint that `AutoModelForCTC` and `pipeline` load, and the recipe beside it."""
    net.half().save_pretrained(out)
    (out / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(words.tokens)}, ensure_ascii=False, indent=1)
    )
    named = {f"{name}_token": token for name, token in SPECIALS.items()}
    Wav2Vec2CTCTokenizer(str(out / "vocab.json"), word_delimiter_token=DELIMITER, **named).save_pretrained(out)
    (out / "special_tokens_map.json").write_text(json.dumps(named, indent=1))
    Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=sound.rate_hz, padding_value=0.0, do_normalize=True, return_attention_mask=True
    ).save_pretrained(out)
    recipes.write(recipe, out / "recipe.yaml")


def history(log: list[dict[str, Any]], out: Path) -> None:
    """The run's log as JSON lines, and as a picture: loss, and error on the dev set."""
    (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    errors = [(row["step"], row["eval_wer"] * 100, row["eval_cer"] * 100) for row in log if "eval_cer" in row]
    left.plot(*zip(*losses, strict=True), label="training")
    left.set(xlabel="step", ylabel="CTC loss", yscale="log")
    right.plot([e[0] for e in errors], [e[1] for e in errors], "o-", label="WER %")
    right.plot([e[0] for e in errors], [e[2] for e in errors], "o-", label="CER %")
    right.set(xlabel="step", ylabel="error on held-out sentences, %", ylim=(0, None))
    right.legend()
    figure.savefig(out / "curve.png", dpi=110)
    pyplot.close(figure)
