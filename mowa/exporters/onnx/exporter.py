"""Export CTC models to ONNX, for any batch size and length.

The folder holds `model.onnx`, its weights in `model.onnx.data`, and `tokens.txt` for sherpa-onnx. The metadata of the
graph (`collect_metadata`) suffices to run it without the other files.

- inputs: `input_values` float32 [B, N], normalized as the audio settings say; for models with layer norm in the feature
  extractor also `attention_mask` int64 [B, N], 1 for samples and 0 for padding.
- output: `logits` float32 [B, T, V].

A model trained for streaming also gets `chunk.onnx`, over the same weights (see `streaming`).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.errors import ModelError
from mowa.exporters import verify
from mowa.exporters.manifest import ExportResult
from mowa.exporters.onnx import initializers, quant_ops
from mowa.exporters.onnx import streaming as chunk_export
from mowa.exporters.prepare import prepare_for_export
from mowa.io.hub import silence_transformers
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, get_trained_chunking
from mowa.models.diff import ModelDiff, compare
from mowa.types import CTCModel

log = logging.getLogger("mowa")

GRAPH_FILE, TOKENS_FILE = "model.onnx", "tokens.txt"
OPSETS = range(18, 24)
DEFAULT_OPSET = 20  # the first with a Gelu operator


def unsupported_reason(model: CTCModel) -> str:
    """See `Exporter.unsupported_reason`; every scheme is supported."""
    return ""


def write(
    model: CTCModel, folder: Path, *, opset: int = DEFAULT_OPSET, attention_mask: bool | None = None
) -> ExportResult:
    """See `Exporter.write`. With `attention_mask=False` the graph has no mask, and a batch needs equal lengths.

    The graph is compared with the dequantized net (inputs not quantized) on the clips of `verify.load_clips`, within
    the tolerances of `verify_tolerance`. `mowa quantize` reports what a scheme costs in accuracy.
    """
    if opset not in OPSETS:
        raise ModelError(f"opset {opset} is not supported: use {OPSETS[0]} to {OPSETS[-1]}")
    reference = prepare_for_export(model, dequantize=True)
    takes_mask = read_anatomy(reference).is_padding_exact and attention_mask is not False
    name, chunking = model.origin.name, get_trained_chunking(reference.config)
    net = quant_ops.replace_linears(prepare_for_export(model), include_unquantized=chunking is not None)
    graphs = [GRAPH_FILE]
    with translate_export_errors(name):
        export_graph(_LogitsNet(net), folder / GRAPH_FILE, takes_mask, opset)
        if chunking is not None:
            chunk_export.export_chunk_graph(net, folder / chunk_export.CHUNK_GRAPH_FILE, opset)
            graphs.append(chunk_export.CHUNK_GRAPH_FILE)
    files = initializers.rewrite_graphs(folder, graphs, model.scheme, collect_metadata(model, takes_mask))
    (folder / TOKENS_FILE).write_text(format_tokens(model), encoding="utf-8")
    diffs = [_compare(model, reference, folder / GRAPH_FILE, takes_mask)]
    if chunking is not None:
        config = ChunkConfig(chunking.chunk_sizes[0], chunking.left_context, chunking.lookaheads[-1])
        session = _open_session(folder / chunk_export.CHUNK_GRAPH_FILE)
        diffs.append(chunk_export.compare_chunked(reference, session, verify.load_sample(model), config))
    for diff in diffs:
        verify.verify_tolerance(model, "ONNX", diff)
    details = {
        "attention_mask": takes_mask,
        "opset": opset,
        "graph": GRAPH_FILE,
        "chunk": chunk_export.CHUNK_GRAPH_FILE if chunking else None,
    }
    packages = ("onnx", "onnxscript", "onnxruntime")
    max_abs_diff, agreement = max(diff.max_abs_diff for diff in diffs), min(diff.agreement for diff in diffs)
    return ExportResult(reference.config, files, details, max_abs_diff, agreement, packages=packages)


def collect_metadata(model: CTCModel, takes_mask: bool) -> dict[str, str]:
    """Return the metadata of the graph, which suffices to compute its inputs and decode its output."""
    vocabulary, preprocessing = model.vocabulary, model.preprocessing
    return {
        "vocabulary": json.dumps(vocabulary.tokens, ensure_ascii=False),
        "texts": json.dumps(vocabulary.texts, ensure_ascii=False),
        "blank": str(vocabulary.blank),
        "delimiter": "" if vocabulary.delimiter is None else str(vocabulary.delimiter),
        "specials": json.dumps(sorted(vocabulary.specials)),
        "sample_rate": str(preprocessing.rate_hz),
        "normalize": str(int(preprocessing.normalize)),
        "attention_mask": str(int(takes_mask)),
        "family": model.family.name,
        "scheme": model.scheme.name,
        "origin": model.origin.source,
        "license": model.origin.license or "",
    }


def format_tokens(model: CTCModel) -> str:
    """Format the vocabulary for sherpa-onnx: a symbol and its id per line, `<blk>` for the blank, `▁` for a space."""
    vocabulary = model.vocabulary
    symbols = [text.replace(" ", "▁") for text in vocabulary.texts]
    for special in vocabulary.specials:
        symbols[special] = vocabulary.tokens[special]
    symbols[vocabulary.blank] = "<blk>"
    return "".join(f"{symbol} {index}\n" for index, symbol in enumerate(symbols))


class _LogitsNet(nn.Module):
    """A transformers model that returns only its logits."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.net(input_values, attention_mask=attention_mask).logits
        return logits


