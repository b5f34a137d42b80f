"""A recipe → a trained checkpoint, with the stock `transformers.Trainer`: nothing of it is overridden or patched.

A run that was broken off resumes from the last checkpoint in the output folder, with the very same batches; a stage
that was finished is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)
from transformers.trainer_utils import get_last_checkpoint

from mowa import hardware
from mowa.decode import ctc as decoder
from mowa.errors import DataError, MissingDependency, RecipeError
from mowa.io import processor
from mowa.io.atomic import atomic_write
from mowa.models.ctc_encoder import chunk_mask as hearing
from mowa.models.ctc_encoder import positions
from mowa.models.ctc_encoder.chunk_mask import STREAMING_CONFIG_KEY
from mowa.models.ctc_encoder.fast_training import channels_last_front_end
from mowa.tasks import metrics
from mowa.tasks.ctc import SPECIAL_TOKENS, WORD_DELIMITER, build_vocabulary
from mowa.training.ctc.batches import group_by_padded_duration
from mowa.types import Preprocessing, Vocabulary
from projects.pl_tiny import feature_distillation, front, synth, teachers, transplant, write_positions
from projects.pl_tiny import recipe as recipes
from projects.pl_tiny.batches import Batches, Clip, Windows, plan
from projects.pl_tiny.feature_distillation import Lesson, Teacher, Weights
from projects.pl_tiny.recipe import Dev, Optimise, Recipe, Stage

NEEDED = ("accelerate", "jiwer", "matplotlib")
DOWNLOADS = Path("build/teachers")
SURVEYED, SURVEY_S = 20, 25.0  # windows of so many seconds, over which the teacher's front end is written


def train(recipe: Recipe, out: Path, *, threads: int | None = None, downloads: Path = DOWNLOADS) -> Path:
    """Train as the recipe says, stage after stage; the finished checkpoint lies in `out`. → out.

    Broken off, it goes on from the last checkpoint; a finished stage is not run again. RecipeError where `out` holds
    the beginnings of a run by another recipe; MissingPart before the first step, not after the last, where a package
    that the run will need is not installed; DataError where the disk cannot hold the checkpoints.
    """
    installed = hardware.optional_package_versions()
    if missing := [name for name in NEEDED if installed[name] is None]:
        raise MissingDependency(f"training needs {', '.join(missing)}: pip install 'mowa[train]'")
    torch.set_num_threads(threads or hardware.cpu_count())
    clips = [_clips(stage) for stage in recipe.stages]
    words, sound = build_vocabulary(recipe.alphabet), Preprocessing()
    torch.manual_seed(recipe.stages[0].optimise.seed)
    net = AutoModelForCTC.from_config(_config(recipe, words))
    _room(net, recipe, out)
    teacher = _taught(recipe, net, clips, out, downloads) if recipe.teacher else None
    log: list[dict[str, Any]] = []
    for number, stage in enumerate(recipe.stages):
        so_far = dataclasses.replace(recipe, stages=recipe.stages[: number + 1])
        folder = out / "stages" / f"{number}-{stage.name}"
        log.extend(_stage(so_far, net, teacher, clips[number], folder, steps_before=_before(recipe, number)))
    save(net, recipe, words, sound, out)
    history(log, recipe, out)
    return out


def _before(recipe: Recipe, number: int) -> int:
    return sum(stage.optimise.steps for stage in recipe.stages[:number])


def _clips(stage: Stage) -> tuple[list[tuple[list[Clip], float]], dict[str, list[Clip]]]:
    """A stage's sources and dev sets, read and checked before anything is trained."""
    sources = []
    for source in stage.sources:
        examples = [e for e in synth.read_manifest(Path(source.manifest)) if e.duration_s <= stage.longest_s]
        sources.append(([Clip(e, source.letters, source.ear) for e in examples], source.share))
    dev = {part.name: _sample(part) for part in stage.dev}
    named = zip((source.manifest for source in stage.sources), (clips for clips, _ in sources), strict=True)
    for manifest, clips in [*named, *((part.manifest, dev[part.name]) for part in stage.dev)]:
        if not clips:
            raise DataError(f"{manifest}: no clips to learn from")
    return sources, dev


