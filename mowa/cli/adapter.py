"""`mowa adapter`: inspect adapters and merge them into their base model. `mowa train` creates adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np

    from mowa.adapters.causal import CausalAdapter
    from mowa.adapters.checkpoint import Adapter, BaseCheckpoint
    from mowa.models.diff import ModelDiff
    from mowa.types import CausalModel

CHUNK_S, MAX_COMPARED_S = 15.0, 60.0  # emissions are compared on chunks of at most this much of each recording
MAX_EXAMPLES = 64  # samples that a merged language model is compared on
ADAPTER_TYPES = {"lora": "LoRA", "bottleneck": "bottleneck adapters (MMS)"}
FALLBACK_PROMPTS = (
    "What is the capital of Poland?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three fruits that are red.",
    "How do I boil an egg?",
    "Translate to French: Good morning, how are you?",
    "What is 17 plus 25?",
    "Name a famous composer and one of his works.",
)


@click.group(short_help="Inspect adapters and merge them into their base model.")
def adapter() -> None:
    """Inspect adapters and merge them into their base model.

    `mowa train` creates adapters (--method lora, --method bottleneck).
    """


@adapter.command()
@click.argument("folder", metavar="ADAPTER", type=click.Path(path_type=Path))
def show(folder: Path) -> None:
    """Show an adapter's type, base model, size and metrics."""
    from mowa.adapters import causal, checkpoint
    from mowa.cli.output import print_table

    rows = (
        _causal_rows(causal.read_adapter(folder))
        if causal.is_causal_adapter(folder)
        else _speech_rows(checkpoint.read_adapter(folder))
    )
    print_table(["adapter", str(folder)], rows)


def _speech_rows(found: Adapter) -> list[list[str]]:
    special_ids = {found.vocabulary.blank, found.vocabulary.delimiter, *found.vocabulary.specials}
    characters = "".join(token for index, token in enumerate(found.vocabulary.tokens) if index not in special_ids)
    return [
        ["type", ADAPTER_TYPES[found.adapter_type]],
        *_base_rows(found.base),
        ["language", found.language or "unknown"],
        ["characters", f"{len(characters)}: {characters}"],
        ["parameters", f"{found.parameters:,}, including the head"],
        *_file_rows(found.folder / found.weights_file, found.package_versions),
        *(
            [name, f"WER {metrics['wer']:.1%}, CER {metrics['cer']:.1%}"]
            for name, metrics in found.metrics.items()
            if isinstance(metrics, dict) and {"wer", "cer"} <= metrics.keys()
        ),
    ]


def _causal_rows(found: CausalAdapter) -> list[list[str]]:
    from mowa.adapters.causal import WEIGHTS_FILE

    return [
        ["type", "LoRA of a language model"],
        *_base_rows(found.base),
        ["parameters", f"{found.parameters:,}"],
        *_file_rows(found.folder / WEIGHTS_FILE, found.package_versions),
        *(
            [name, f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}"]
            for name, metrics in found.metrics.items()
        ),
    ]


def _base_rows(base: BaseCheckpoint) -> list[list[str]]:
    return [
        ["base model", base.load_name if base.load_name == base.name else f"{base.name} ({base.load_name})"],
        ["base weights", f"sha256 {base.sha256}"],
    ]