def export_graph(net: nn.Module, file: Path, takes_mask: bool, opset: int) -> None:
    """Trace `net`, called with samples and optionally a mask, to ONNX with dynamic batch size and length."""
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 16_000), np.float32))
    inputs: tuple[Tensor, ...] = (values,)
    names, axes = ["input_values"], [{0: "batch", 1: "time"}]
    if takes_mask:
        mask = torch.ones(values.shape, dtype=torch.int64)
        mask[1, 12_000:] = 0
        inputs, names, axes = (values, mask), [*names, "attention_mask"], axes * 2
    torch.onnx.export(
        net.eval(),
        inputs,
        str(file),
        input_names=names,
        output_names=["logits"],
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=tuple(axes),
        verbose=False,
    )


@contextmanager
def translate_export_errors(name: str) -> Iterator[None]:
    """Silence the exporter within the context, and raise its errors as ModelError."""
    with silence_exporter():
        try:
            yield
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(f"torch cannot export {name} to ONNX: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    """Return the first line of the original error, which names an unsupported operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _compare(model: CTCModel, net: Any, graph: Path, takes_mask: bool) -> ModelDiff:
    """Compare the graph with the net, in padded batches if there is a mask."""
    session, clips = _open_session(graph), verify.load_clips(model)
    reference, logits = verify.compute_logits(net, clips), []
    for batch in (clips[:2], clips[2:]) if takes_mask else ([clip] for clip in clips):
        logits += list(torch.from_numpy(run(session, batch, takes_mask)))
    valid = [row[: len(expected)] for row, expected in zip(logits, reference, strict=True)]
    return compare(reference, valid)


def run(session: Any, clips: Sequence[np.ndarray], takes_mask: bool, padding_value: float = 0.0) -> np.ndarray:
    """Run preprocessed clips, float32 [n_i] each, as one padded batch. Returns logits, float32 [B, T, V]."""
    longest = max(map(len, clips))
    values = np.full((len(clips), longest), padding_value, np.float32)
    for row, clip in zip(values, clips, strict=True):
        row[: len(clip)] = clip
    feed = {"input_values": values}
    if takes_mask:
        feed["attention_mask"] = (np.arange(longest) < np.array([len(c) for c in clips])[:, None]).astype(np.int64)
    logits: np.ndarray = session.run(["logits"], feed)[0]
    return logits


def _open_session(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


@contextmanager
def silence_exporter() -> Iterator[None]:
    """Suppress warnings and logging of torch's ONNX exporter within the context."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), silence_transformers():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