def _sample(dev: Dev) -> list[Clip]:
    clips = [Clip(example, ear=True) for example in synth.read_manifest(Path(dev.manifest))]
    return [clips[index] for index in np.random.default_rng(0).permutation(len(clips))[: dev.clips]]


def _taught(recipe: Recipe, net: Any, clips: Sequence[Any], out: Path, downloads: Path) -> Teacher:
    """The recipe's teacher; the net begins as what the teacher's encoder is, in a waveform net's form.

    What that is depends on recordings, so it is kept in `out` for a run that goes on.
    """
    arrays, beginning = (
        teachers.read(teachers.find(recipe.teacher, downloads)),
        out / "stages" / "beginning.safetensors",
    )
    if beginning.is_file():
        state = load_file(beginning)
        order = state.pop("order").numpy()
        scales = [state.pop(f"scales.{depth}") for depth in range(net.config.num_hidden_layers + 1)]
        net.load_state_dict(state)
        net.config.absolute_positions = net.config.num_conv_pos_embeddings // 2
        return Teacher(transplant.Ear(write_positions.reordered(arrays, order)), net.config, scales)
    ear, sound = transplant.Ear(arrays), Preprocessing()
    heard = [part for stage in clips for part, _ in stage[0] if part[0].ear]
    each = -(-SURVEYED // len(heard))
    windows = [Windows([(part, 1.0)], each, sound, batch_s=SURVEY_S, window_s=SURVEY_S) for part in heard]
    recordings = [part[index]["input_values"][0].numpy() for part in windows for index in range(each)]
    deviations = feature_distillation.survey(ear, recordings)
    order = write_positions.ordered(deviations[0], net.config.num_conv_pos_embedding_groups)
    arrays, scales = (
        write_positions.reordered(arrays, order),
        [deviation[torch.from_numpy(order)] for deviation in deviations],
    )
    ear = transplant.Ear(arrays)
    teacher = Teacher(ear, net.config, scales)
    front.write(net.wav2vec2, ear, recordings)
    transplant.transplant(arrays, net.wav2vec2.encoder)
    write_positions.write(net, ear.positions[teacher.frames :])
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    state |= {"order": torch.from_numpy(order)} | {f"scales.{depth}": scale for depth, scale in enumerate(scales)}
    beginning.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, partial := beginning.with_suffix(".partial"))
    partial.replace(beginning)
    return teacher


def _room(net: Any, recipe: Recipe, out: Path) -> None:
    """DataError where the disk cannot hold the checkpoints: weights and two moments, in float32."""
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    kept = 1 + max(max(2, stage.optimise.average) for stage in recipe.stages)
    out.mkdir(parents=True, exist_ok=True)
    needed, free = weights * (3 * kept + len(recipe.stages)), shutil.disk_usage(out).free
    there = sum(file.stat().st_size for file in (out / "stages").rglob("*") if file.is_file())
    if free + there < needed:
        raise DataError(f"{out}: checkpoints need {needed >> 20} MB of disk, {free >> 20} MB are free")


