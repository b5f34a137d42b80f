"""Train the stages of a recipe with the stock `transformers.Trainer` and write the finished checkpoint.

An interrupted run resumes from the last checkpoint in its output folder, with the same batches; a finished stage is
not run again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCTC, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from mowa import hardware
from mowa.adapters.freeze import set_front_end_gradient
from mowa.data.manifests.examples import read_examples
from mowa.decode import ctc as decoder
from mowa.errors import DataError, MissingDependency, RecipeError
from mowa.io.atomic import atomic_write, replace_atomically
from mowa.models.ctc_encoder import chunk_mask, positions
from mowa.models.ctc_encoder.fast_training import channels_last_front_end
from mowa.tasks import metrics
from mowa.tasks.ctc import SPECIAL_TOKENS, WORD_DELIMITER, build_vocabulary
from mowa.training import checkpoints, resources, run_dir
from mowa.training.ctc.batches import group_by_padded_duration
from mowa.types import Preprocessing, Vocabulary
from projects.pl_tiny import save
from projects.pl_tiny.batches import BatchDataset, Clip, WindowDataset, plan_batches, seconds_to_frames
from projects.pl_tiny.feature_distillation import FeatureDistillationModule, LossWeights, Teacher
from projects.pl_tiny.initialize import initialize_from_teacher
from projects.pl_tiny.recipe import DevSet, OptimizerConfig, Stage, StagedRecipe

REQUIRED_PACKAGES = ("accelerate", "jiwer", "matplotlib")
DOWNLOADS = Path("build/teachers")
_BELOW_BLOCKS = ("wav2vec2.feature_", "wav2vec2.masked_spec_embed", "wav2vec2.encoder.pos_conv_embed")


@dataclass(frozen=True, slots=True)
class StageData:
    """The recordings of a stage: training sources with their shares, and dev sets by name."""

    sources: list[tuple[list[Clip], float]]
    dev: dict[str, list[Clip]]


def train(recipe: StagedRecipe, out: Path, *, threads: int | None = None, downloads: Path = DOWNLOADS) -> Path:
    """Train the stages of the recipe and write the finished checkpoint to `out`. Return `out`.

    Raises, before the first step: RecipeError if `out` holds a run of another recipe; MissingDependency if a package is
    not installed; DataError if a manifest has no usable recordings or the disk cannot hold the checkpoints.
    """
    installed = hardware.optional_package_versions()
    if missing := [name for name in REQUIRED_PACKAGES if installed[name] is None]:
        raise MissingDependency(f"training needs {', '.join(missing)}: pip install 'mowa[train]'")
    torch.set_num_threads(threads or hardware.cpu_count())
    data = [_load_stage_data(stage) for stage in recipe.stages]
    vocabulary, preprocessing = build_vocabulary(recipe.alphabet), Preprocessing()
    torch.manual_seed(recipe.stages[0].optimizer.seed)
    net = AutoModelForCTC.from_config(build_config(recipe, vocabulary))
    _check_disk_space(net, recipe, out)
    folders = [out / "stages" / f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages)]
    teacher = None
    if recipe.teacher:
        clips = [source for stage in data for source, _ in stage.sources if source[0].features]
        initial = out / "stages" / "initial.safetensors"
        if not (run_dir.list_checkpoints(folders[0]) or (folders[0] / run_dir.DONE_MARKER).is_file()):
            initial.unlink(missing_ok=True)  # of a failed attempt, perhaps with other recordings
        teacher = initialize_from_teacher(net, recipe.teacher, clips, initial, downloads)
    for stage in recipe.stages:
        _validate_stage(stage, net, teacher)
    log: list[dict[str, Any]] = []
    for number, folder in enumerate(folders):
        until_now = dataclasses.replace(recipe, stages=recipe.stages[: number + 1])
        with run_dir.lock_run_dir(until_now, folder):
            log.extend(_run_stage(until_now, net, teacher, data[number], folder))
    save.save_checkpoint(net, recipe, vocabulary, preprocessing, out)
    save.write_history(log, recipe, out)
    return out


def build_config(recipe: StagedRecipe, vocabulary: Vocabulary) -> Any:
    """Return the transformers config of the recipe's net, with the vocabulary and the CTC loss filled in."""
    fixed = {
        "vocab_size": len(vocabulary),
        "pad_token_id": vocabulary.blank,
        "bos_token_id": vocabulary.tokens.index(SPECIAL_TOKENS["bos"]),
        "eos_token_id": vocabulary.tokens.index(SPECIAL_TOKENS["eos"]),
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
    }
    return AutoConfig.for_model(recipe.model_type, **(recipe.model_config | fixed))


