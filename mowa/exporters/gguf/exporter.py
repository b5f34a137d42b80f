"""Export models as GGUF files: convert, quantize in several schemes at once, read back and compare.

    model → names and layouts of llama.cpp → metadata and tokenizer → blocks, tensor by tensor → files → comparison

`convert` streams the weights, `source` opens them, `verify` compares outputs, and the report lies beside the files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mowa.data.chat import conversations
from mowa.data.chat.samples import Conversation
from mowa.errors import ModelError
from mowa.exporters.gguf import general, lora, mixes, speech
from mowa.exporters.gguf.calibration import calibration_batches, collect_importance
from mowa.exporters.gguf.convert import ImportanceOf, Target, no_importance, verify_digests, write_targets
from mowa.exporters.gguf.ollama import modelfile
from mowa.exporters.gguf.report import (
    FileReport,
    Score,
    check_chats,
    compare_files,
    compare_speech_files,
    describe_file,
    write_report,
)
from mowa.exporters.gguf.source import Source, open_source
from mowa.exporters.gguf.tokenizer import ConvertedTokenizer, convert_tokenizer
from mowa.exporters.manifest import ExportResult
from mowa.io.gguf import read_gguf
from mowa.io.gguf.imatrix import ImportanceMatrix, importance_for, missing, read_imatrix
from mowa.models.gguf import find_architecture, to_gguf
from mowa.models.gguf.state import LazyTensor
from mowa.types import AnyModel, CausalModel, CTCModel

log = logging.getLogger("mowa")

DEFAULT_SCHEME, DEFAULT_ADAPTER_SCHEME = "q8_0", "f16"
MODELFILE = "Modelfile"
IMATRIX_SUFFIXES = (".gguf", ".dat", ".imatrix")  # of files that are not texts
MAX_TEXTS = 2_000  # of the caller's, whose token ids are compared

NO_RUNTIMES: Mapping[str, Score] = {}
OnProgress = Callable[[str, float], object]


def unsupported_reason(model: AnyModel) -> str:
    """See `Exporter.unsupported_reason`."""
    if model.task == "ctc":
        return ""
    try:
        find_architecture(model.net.config)
    except ModelError as error:
        return str(error)
    return ""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Metadata, tensors and type choice of an export, and how its files are compared.

    types      scheme → name of each tensor → type
    importance name and shape of a tensor → importance of its columns
    compare    targets → a report of each
    tokenizer  of a language model, and what was proven about it
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    types: Callable[[str], Mapping[str, str]]
    compare: Callable[[Sequence[Target]], list[FileReport]]
    importance: ImportanceOf = no_importance
    tokenizer: ConvertedTokenizer | None = None
    warnings: tuple[str, ...] = ()


def write(
    model: AnyModel,
    folder: Path,
    *,
    schemes: Sequence[str] = (),
    adapter: str | Path | None = None,
    adapter_only: bool = False,
    skip_outputs: bool = False,
    keep_failed: bool = False,
    file_stem: str = "",
    on_progress: OnProgress = lambda stage, fraction: None,
    **options: Any,
) -> ExportResult:
    """See `Exporter.write`: one file per scheme, `report.json`, and of language models a Modelfile for Ollama.

    Args:
        model: the weights of a language model may be on the meta device; they are then read from its checkpoint.
        schemes: keys of `mixes.FILE_TYPES`; none: `DEFAULT_SCHEME`.
        adapter: folder of a LoRA adapter to merge into a model on the meta device.
        adapter_only: write that adapter alone, in a type of `lora.FILE_TYPES`; by default f16.
        skip_outputs: skip the comparison of outputs, which loads the whole model into memory.
        keep_failed: keep files whose outputs differ by more than the limits.
        file_stem: name of the only file, without its suffix; empty: files are named after model and scheme.
        on_progress: called with a stage and the fraction of it that is done.
        options: of language models: tensor_types, imatrix, check_data and runtimes, as `_plan_text` describes them.

    Raises also ModelError if the vocabulary does not fit the embeddings, if token ids, chats, bytes or outputs differ,
    or if a weight cannot be stored; DataError if `imatrix` or `check_data` cannot be read.
    """
    schemes = tuple(dict.fromkeys(one.lower() for one in schemes))
    if adapter_only:
        if given := [key for key, value in options.items() if value and key != "runtimes"]:
            raise ModelError(f"{given[0]} does not apply to an adapter alone")
        return _write_adapter(model, folder, adapter, schemes, file_stem)
    if model.task == "ctc":
        options.pop("runtimes", None)
        if options:
            raise ModelError(f"{next(iter(options))} is an option for language models, and this is a speech model")
        plan = _plan_speech(model, on_progress)
    else:
        source = open_source(model, None if adapter is None else Path(adapter))
        model, plan = source.model, _plan_text(source, on_progress, **options)
    name = general.model_name(model.origin)
    for warning in plan.warnings:
        log.info("%s: %s", name, warning)
    targets = _targets(plan, folder, schemes or (DEFAULT_SCHEME,), file_stem, general.file_stem(model.origin))
    digests = write_targets(
        plan.tensors,
        targets,
        importance=plan.importance,
        on_progress=lambda fraction: on_progress("writing", fraction),
    )
    for target, written in zip(targets, digests, strict=True):
        verify_digests(target.path, written)
    warnings = list(plan.warnings)
    if plan.tokenizer is not None:
        warnings += check_chats(model.tokenizer, read_gguf(targets[0].path).metadata)
        (folder / MODELFILE).write_text(_modelfile(model, targets[0]), encoding="utf-8")
    reports = [describe_file(one.path, one.scheme) for one in targets] if skip_outputs else plan.compare(targets)
    _require_passed(model, reports, keep_failed)
    content = write_report(folder, reports, plan.tokenizer, warnings, model.origin.name, options)
    return ExportResult(
        model.net.config,
        tuple(target.path.name for target in targets),
        {"files": content["files"]},
        agreement=reports[0].outputs[0].agreement if reports[0].outputs else None,
        unverified_reason="outputs were not compared" if skip_outputs else "",
    )


def _targets(plan: _Plan, folder: Path, schemes: Sequence[str], file_stem: str, model_stem: str) -> list[Target]:
    return [
        Target(
            folder / f"{file_stem or f'{model_stem}-{scheme.upper()}'}.gguf",
            scheme,
            {**plan.metadata, **mixes.file_type_metadata(scheme)},
            plan.types(scheme),
        )
        for scheme in schemes
    ]


def _write_adapter(
    model: AnyModel, folder: Path, adapter: str | Path | None, schemes: Sequence[str], file_stem: str
) -> ExportResult:
    if adapter is None:
        raise ModelError("adapter_only needs the folder of an adapter")
    if len(schemes) > 1:
        raise ModelError(f"an adapter alone is written in one scheme at a time, not {len(schemes)}")
    scheme = schemes[0] if schemes else DEFAULT_ADAPTER_SCHEME
    path = folder / f"{file_stem or Path(adapter).resolve().name}.gguf"
    written = lora.write_lora(adapter, model.net.config, path, file_type=scheme)
    log.info("%s: LoRA of %d weights, alpha %g", path.name, len(written.weights), written.alpha)
    return ExportResult(
        model.net.config,
        (path.name,),
        {"files": [asdict(describe_file(path, scheme))]},
        unverified_reason="an adapter does not run without its model",
    )


def _plan_text(
    source: Source,
    on_progress: OnProgress,
    *,
    tensor_types: Sequence[str] = (),
    imatrix: str | Path = "",
    check_data: str | Path = "",
    runtimes: Mapping[str, Score] = NO_RUNTIMES,
) -> _Plan:
    """Convert config, names and tokenizer of a language model.

    Args:
        tensor_types: changes to the mixes, as attn_v=q6_k.
        imatrix: an importance matrix of llama.cpp, or a text to make one from.
        check_data: texts or conversations whose token ids must be the same, and on which outputs are compared too.
        runtimes: name → function that runs a file, to compare its outputs too.
    """
    model = source.model
    overrides = [mixes.parse_override(one) for one in tensor_types]
    texts = list(_read_texts(check_data)) if check_data else []
    converted = to_gguf(model.net.config, source.state)
    shapes = {name: one.shape for name, one in converted.tensors.items()}
    tokenizer = convert_tokenizer(
        model.tokenizer,
        shapes["token_embd.weight"][0],
        texts,
        model_name=general.model_name(model.origin),
        drop_excess=True,
    )
    matrix = _open_importance(source, imatrix, on_progress) if imatrix else None
    warnings = [*converted.notes, *tokenizer.warnings]
    quantizable = [
        name for name, shape in shapes.items() if name.startswith("blk.") and mixes.may_quantize(name, shape)
    ]
    if matrix and (absent := missing(matrix, quantizable)):
        warnings.append(f"{imatrix} has no importance of {absent[0]} and {len(absent) - 1} other weights of blocks")
    weights = sum(math.prod(shape) for shape in shapes.values())
    metadata = {
        **converted.metadata,
        **general.general_metadata(model.origin, weights),
        **general.sampling_metadata(model.net.generation_config),
        **tokenizer.metadata,
    }
    return _Plan(
        metadata | _importance_metadata(matrix, imatrix),
        converted.tensors,
        lambda scheme: mixes.choose_types(
            shapes, metadata, scheme, has_importance=matrix is not None, overrides=overrides
        ),
        lambda targets: compare_files(
            source, targets, texts, runtimes, lambda fraction: on_progress("comparing", fraction)
        ),
        partial(importance_for, matrix) if matrix else no_importance,
        tokenizer,
        tuple(warnings),
    )


def _plan_speech(model: CTCModel, on_progress: OnProgress) -> _Plan:
    """Convert config, names and vocabulary of a speech model."""
    metadata, tensors = speech.to_gguf_ctc(model)
    shapes = {name: one.shape for name, one in tensors.items()}
    return _Plan(
        metadata,
        tensors,
        lambda scheme: speech.choose_speech_types(shapes, scheme),
        lambda targets: compare_speech_files(model, targets, lambda fraction: on_progress("comparing", fraction)),
    )


def _modelfile(model: CausalModel, target: Target) -> str:
    template = model.tokenizer.chat_template
    return modelfile(
        target.path.name,
        target.metadata,
        template if isinstance(template, str) or template is None else template.get("default"),
        generation_config=model.net.generation_config.to_diff_dict(),
    )


def _require_passed(model: AnyModel, reports: Sequence[FileReport], keep_failed: bool) -> None:
    """Raise ModelError for the first file whose outputs differ too much, unless it is to be kept."""
    matrix = "" if model.task == "ctc" else " add an importance matrix (--imatrix),"
    for one in reports:
        if one.problem and keep_failed:
            log.warning("%s: %s; it is kept", one.name, one.problem)
        elif one.problem:
            raise ModelError(
                f"{one.scheme} is too lossy for {model.origin.name}: {one.problem}. Nothing was written; choose a"
                f" scheme with more bits,{matrix} or keep the file with --keep-failed"
            )


def _read_texts(path: str | Path) -> Iterator[str]:
    """Yield the texts of a data set; the messages of conversations are texts of their own."""
    for sample in islice(conversations.read_conversations(path), MAX_TEXTS):
        if isinstance(sample, Conversation):
            yield from (message.content for message in sample.messages if message.content)
        else:
            yield sample.text


def _open_importance(source: Source, path: str | Path, on_progress: OnProgress) -> ImportanceMatrix:
    """Return the importance matrix at `path`, or make one from the text there, with the whole model in memory."""
    if Path(path).suffix.lower() in IMATRIX_SUFFIXES:
        return read_imatrix(Path(path))
    batches = calibration_batches(source.model.tokenizer, Path(path))
    return collect_importance(
        source.load_net(),
        source.model.net.config,
        batches,
        datasets=[Path(path).name],
        on_progress=lambda fraction: on_progress("importance matrix", fraction),
    )


def _importance_metadata(matrix: ImportanceMatrix | None, path: str | Path) -> dict[str, Any]:
    """Return what llama.cpp's quantizer writes about an importance matrix."""
    if matrix is None:
        return {}
    return {
        "quantize.imatrix.file": Path(path).name,
        "quantize.imatrix.dataset": ", ".join(Path(one).name for one in matrix.datasets),
        "quantize.imatrix.entries_count": np.int32(len(matrix.values)),
        "quantize.imatrix.chunks_count": np.int32(matrix.chunks),
    }