def _stage(
    recipe: Recipe, net: Any, teacher: Teacher | None, clips: Any, folder: Path, *, steps_before: int
) -> list[dict[str, Any]]:
    """Run the recipe's last stage on `net`, in place, or load what it came to. → its log."""
    stage, number = recipe.stages[-1], len(recipe.stages)
    done, log = folder / "weights.safetensors", folder / "log.json"
    resume = _beginnings(recipe, folder)
    if done.is_file():
        net.load_state_dict(load_file(done))
        return list(json.loads(log.read_text()))
    how = stage.optimise
    sources, dev = clips
    words, sound = build_vocabulary(recipe.alphabet), Preprocessing()
    weights = Weights(stage.letters, stage.front, stage.ear)
    if (weights.front or weights.ear) and teacher is None:
        raise RecipeError(f"stage {stage.name}: front and ear need a teacher")
    if stage.streaming and not stage.letters:
        raise RecipeError(f"stage {stage.name}: streaming is learnt with letters; weigh them")
    if stage.streaming and (why := hearing.unsupported_reason(net)):
        raise RecipeError(f"stage {stage.name}: this net cannot hear in chunks: {why}")
    before = {name: value.clone() for name, value in net.wav2vec2.state_dict().items()} if how.keep != 1 else {}
    print(f"stage {number}, {stage.name}: {how.steps} steps", file=sys.stderr)
    with (
        channels_last_front_end(net),
        positions.freeze_absolute_positions(net) if teacher is not None else nullcontext(),
    ):
        left = _frames(net, stage.streaming.left_s) if stage.streaming else 0
        lesson = Lesson(net, weights, teacher if weights.front or weights.ear else None, left or None)
        optimiser = _optimiser(lesson, how)
        trainer = Trainer(
            model=lesson,
            args=_arguments(stage, folder),
            data_collator=_only,
            train_dataset=_training(stage, sources, words, sound, net),
            eval_dataset={part.name: _watched(part, dev[part.name], how, words, sound, net) for part in stage.dev},
            compute_metrics=(lambda seen: _metrics(seen, words)) if stage.letters else None,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            optimizers=(optimiser, get_cosine_schedule_with_warmup(optimiser, how.warmup_steps, how.steps)),
        )
        trainer.train(resume_from_checkpoint=resume)
        if how.average > 1:
            average(net, folder / "checkpoints", how.average)
    for name, value in net.wav2vec2.state_dict().items() if before else ():
        value.lerp_(before[name], 1 - how.keep)
    rows = [row | {"stage": stage.name, "step": row["step"] + steps_before} for row in trainer.state.log_history]
    atomic_write(log, json.dumps(rows))
    partial = done.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, partial)
    partial.replace(done)
    return rows


def _watched(
    part: Dev, clips: Sequence[Clip], how: Optimise, words: Vocabulary, sound: Preprocessing, net: Any
) -> Batches:
    plan = list(group_by_padded_duration(sorted(clips, key=lambda c: c.duration_s), how.batch_s))
    chunk = _frames(net, part.chunk_s)
    return Batches(plan, words, sound, chunks=(chunk,) if chunk else (), ahead=(_frames(net, part.ahead_s),))


def _frames(net: Any, seconds: float) -> int:
    """A length as frames of the net; 0 where it has no end."""
    if math.isinf(seconds):
        return 0
    return round(seconds * Preprocessing().rate_hz / math.prod(net.config.conv_stride))


def _training(stage: Stage, sources: Any, words: Vocabulary, sound: Preprocessing, net: Any) -> Batches | Windows:
    how, rough = stage.optimise, stage.augment
    if not stage.letters:
        window = {"batch_s": how.batch_s, "window_s": stage.window_s}
        return Windows(sources, how.steps, sound, rough=rough, seed=how.seed, **window)
    batches = plan(sources, count=how.steps, budget_s=how.batch_s, shortest_first=how.shortest_first, seed=how.seed)
    if (live := stage.streaming) is None:
        return Batches(batches, words, sound, rough=rough, seed=how.seed)
    chunks, ahead = ([_frames(net, one) for one in many] for many in (live.chunk_s, live.ahead_s))
    return Batches(batches, words, sound, rough=rough, chunks=chunks, ahead=ahead, seed=how.seed)


def _beginnings(recipe: Recipe, folder: Path) -> str | None:
    """The last checkpoint of this very stage, if there is one; and a note of the recipe, for the next to compare."""
    note, checkpoints = folder / "recipe.yaml", folder / "checkpoints"
    if note.exists() and recipes.read(note) != recipe:
        raise RecipeError(f"{folder} holds a run by another recipe: choose another folder, or delete that one")
    checkpoints.mkdir(parents=True, exist_ok=True)
    recipes.write(recipe, note)
    return get_last_checkpoint(str(checkpoints))


