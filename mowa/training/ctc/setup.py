"""Prepare a CTC fine-tuning run: load data, adapt the net, plan batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mowa import loading
from mowa.adapters import bottleneck, freeze, head, lora
from mowa.errors import RecipeError
from mowa.models.ctc_encoder import chunk_mask, packing
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.quantization import qat
from mowa.training.config.ctc import ADAPTER_METHODS, CTCRecipe, validate_streaming
from mowa.training.ctc.batches import BatchDataset, BatchOptions, plan_eval_batches
from mowa.training.ctc.dataset import CTCSplits, load_splits
from mowa.training.ctc.distillation import DistillationLoss, init_student
from mowa.training.ctc.readable import keep_readable, plan
from mowa.training.ctc.streaming import ChunkSchedule, resolve_schedule
from mowa.training.gradient_checkpointing import set_gradient_checkpointing
from mowa.training.sources import hint_at_other_task
from mowa.training.trainer_args import resolve_eval_steps
from mowa.types import CTCModel, Example, SpeechProcessor

STREAMING_SUFFIX = "-streaming"  # of the name under which a data set is evaluated in chunks


@dataclass(frozen=True, slots=True)
class CTCRun:
    """Inputs of the Trainer. `model` has the net as it is trained, and the vocabulary of its new head."""

    recipe: CTCRecipe
    model: CTCModel
    data: CTCSplits
    max_steps: int
    eval_steps: int
    batches: list[list[Example]]
    new_head: bool
    distillation: DistillationLoss | None
    chunks: ChunkSchedule | None
    notes: tuple[str, ...]


def load(recipe: CTCRecipe) -> CTCModel:
    """Load the checkpoint, without a head where a new one is trained."""
    return loading.ctc.load(
        recipe.model, require_head=recipe.vocabulary != "new", target_lang=recipe.target_lang or None
    )


def validate(recipe: CTCRecipe, model: CTCModel) -> None:
    """Raise RecipeError where the checkpoint does not support the recipe."""
    net = model.net
    if recipe.target_lang and recipe.method == "lora":
        raise RecipeError(
            "method: lora: the adapter would not record target_lang and be loaded over another language; use bottleneck"
        )
    if recipe.batch.packing and (reason := packing.unsupported_reason(net)):
        raise RecipeError(f"batch: packing: this model does not support it: {reason}; set packing: false")
    validate_streaming(recipe, "streaming")
    resolve_schedule(recipe.streaming, net, model.preprocessing.rate_hz)


def read_data(recipe: CTCRecipe, model: CTCModel, output_dir: Path) -> CTCSplits:
    """Read the recordings; those in archives are extracted to `output_dir`/audio.

    Raises as `load_splits` and `keep_readable`.
    """
    frames, rate_hz = frame_geometry(model.net.config), model.preprocessing.rate_hz
    vocabulary = model.vocabulary if len(model.vocabulary) else None
    with hint_at_other_task(recipe.data.train, recipe.task):
        splits = load_splits(
            recipe, vocabulary, lambda seconds: frames.num_frames(int(seconds * rate_hz)), output_dir / "audio"
        )
    return keep_readable(recipe, splits, rate_hz)


def prepare(recipe: CTCRecipe, model: CTCModel, data: CTCSplits) -> CTCRun:
    """Change `model.net` in place (head, adapters, quantizers, requires_grad) and plan the batches.

    Raises:
        RecipeError: the checkpoint does not support the recipe.
    """
    net, family = model.net, model.family
    chunks = resolve_schedule(recipe.streaming, net, model.preprocessing.rate_hz)
    vocabulary = model.vocabulary if len(model.vocabulary) else None
    vars(net.config).pop(qat.CONFIG_KEY, None)  # the weights leave the quantization grid
    notes = _drop_stale_streaming(recipe, model)
    model, distillation = _init_student(recipe, model)
    net = model.net
    new_head = head.resize_head(net, family, vocabulary, data.vocabulary)
    net.config.ctc_zero_infinity, net.config.ctc_loss_reduction = True, "mean"
    if recipe.method == "lora":
        config = recipe.lora
        lora.add(
            net,
            family,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            target_modules=config.target_modules,
            variant=config.variant,
        )
    elif recipe.method == "bottleneck":
        present = net.config.adapter_attn_dim if recipe.target_lang else None
        bottleneck.add(net, family, present or recipe.bottleneck_dim)
    if recipe.qat != "none":
        qat.prepare(net, family, recipe.qat, recipe.qat_group_size)
    freeze.set_trainable(net, family, recipe.method)
    if recipe.optimizer.gradient_checkpointing:
        set_gradient_checkpointing(net)
    batches = plan(recipe, data.train)
    max_steps = len(batches) // recipe.batches_per_step
    trained = replace(model, net=net, processor=SpeechProcessor(data.vocabulary, model.preprocessing))
    eval_steps = resolve_eval_steps(recipe, max_steps)
    return CTCRun(recipe, trained, data, max_steps, eval_steps, batches, new_head, distillation, chunks, notes)


def _drop_stale_streaming(recipe: CTCRecipe, model: CTCModel) -> tuple[str, ...]:
    """Remove the mark of a streaming checkpoint where the encoder is about to be trained at full context."""
    config = model.net.config
    if recipe.streaming.chunk_s or chunk_mask.get_trained_chunking(config) is None or recipe.method == "head":
        return ()
    if recipe.method in ADAPTER_METHODS:
        return (f"{recipe.model} can stream, but this adapter is trained at full context: check its live error rate",)
    chunk_mask.set_trained_chunking(config, None)
    return (
        f"{recipe.model} was trained for streaming, and this run trains it at full context, so the result will not be "
        "marked as streamable; set streaming: chunk_s to keep it",
    )


def _init_student(recipe: CTCRecipe, model: CTCModel) -> tuple[CTCModel, DistillationLoss | None]:
    """Return the model to train and, where the recipe uses a teacher, the loss against the original checkpoint."""
    if not recipe.uses_teacher:
        return model, None
    config = recipe.distillation
    layers = config.student_layers or model.net.config.num_hidden_layers
    student = init_student(model, layers)
    loss = DistillationLoss(
        model.net,
        layers,
        logit_weight=config.logit_weight,
        hidden_weight=config.hidden_weight,
        temperature=config.temperature,
    )
    return student, loss


def eval_batch_options(run: CTCRun, *, streaming: bool = False) -> BatchOptions:
    """Return the options of evaluation batches: no augmentation, no masks; with `streaming`, the smallest chunk."""
    config = run.model.net.config
    return BatchOptions(
        run.model.vocabulary,
        run.model.preprocessing,
        frame_geometry(config),
        config.hidden_size,
        run.recipe.batch.packing,
        chunks=run.chunks.for_evaluation() if run.chunks and streaming else None,
    )


def build_eval_dataset(run: CTCRun, examples: list[Example], *, streaming: bool = False) -> BatchDataset:
    """Return every recording once, in batches; with several processes in batches of one, as they gather by sample."""
    distributed = run.recipe.distributed
    seconds = 0.0 if distributed.devices * distributed.nodes > 1 else run.recipe.batch.seconds
    batches = plan_eval_batches(examples, seconds, run.recipe.batch.packing)
    return BatchDataset(batches, eval_batch_options(run, streaming=streaming))


def build_eval_datasets(run: CTCRun, splits: dict[str, list[Example]]) -> dict[str, BatchDataset]:
    """Return the evaluation sets of `splits`; with streaming each also in chunks, as NAME-streaming, but for replay."""
    datasets = {}
    for name, examples in splits.items():
        datasets[name] = build_eval_dataset(run, examples)
        if run.chunks and not name.startswith("replay"):
            datasets[name + STREAMING_SUFFIX] = build_eval_dataset(run, examples, streaming=True)
    return datasets