# --- data -------------------------------------------------------------------------------------------------------------


def _load_stage_data(stage: Stage) -> StageData:
    """Read and check a stage's manifests before anything is trained."""
    sources = []
    for source in stage.sources:
        if source.optional and not Path(source.manifest).is_file():
            print(f"stage {stage.name}: {source.manifest} not found; this optional source is skipped", file=sys.stderr)
            continue
        examples = [e for e in read_examples(source.manifest) if e.duration_s <= stage.max_duration_s]
        if not examples:
            raise DataError(f"{source.manifest}: no recordings of at most {stage.max_duration_s:g} s to train on")
        sources.append(([Clip(example, source.ctc, source.features) for example in examples], source.share))
    if not sources:
        raise DataError(f"stage {stage.name}: none of its sources exists")
    return StageData(sources, {dev.name: _sample_dev_set(dev) for dev in stage.dev})


def _sample_dev_set(dev: DevSet) -> list[Clip]:
    clips = [Clip(example, features=True) for example in read_examples(dev.manifest)]
    return [clips[index] for index in np.random.default_rng(0).permutation(len(clips))[: dev.max_samples]]


def _eval_dataset(
    dev: DevSet, clips: Sequence[Clip], batch_s: float, vocabulary: Vocabulary, config: Any
) -> BatchDataset:
    plan = list(group_by_padded_duration(sorted(clips, key=lambda clip: clip.duration_s), batch_s))
    chunk = seconds_to_frames(config, dev.chunk_s)
    lookahead = seconds_to_frames(config, dev.lookahead_s)
    return BatchDataset(
        plan, vocabulary, Preprocessing(), chunk_frames=(chunk,) if chunk else (), lookahead_frames=(lookahead,)
    )


def _train_dataset(stage: Stage, data: StageData, vocabulary: Vocabulary, config: Any) -> BatchDataset | WindowDataset:
    how, preprocessing = stage.optimizer, Preprocessing()
    common: dict[str, Any] = {"schedule": stage.augment, "seed": how.seed}
    if not stage.ctc_weight:
        common |= {"batch_s": how.batch_s, "window_s": stage.window_s}
        return WindowDataset(data.sources, how.max_steps, preprocessing, **common)
    plan = plan_batches(
        data.sources, count=how.max_steps, budget_s=how.batch_s, shortest_first=how.shortest_first, seed=how.seed
    )
    if (streaming := stage.streaming) is not None:
        common["chunk_frames"] = [seconds_to_frames(config, length) for length in streaming.chunk_s]
        common["lookahead_frames"] = [seconds_to_frames(config, length) for length in streaming.lookahead_s]
    return BatchDataset(plan, vocabulary, preprocessing, **common)


# --- one stage --------------------------------------------------------------------------------------------------------