def _optimiser(lesson: Lesson, how: Optimise) -> torch.optim.Optimizer:
    """AdamW with a group of parameters for each rate, matrices decayed and vectors not. Rate 0 freezes."""
    groups: dict[tuple[float, bool], list[Any]] = {}
    unused = set(how.rates)
    for name, parameter in lesson.net.named_parameters():
        fitting = [prefix for prefix in how.rates if name.startswith(prefix)]
        unused -= set(fitting)
        rate = how.rates[max(fitting, key=len)] if fitting else 1.0
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    if unused:
        raise RecipeError(f"optimise: rates: no parameter's name begins with {', '.join(sorted(unused))}")
    return torch.optim.AdamW(
        [
            {"params": members, "lr": how.learning_rate * rate, "weight_decay": how.weight_decay if decayed else 0.0}
            for (rate, decayed), members in groups.items()
        ],
        betas=how.betas,
    )


def average(net: Any, checkpoints: Path, count: int) -> None:
    """The mean of the weights in the last `count` checkpoints, into `net` (Izmailov et al. 2018, arXiv:1803.05407)."""
    folders = sorted(checkpoints.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))[-count:]
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, value in load_file(folder / "model.safetensors").items():
            total[name] = total.get(name, 0) + value.double() / len(folders)
    net.load_state_dict({name.removeprefix("net."): value for name, value in total.items()})


def _config(recipe: Recipe, words: Vocabulary) -> Any:
    fixed = {
        "vocab_size": len(words),
        "pad_token_id": words.blank,
        "bos_token_id": words.tokens.index(SPECIAL_TOKENS["bos"]),
        "eos_token_id": words.tokens.index(SPECIAL_TOKENS["eos"]),
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
    }
    return AutoConfig.for_model(recipe.model_type, **(recipe.net | fixed))


def _arguments(stage: Stage, folder: Path) -> TrainingArguments:
    how = stage.optimise
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=how.steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        train_sampling_strategy="sequential",
        max_grad_norm=how.clip,
        bf16=how.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=how.seed,
        eval_strategy="steps",
        eval_steps=how.evaluate_every,
        save_steps=how.evaluate_every,
        save_total_limit=max(2, how.average),
        logging_steps=min(50, how.evaluate_every),
        dataloader_num_workers=1,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=not stage.letters,
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
        path = decoder.TokenPath(ids, np.ones(len(ids), np.float32))
        heard.append(decoder.join_words(decoder.path_to_words(path, words)))
        said.append("".join(words.tokens[i] for i in target if i >= 0).replace(WORD_DELIMITER, " "))
    return metrics.error_rates(said, heard) | {"blank": blanks / max(1, frames)}


def save(net: Any, recipe: Recipe, words: Vocabulary, sound: Preprocessing, out: Path) -> None:
    """An ordinary 16-bit checkpoint that `AutoModelForCTC` and `pipeline` load, and the recipe beside it."""
    with torch.no_grad():
        net.lm_head.bias[words.blank] += recipe.blank
    for stage in recipe.stages:
        if (live := stage.streaming) is not None:
            sizes, ahead = (sorted({_frames(net, one) for one in many}) for many in (live.chunk_s, live.ahead_s))
            said = {"chunk_frames": [one for one in sizes if one], "ahead_frames": ahead}
            setattr(net.config, STREAMING_CONFIG_KEY, said | {"left_frames": _frames(net, live.left_s) or None})
    net.half().save_pretrained(out)
    processor.write_processor(words, sound, out)
    recipes.write(recipe, out / "recipe.yaml")


def history(log: list[dict[str, Any]], recipe: Recipe, out: Path) -> None:
    """The run's log as JSON lines, and as a picture: each stage's loss, and error on the dev sets."""
    (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for stage in recipe.stages:
        losses = [(row["step"], row["loss"]) for row in log if "loss" in row and row["stage"] == stage.name]
        left.plot(*zip(*losses, strict=True), label=stage.name)
    left.set(xlabel="step", ylabel="loss (of each stage its own)", yscale="log")
    left.legend()
    for key in sorted({key for row in log for key in row if key.startswith("eval_") and key.endswith("_cer")}):
        errors = [(row["step"], row[key] * 100) for row in log if key in row]
        right.plot(*zip(*errors, strict=True), "o-", markersize=3, label=key[5:-4])
    right.set(xlabel="step", ylabel="CER on held-out recordings, %", ylim=(0, 100))
    if right.lines:
        right.legend()
    figure.savefig(out / "curve.png", dpi=110)
    pyplot.close(figure)
