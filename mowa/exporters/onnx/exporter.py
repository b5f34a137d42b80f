"""A CTC net as ONNX: any batch, any length; read again and compared with the net before the folder takes its place.

A folder holds `model.onnx` and its weights beside it, and what `manifest` writes. The graph says in its own metadata
how it is fed and read (`says`), so that whoever has it alone can run it.

- inputs: `input_values` float32 [B, N], normalised as the audio settings say; where front ends let a mask keep padding
  out, `attention_mask` int64 [B, N], 1 where there is sound.
- output: `logits` float32 [B, T, V].

A net that was trained to hear in chunks has a `chunk.onnx` too (`export.chunks`), for live streams, over the same
weights. Products of narrow weights are `products`' affair, other tensors' widths `tensors`'. Who runs the folder is not
known here.
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

from mowa.errors import MissingDependency, ModelError
from mowa.exporters import verify
from mowa.exporters.manifest import ExportResult
from mowa.exporters.onnx import initializers, quant_ops
from mowa.exporters.onnx import streaming as one_chunk
from mowa.exporters.prepare import prepare_for_export
from mowa.io.hub import silence_transformers
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, get_trained_chunking
from mowa.types import Model

log = logging.getLogger("mowa")

GRAPH_FILE, TOKENS_FILE = "model.onnx", "tokens.txt"
OPSETS = range(18, 24)
DEFAULT_OPSET = 20  # GELU is an operator from there on


def unsupported_reason(model: Model) -> str:
    """As `Exporter.can`: ONNX holds every scheme."""
    return ""


def require_packages() -> None:
    """MissingPart where what exporting needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise MissingDependency(f"ONNX needs {missing.name}: pip install 'mowa[onnx]'") from None


def write(
    model: Model, folder: Path, *, opset: int = DEFAULT_OPSET, attention_mask: bool | None = None
) -> tuple[Any, ExportResult]:
    """As `Exporter.write`. `masked` False: a graph of one input, without a mask, for recordings that share no batch.

    What the graph says of the bundled sample and of noise is compared with what the net says, its inputs wide: float32
    must be the same, anything narrower must find the same output likeliest in 80 % of frames. What a scheme does to a
    model, the report of `mowa shrink` says.
    """
    if opset not in OPSETS:
        raise ModelError(f"opset {opset} is not among {OPSETS[0]} to {OPSETS[-1]}")
    wide = prepare_for_export(model, dequantize=True)
    with_mask = wide.config.feat_extract_norm == "layer" and attention_mask is not False
    name, live = model.origin.name, get_trained_chunking(wide.config)
    net = quant_ops.replace_linears(prepare_for_export(model), include_unquantized=live is not None)
    graphs = [GRAPH_FILE]
    with translate_export_errors(name):
        export_graph(_Graph(net), folder / GRAPH_FILE, with_mask, opset)
        if live is not None:
            one_chunk.export_chunk_graph(net, folder / one_chunk.CHUNK_GRAPH_FILE, opset)
            graphs.append(one_chunk.CHUNK_GRAPH_FILE)
    files = initializers.rewrite_graphs(folder, graphs, model.scheme, collect_metadata(model, with_mask))
    (folder / TOKENS_FILE).write_text(format_tokens(model), encoding="utf-8")
    farthest, agreeing = _compared(model, wide, folder / GRAPH_FILE, with_mask)
    if live is not None:
        how = ChunkConfig(live.chunk_sizes[0], live.left_context, live.lookaheads[-1])
        apart, alike = one_chunk.compare_chunked(
            wide, _opened(folder / one_chunk.CHUNK_GRAPH_FILE), verify.load_sample(model), how
        )
        farthest, agreeing = max(farthest, apart), min(agreeing, alike)
    verify.verify_tolerance(model, "ONNX", farthest, agreeing)
    details = {
        "masked": with_mask,
        "opset": opset,
        "graph": GRAPH_FILE,
        "chunk": one_chunk.CHUNK_GRAPH_FILE if live else None,
    }
    return wide, ExportResult(files, details, farthest, agreeing, packages=("onnx", "onnxscript", "onnxruntime"))


def collect_metadata(model: Model, takes_mask: bool) -> dict[str, str]:
    """The metadata of the graph: all that is needed to feed it and to read what it gives."""
    words, sound = model.vocabulary, model.preprocessing
    return {
        "vocabulary": json.dumps(words.tokens, ensure_ascii=False),
        "blank": str(words.blank),
        "delimiter": "" if words.delimiter is None else str(words.delimiter),
        "specials": json.dumps(sorted(words.specials)),
        "sample_rate": str(sound.rate_hz),
        "normalize": str(int(sound.normalize)),
        "masked": str(int(takes_mask)),
        "family": model.family.name,
        "scheme": model.scheme.name,
        "origin": model.origin.source,
        "license": model.origin.license or "",
    }


def format_tokens(model: Model) -> str:
    """The vocabulary as sherpa-onnx reads it: a symbol and its id in each line, `<blk>` the blank, `▁` a space."""
    words, lines = model.vocabulary, []
    for index, token in enumerate(words.tokens):
        symbol = "<blk>" if index == words.blank else "▁" if index == words.delimiter else token.replace(" ", "▁")
        lines.append(f"{symbol} {index}\n")
    return "".join(lines)


class _Graph(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.net(input_values, attention_mask=attention_mask).logits
        return logits


def export_graph(net: nn.Module, file: Path, takes_mask: bool, opset: int) -> None:
    """Write `net`, a function of recordings (and a mask), as ONNX for any batch and length."""
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
    """While the net called `name` is traced: no chatter, and ModelError where an operator has no equal."""
    with silence_exporter():
        try:
            yield
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(f"torch cannot write {name} as ONNX: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom, in a line: of an operator without an equal, its name."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _compared(model: Model, net: Any, graph: Path, masked: bool) -> tuple[float, float]:
    """`compare.apart` of what the graph and the net say, padded where that is allowed."""
    session, clips = _opened(graph), verify.load_clips(model)
    truth, found = verify.compute_logits(net, clips), []
    for batch in (clips[:2], clips[2:]) if masked else ([clip] for clip in clips):
        found += list(torch.from_numpy(run(session, batch, masked)))
    return verify.compare_logits([row[: len(ours)] for row, ours in zip(found, truth, strict=True)], truth)


def run(session: Any, clips: Sequence[np.ndarray], takes_mask: bool, padding_value: float = 0.0) -> np.ndarray:
    """Normalised recordings, float32 [n_i], as one batch → logits float32 [B, T, V], with what padding gave."""
    longest = max(map(len, clips))
    values = np.full((len(clips), longest), padding_value, np.float32)
    for row, clip in zip(values, clips, strict=True):
        row[: len(clip)] = clip
    feed = {"input_values": values}
    if takes_mask:
        feed["attention_mask"] = (np.arange(longest) < np.array([len(c) for c in clips])[:, None]).astype(np.int64)
    logits: np.ndarray = session.run(["logits"], feed)[0]
    return logits


def _opened(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


@contextmanager
def silence_exporter() -> Iterator[None]:
    """The exporter warns of what is not ours to mend, and logs every operator it lacks."""
    chatter = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [one.level for one in chatter]
    with warnings.catch_warnings(), silence_transformers():
        warnings.simplefilter("ignore")
        for one in chatter:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(chatter, levels, strict=True):
                one.setLevel(level)