def _run_stage(
    recipe: StagedRecipe, net: Any, teacher: Teacher | None, data: StageData, folder: Path
) -> list[dict[str, Any]]:
    """Train the recipe's last stage on `net` in place, or load its result. Return its log."""
    stage, number = recipe.stages[-1], len(recipe.stages)
    finished, log = folder / "weights.safetensors", folder / "log.json"
    if run_dir.is_finished(recipe, folder):
        run_dir.mark_finished(folder)  # deletes checkpoints, where the run was killed while it did
        net.load_state_dict(load_file(finished))
        return list(json.loads(log.read_text()))
    net.requires_grad_(True)  # an earlier stage may have frozen some of it
    how, share = stage.optimizer, stage.optimizer.weight_interpolation
    before = {name: value.clone() for name, value in net.wav2vec2.state_dict().items()} if share != 1 else {}
    print(f"stage {number}, {stage.name}: {how.max_steps} steps", file=sys.stderr)
    with (
        channels_last_front_end(net),
        positions.freeze_absolute_positions(net) if teacher is not None else nullcontext(),
    ):
        trainer = _build_trainer(recipe, net, teacher, data, folder)
        resume_from = run_dir.find_last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if how.average_checkpoints > 1:
            average_checkpoints(net, run_dir.list_checkpoints(folder)[-how.average_checkpoints :])
    for name, value in net.wav2vec2.state_dict().items() if before else ():
        value.lerp_(before[name], 1 - share)
    steps_before = sum(earlier.optimizer.max_steps for earlier in recipe.stages[:-1])
    rows = [row | {"stage": stage.name, "step": row["step"] + steps_before} for row in trainer.state.log_history]
    atomic_write(log, json.dumps(rows))
    with replace_atomically(finished) as partial:
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, partial)
    run_dir.mark_finished(folder)
    return rows


def _validate_stage(stage: Stage, net: Any, teacher: Teacher | None) -> None:
    if (stage.front_end_weight or stage.feature_weight) and teacher is None:
        raise RecipeError(f"stage {stage.name}: front_end_weight and feature_weight need a teacher")
    if stage.frozen_blocks and not stage.ctc_weight:
        raise RecipeError(f"stage {stage.name}: frozen_blocks needs the CTC loss; set ctc_weight above 0")
    if stage.frozen_blocks >= (count := net.config.num_hidden_layers):
        raise RecipeError(
            f"stage {stage.name}: frozen_blocks is {stage.frozen_blocks}; at most {count - 1} of {count} can be"
        )
    if stage.frozen_blocks and stage.front_end_weight:
        raise RecipeError(f"stage {stage.name}: front_end_weight trains the front end, which frozen_blocks freezes")
    if stage.frozen_blocks and stage.streaming and stage.feature_weight:
        raise RecipeError(f"stage {stage.name}: with frozen_blocks and streaming, feature_weight must be 0")
    if stage.streaming and not stage.ctc_weight:
        raise RecipeError(f"stage {stage.name}: streaming needs the CTC loss; set ctc_weight above 0")
    if stage.streaming and (reason := chunk_mask.unsupported_reason(net)):
        raise RecipeError(f"stage {stage.name}: this net cannot be trained in chunks: {reason}")


class StageTrainer(checkpoints.CompleteCheckpointMixin, Trainer):
    """The stock Trainer, whose checkpoints are read whole."""


def _build_trainer(recipe: StagedRecipe, net: Any, teacher: Teacher | None, data: StageData, folder: Path) -> Trainer:
    stage, vocabulary = recipe.stages[-1], build_vocabulary(recipe.alphabet)
    how = stage.optimizer
    weights = LossWeights(stage.ctc_weight, stage.front_end_weight, stage.feature_weight)
    distills = weights.front_end or weights.features
    left_context = seconds_to_frames(net.config, stage.streaming.left_context_s) if stage.streaming else 0
    module = FeatureDistillationModule(
        net, weights, teacher if distills else None, left_context or None, stage.frozen_blocks
    )
    optimizer = build_optimizer(module, how)
    return StageTrainer(
        model=module,
        args=_training_arguments(stage, folder),
        data_collator=_unwrap_batch,
        train_dataset=_train_dataset(stage, data, vocabulary, net.config),
        eval_dataset={
            dev.name: _eval_dataset(dev, data.dev[dev.name], how.batch_s, vocabulary, net.config) for dev in stage.dev
        },
        compute_metrics=(lambda outputs: _compute_metrics(outputs, vocabulary)) if stage.ctc_weight else None,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        optimizers=(optimizer, get_cosine_schedule_with_warmup(optimizer, how.warmup_steps, how.max_steps)),
        callbacks=[checkpoints.MarkCompleteCallback(_kept_checkpoints(how))],
    )