def _file_rows(weights: Path, versions: Mapping[str, str]) -> list[list[str]]:
    from mowa.cli.output import format_size

    return [
        ["file", f"{weights.name}, {format_size(weights.stat().st_size) if weights.is_file() else 'missing'}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
    ]


# fmt: off
@adapter.command()
@click.argument("folder", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option("-m", "--base-model", help="Base model, if it is not where the adapter recorded it.")
@click.option("--audio", "audio_files", type=click.Path(exists=True, path_type=Path), multiple=True,
              help="Speech: recording(s) to compare on. [default: the bundled sample]")
@click.option("--tolerance", type=click.FloatRange(min=0), default=1e-3, show_default=True,
              help="Speech: maximum absolute difference of any log-probability.")
@click.option("--data", multiple=True,
              help="Language models: text or conversation file(s) to compare on. [default: the run's held-out data]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              help="Language models: dtype of the merged weights. [default: the base model's]")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def merge(
    folder: Path, out: Path, base_model: str | None, audio_files: tuple[Path, ...], tolerance: float,
    data: tuple[str, ...], dtype: str, offline: bool,
) -> None:
    # fmt: on
    """Merge ADAPTER into its base model and write a checkpoint that transformers loads.

    The checkpoint is loaded again and compared with base model plus adapter before it is kept. LoRA updates are added
    to the weights; bottleneck adapters stay separate layers, as in transformers.
    """
    from mowa.adapters import causal

    if causal.is_causal_adapter(folder):
        _merge_causal(folder, out, base_model, data, dtype, offline)
    else:
        _merge_speech(folder, out, base_model, audio_files, tolerance, offline)
    click.echo(str(out))


def _merge_speech(
    folder: Path, out: Path, base_model: str | None, audio_files: tuple[Path, ...], tolerance: float, offline: bool
) -> None:
    from mowa.adapters import checkpoint
    from mowa.adapters import merge as merging
    from mowa.cli.output import print_table
    from mowa.errors import ModelError
    from mowa.io.hub import SAMPLE_CLIP
    from mowa.loading.ctc import load

    base = load(base_model or checkpoint.read_adapter(folder).base.load_name, offline=offline)
    adapted = checkpoint.load_adapter(base, folder)
    clips = _load_clips(audio_files or (SAMPLE_CLIP,), adapted.preprocessing.rate_hz)
    with merging.atomic_checkpoint(merging.merge_adapter(adapted), out) as written:
        diff = merging.compare_emissions(adapted, load(str(written)), clips)
        rows = [_diff_row("base + adapter → merged", diff)]
        if base.vocabulary == adapted.vocabulary:
            rows.append(_diff_row("base → merged", merging.compare_emissions(base, adapted, clips)))
        print_table(["log-probabilities", "max abs diff", "agreement", "frames"], rows)
        if diff.max_abs_diff > tolerance:
            raise ModelError(
                f"the merged checkpoint differs from base model plus {folder}: log-probabilities by up to"
                f" {diff.max_abs_diff:.2g} (--tolerance {tolerance:g}); {out} was not written"
            )


def _diff_row(label: str, diff: ModelDiff) -> list[str]:
    return [label, f"{diff.max_abs_diff:.2e}", f"{diff.agreement:.2%}", str(diff.num_frames)]


def _load_clips(audio_files: tuple[Path, ...], rate_hz: int) -> list[np.ndarray[Any, Any]]:
    """Return chunks of every recording, float32 [n] of at least 0.1 s each."""
    from mowa.data import audio

    chunk = int(CHUNK_S * rate_hz)
    loaded = [
        audio.load_audio(file, rate_hz)[: int(MAX_COMPARED_S * rate_hz)] for file in audio.find_audio_files(audio_files)
    ]
    chunks = [samples[start : start + chunk] for samples in loaded for start in range(0, len(samples), chunk)]
    return [samples for samples in chunks if len(samples) >= rate_hz // 10]


def _merge_causal(
    folder: Path, out: Path, base_model: str | None, data: tuple[str, ...], dtype: str, offline: bool
) -> None:
    from mowa.adapters import causal
    from mowa.loading.causal import load

    name = base_model or causal.read_adapter(folder).base.load_name
    base = load(name, offline=offline)
    dtype = str(causal.stored_dtype(base.origin.folder)).removeprefix("torch.") if dtype == "auto" else dtype
    adapted = causal.load_adapter(base, folder)
    samples, source = _comparison_samples(folder, adapted, data)
    rounding = None
    if dtype != "float32":
        rounded_base = load(name, dtype=dtype, offline=offline)
        rounding = causal.compare_logits(base, rounded_base, _comparison_batches(samples))
        click.echo(f"base → base in {dtype}, {source}: {rounding}", err=True)
    with causal.atomic_checkpoint(causal.merge_adapter(adapted, dtype), out) as written:
        diff = causal.compare_logits(adapted, load(str(written), dtype=dtype), _comparison_batches(samples))
        click.echo(f"base + adapter → merged in {dtype}, {source}: {diff}", err=True)
        causal.verify_merge(diff, rounding)


def _comparison_samples(folder: Path, model: CausalModel, data: tuple[str, ...]) -> tuple[list[Any], str]:
    """Return tokenized samples to compare on, and where they are from.

    In order of preference: `data`, the data that the training run held out, FALLBACK_PROMPTS.
    """
    from mowa.data.chat import conversations, tokenize
    from mowa.errors import DataError
    from mowa.training.causal import dataset
    from mowa.training.config import dispatch

    options: Any = {"train_on": "all", "on_overflow": "truncate", "max_length": dataset.EVAL_BATCH_TOKENS}
    if data:
        items = [item for path in data for item in conversations.read_conversations(path)]
        samples = tokenize.tokenize_conversations(items, model.tokenizer, **options)[0]
        return samples[:MAX_EXAMPLES], ", ".join(data)
    try:
        recipe: Any = dispatch.read_recipe(folder / "recipe.yaml")
        splits = dataset.load_splits(recipe, model)
    except DataError:  # the data has moved
        items = [
            conversations.Conversation(str(number), (conversations.Message("user", prompt),))
            for number, prompt in enumerate(FALLBACK_PROMPTS)
        ]
        return tokenize.tokenize_conversations(items, model.tokenizer, **options)[0], "eight built-in prompts"
    held_out = [sample for samples in (splits.test | splits.dev).values() for sample in samples]
    return held_out[:MAX_EXAMPLES], "held-out data"


def _comparison_batches(samples: list[Any]) -> Iterator[Any]:
    """Yield padded batches, int64 [B, N], of samples of similar length."""
    from mowa.tasks import causal
    from mowa.training.causal import batches, dataset

    lengths = [len(sample) for sample in samples]
    for group in batches.group_by_length(lengths, range(len(samples)), dataset.EVAL_BATCH_TOKENS):
        yield causal.pad([samples[index] for index in group], 0, pad_to_multiple_of=1)
