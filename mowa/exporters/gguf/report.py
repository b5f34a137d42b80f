"""The report of an export: what each file holds, and how it compares with the model.

It is written as JSON beside the files. Files whose outputs differ by more than `verify.LIMITS` fail the export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mowa.errors import ModelError
from mowa.exporters.gguf.chat_template import KEY as TEMPLATE_KEY
from mowa.exporters.gguf.chat_template import check_template, compare_chats
from mowa.exporters.gguf.convert import Target
from mowa.exporters.gguf.inspect import summarize
from mowa.exporters.gguf.source import Source
from mowa.exporters.gguf.tokenizer import ConvertedTokenizer
from mowa.exporters.gguf.verify import (
    LIMITS,
    PYTORCH,
    RUNTIME_TOKENS,
    OutputReport,
    compare_outputs,
    compare_top,
    compute_logits,
    load_prompts,
    spread,
)
from mowa.exporters.prepare import prepare_for_export
from mowa.exporters.verify import compute_logits as clip_logits
from mowa.exporters.verify import load_clips
from mowa.io.atomic import write_json
from mowa.io.gguf import read_gguf
from mowa.loading import gguf_ctc
from mowa.loading.gguf import load_net
from mowa.models.diff import compare
from mowa.tasks.causal import context_length
from mowa.types import CTCModel

REPORT_FILE = "report.json"
REPORTED_OPTIONS = ("imatrix", "tensor_types", "check_data")
Score = Callable[[Path, Sequence[Sequence[int]]], list[Tensor]]
"""Path of a file and token ids → log-probabilities of the most probable next tokens, float32 [T, V] each, else −inf."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """A file of an export.

    name             of the file
    scheme           of the mix
    size_bytes       of the file
    bits_per_weight  of its tensors
    types            type → number of tensors
    outputs          how runtimes' outputs differ from the model's
    problem          why it failed; empty if it passed
    """

    name: str
    scheme: str
    size_bytes: int
    bits_per_weight: float
    types: Mapping[str, int]
    outputs: tuple[OutputReport, ...] = ()
    problem: str = ""


def describe_file(path: Path, scheme: str, outputs: Sequence[OutputReport] = ()) -> FileReport:
    """Return the report of a file that was written."""
    found = summarize(path)
    problems = (one.problem(scheme) for one in outputs)
    return FileReport(
        name=path.name,
        scheme=scheme,
        size_bytes=found.size_bytes,
        bits_per_weight=found.bits_per_weight,
        types={name: one.tensors for name, one in found.types.items()},
        outputs=tuple(outputs),
        problem=next((one for one in problems if one), ""),
    )


def compare_files(
    source: Source,
    targets: Sequence[Target],
    texts: Sequence[str],
    runtimes: Mapping[str, Score],
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> list[FileReport]:
    """Run every file of a language model and compare it with the model, one after the other in memory.

    Each is run by transformers over dequantized weights, and by other runtimes by name.
    """
    config = source.model.net.config
    prompts = load_prompts(source.model.tokenizer, texts, context_length(config))
    reference = compute_logits(source.load_net(), prompts)
    beginnings = [list(ids[:RUNTIME_TOKENS]) for ids in spread(prompts)]
    reports = []
    for index, target in enumerate(targets):
        on_progress(index / len(targets))
        file = read_gguf(target.path)
        outputs = [compare_outputs(PYTORCH, reference, compute_logits(load_net(file), prompts), prompts)]
        for runtime, score in runtimes.items():
            outputs.append(compare_top(runtime, spread(reference), score(target.path, beginnings)))
        reports.append(describe_file(target.path, target.scheme, outputs))
    on_progress(1.0)
    return reports


def compare_speech_files(
    model: CTCModel, targets: Sequence[Target], on_progress: Callable[[float], object] = lambda fraction: None
) -> list[FileReport]:
    """Load every file of a speech model and compare its outputs with the model's."""
    clips = load_clips(model)
    reference = clip_logits(prepare_for_export(model, dequantize=True), clips)
    reports = []
    for index, target in enumerate(targets):
        on_progress(index / len(targets))
        loaded = gguf_ctc.load(target.path)
        diff = compare(reference, clip_logits(loaded.net, clips))
        outputs = [OutputReport(PYTORCH, diff.kl, diff.agreement, diff.num_frames)]  # near ties included
        reports.append(describe_file(target.path, target.scheme, outputs))
    on_progress(1.0)
    return reports


def check_chats(tokenizer: Any, metadata: Mapping[str, Any]) -> list[str]:
    """Return what llama.cpp refuses in the chat templates of a file, and what is unsafe.

    Raises ModelError if a template cannot be parsed, or renders a chat in another way than the tokenizer's.
    """
    templates = {key: str(value) for key, value in metadata.items() if key.startswith(TEMPLATE_KEY)}
    problems = [f"{key}, {problem}" for key, text in templates.items() for problem in check_template(text)]
    if broken := next((one for one in problems if "cannot be parsed" in one), ""):
        raise ModelError(f"{broken}: repair the chat template of the tokenizer, llama.cpp does not load the file")
    if different := compare_chats(tokenizer, metadata):
        raise ModelError(
            f"{different[0]} from the file ({len(different)} differences): this is a bug of mowa, please report it with"
            " the model's name"
        )
    return problems


def _plain(value: Any) -> Any:
    return [str(one) for one in value] if isinstance(value, list | tuple) else str(value)


def _to_dict(report: FileReport) -> dict[str, Any]:
    """Return the fields, the KL limit of each runtime, and whether the file passed; None if nothing was compared."""
    outputs = [asdict(one) | {"max_kl": one.max_kl(report.scheme)} for one in report.outputs]
    passed = not report.problem if outputs else None
    limits = asdict(LIMITS[report.scheme])
    return asdict(report) | {"outputs": outputs, "passed": passed, "limits": limits}


def write_report(
    folder: Path,
    files: Sequence[FileReport],
    tokenizer: ConvertedTokenizer | None,
    warnings: Sequence[str],
    model: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `report.json` into `folder` and return its content."""
    content: dict[str, Any] = {
        "model": model,
        "options": {key: _plain(options[key]) for key in REPORTED_OPTIONS if options.get(key)},
        "files": [_to_dict(one) for one in files],
        "warnings": list(warnings),
    }
    if tokenizer is not None:
        content["tokenizer"] = {
            "texts_compared": tokenizer.report.checked,
            "known_differences": {reason: len(found) for reason, found in tokenizer.report.known.items()},
        }
    write_json(folder / REPORT_FILE, content)
    return content