def _check_disk_space(net: Any, recipe: StagedRecipe, out: Path) -> None:
    """Raise DataError if the disk cannot hold the checkpoints: weights and two Adam moments, in float32."""
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    kept = 1 + max(_kept_checkpoints(stage.optimizer) for stage in recipe.stages)
    resources.check_disk(weights * (3 * kept + len(recipe.stages)), out)


def _kept_checkpoints(how: OptimizerConfig) -> int:
    return max(checkpoints.KEPT_CHECKPOINTS, how.average_checkpoints)


def build_optimizer(module: FeatureDistillationModule, how: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW with one parameter group per learning rate; matrices are decayed, vectors not.

    A rate of 0 freezes, and `module.frozen_blocks` freezes those blocks and what is below, whatever their rates:
    `requires_grad` of the net's parameters is set. Raises RecipeError for a rate that applies to no parameter.
    """
    layers = [f"wav2vec2.encoder.layers.{index}." for index in range(module.frozen_blocks)]
    frozen = (*_BELOW_BLOCKS, *layers) if layers else ()
    groups: dict[tuple[float, bool], list[Any]] = {}
    unused = set(how.lr_multipliers)
    for name, parameter in module.net.named_parameters():
        matching = [prefix for prefix in how.lr_multipliers if name.startswith(prefix)]
        unused -= set(matching)
        factor = how.lr_multipliers[max(matching, key=len)] if matching else 1.0
        if name.startswith(frozen):
            factor = 0.0
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    set_front_end_gradient(module.net)
    if unused:
        prefixes = ", ".join(sorted(unused))
        raise RecipeError(f"optimizer: lr_multipliers: no parameter's name begins with {prefixes}")
    return torch.optim.AdamW(
        [
            {"params": members, "lr": how.learning_rate * factor, "weight_decay": how.weight_decay if decayed else 0.0}
            for (factor, decayed), members in groups.items()
        ],
        betas=how.betas,
    )


def average_checkpoints(net: Any, folders: Sequence[Path]) -> None:
    """Load the mean of the checkpoints in `folders` into `net` (Izmailov et al. 2018, arXiv:1803.05407).

    Raises:
        TrainingStopped: a checkpoint lacks weights of the net, or holds others.
    """
    total: dict[str, torch.Tensor] = {}
    expected = {f"net.{name}" for name in net.state_dict()}
    for folder in folders:
        state = load_file(folder / "model.safetensors")
        checkpoints.validate_keys(folder, missing=expected - state.keys(), unexpected=state.keys() - expected)
        for name, value in state.items():
            total[name] = total.get(name, 0) + value.double() / len(folders)
    net.load_state_dict({name.removeprefix("net."): value for name, value in total.items()})


def _training_arguments(stage: Stage, folder: Path) -> TrainingArguments:
    how = stage.optimizer
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=how.max_steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        train_sampling_strategy="sequential",
        max_grad_norm=how.max_grad_norm,
        bf16=how.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=how.seed,
        eval_strategy="steps",
        eval_steps=how.eval_steps,
        save_steps=how.eval_steps,
        logging_steps=min(50, how.eval_steps),
        dataloader_num_workers=1,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=not stage.ctc_weight,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )


def _unwrap_batch(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate: the dataset yields whole batches."""
    (batch,) = items
    return batch


def _compute_metrics(outputs: Any, vocabulary: Vocabulary) -> dict[str, float]:
    """Return CER and WER of the greedy path, and the share of blank frames (near 1: the net has collapsed)."""
    references, hypotheses = [], []
    blanks, frames = 0, 0
    for ids, target in zip(outputs.predictions, outputs.label_ids, strict=True):
        ids = np.where(ids < 0, vocabulary.blank, ids).astype(np.int32)
        blanks, frames = blanks + int((ids == vocabulary.blank).sum()), frames + len(ids)
        path = decoder.TokenPath(ids, np.ones(len(ids), np.float32))
        hypotheses.append(decoder.join_words(decoder.path_to_words(path, vocabulary)))
        references.append("".join(vocabulary.tokens[i] for i in target if i >= 0).replace(WORD_DELIMITER, " "))
    return metrics.error_rates(references, hypotheses) | {"blank": blanks / max(1, frames)}
