"""A CTC net as ONNX: any batch, any length; read again and compared with the net before the folder takes its place.

A folder holds `model.onnx` and its weights beside it, `mowa.json` (what it is, of which checkpoint, checksums, how far
from the net), and config, vocabulary and audio settings as transformers has them.

- inputs: `input_values` float32 [B, N], normalised as the audio settings say; where front ends let a mask keep padding
  out, `attention_mask` int64 [B, N], 1 where there is sound.
- output: `logits` float32 [B, T, V].

A net that was trained to hear in chunks has a `chunk.onnx` too (`export.chunks`), for live streams.

int8: weights of matrix products by row, activations as they come; convolutions stay float32, which is faster and more
exact. Who runs the folder is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.adapt import merge, processor, store
from mowa.data import audio
from mowa.errors import MissingPart, ModelError
from mowa.export import chunks as one_chunk
from mowa.families.chunks import Chunks, reach, trained_for
from mowa.families.patch import positions_by_table
from mowa.files import becoming, quiet, read_json
from mowa.nouns import Model, Origin, Preprocessing, Vocabulary

log = logging.getLogger("mowa")

NOTE, FORMAT, KIND = "mowa.json", 1, "onnx"
GRAPH = "model.onnx"
FARTHEST = 1e-3  # nats: what float32 may be away from the net in any log-probability
NEVER = -50.0  # nats: what is less likely than this is not compared, float32 itself is too coarse there
AGREEING = 0.8  # the share of frames in which int8 must find the same output likeliest
SAMPLE = Path(__file__).parents[1] / "assets" / "sample.flac"
SAMPLE_S = 5


@dataclass(frozen=True, slots=True)
class Exported:
    """What a folder says of itself. `config` is the transformers config of the net; `scheme` float32 or int8; `masked`
    says whether the graph takes a mask; `agreeing` is the share of frames with the net's likeliest output."""

    folder: Path
    family: str
    scheme: str
    masked: bool
    origin: Origin
    config: Any
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    agreeing: float

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    @property
    def chunk(self) -> Path | None:
        """The graph of one chunk, where the net was trained to hear in chunks."""
        return self.folder / one_chunk.GRAPH if trained_for(self.config) else None


def export(model: Model, out: Path, *, int8: bool = False) -> Path:
    """Write `model`, adapter included, as ONNX into `out`, which must not be there. → out. `model` stays as it is.

    Raises ModelError where what was written does not say what the net says (nothing is left of it then), or torch
    cannot trace the net; DataError where `out` is there; MissingPart without onnx.
    """
    parts()
    net = plain(model)
    masked = net.config.feat_extract_norm == "layer"
    with becoming(Path(out)) as folder:
        _trace(net, folder / GRAPH, masked, model.origin.name)
        live = trained_for(net.config)
        if live is not None:
            with _tracing(model.origin.name):
                one_chunk.write(net, folder / one_chunk.GRAPH)
        if int8:
            for graph in (GRAPH, one_chunk.GRAPH) if live else (GRAPH,):
                _narrow(folder, graph)
        farthest, agreeing = _compared(model, net, folder / GRAPH, masked)
        if live is not None:
            apart, alike = _compared_live(
                net, folder / one_chunk.GRAPH, Chunks(live.sizes[0], live.left, live.ahead[-1])
            )
            farthest, agreeing = max(farthest, apart), min(agreeing, alike)
        if not int8 and not farthest <= FARTHEST:
            raise ModelError(
                f"the ONNX of {model.origin.name} is not what the net is: {farthest:.2g} nats away, {FARTHEST} allowed"
            )
        if int8 and agreeing < AGREEING:
            raise ModelError(
                f"{model.origin.name} does not bear int8: in {1 - agreeing:.0%} of frames another letter is likeliest;"
                " export it in float32"
            )
        if int8:
            log.info("int8: the same output likeliest in %.1f %% of frames of the sample", agreeing * 100)
        net.config.save_pretrained(folder)
        processor.write(model.vocabulary, model.preprocessing, folder)
        _write_note(model, folder, masked, int8, {"farthest": farthest, "agreeing": agreeing})
    return Path(out)


def read(folder: Path) -> Exported:
    """What the export in `folder` is. ModelError: none there, a newer format's, files missing or changed."""
    from transformers import AutoConfig

    if not (folder / NOTE).is_file():
        raise ModelError(f"{folder} holds no export: name a folder that `mowa` exported to, with a {NOTE}")
    note = read_json(folder / NOTE)
    if note.get("format") != FORMAT or note.get("kind") != KIND:
        raise ModelError(f"{folder}/{NOTE} is {note.get('kind', 'nothing')} of format {note.get('format')}, not {KIND}")
    try:
        for name, known in note["files"].items():
            if not (folder / name).is_file() or store.sha256_of(folder / name) != known:
                raise ModelError(f"{folder}/{name} is missing or damaged: export the model again")
        words, origin = note["vocabulary"], note["origin"]
        return Exported(
            folder=folder,
            family=note["family"],
            scheme=note["scheme"],
            masked=note["masked"],
            origin=Origin(**origin | {"folder": folder}),
            config=AutoConfig.from_pretrained(folder),
            vocabulary=Vocabulary(
                tuple(words["tokens"]), words["blank"], words["delimiter"], frozenset(words["specials"])
            ),
            preprocessing=Preprocessing(**note["preprocessing"]),
            agreeing=note["compared"]["agreeing"],
        )
    except (KeyError, TypeError) as missing:
        raise ModelError(f"{folder}/{NOTE} is damaged: it does not say {missing}; export the model again") from None


def parts() -> None:
    """MissingPart where what exporting needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise MissingPart(f"ONNX needs {missing.name}: pip install 'mowa[onnx]'") from None


def digest(model: Model) -> str:
    """SHA-256 (hex) of all that makes the net's numbers: its weights, an adapter's among them, and its config."""
    found = hashlib.sha256(model.net.config.to_json_string().encode())
    for name, value in sorted(model.net.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def plain(model: Model) -> Any:
    """The net without PEFT and without weight norm, in float32 on the CPU, over the same tensors where it can be."""
    net = merge.merge(model).net
    if {(p.dtype, p.device.type) for p in net.parameters()} != {(torch.float32, "cpu")}:
        net = net.to("cpu", torch.float32)
    positions_by_table(net, training=True)
    along = net.base_model.encoder.pos_conv_embed
    if hasattr(getattr(along, "conv", None), "parametrizations"):
        along.conv = _folded(along.conv)
    if net.config._attn_implementation != "eager":
        net.set_attn_implementation("eager")  # sdpa's mask becomes a selection in every layer
    return net.eval().requires_grad_(False)


def _folded(conv: Any) -> nn.Conv1d:
    """The convolution with its weight norm multiplied in. torch's own removal would take the weight from every copy."""
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size
    made = nn.Conv1d(*sizes, padding=conv.padding, groups=conv.groups, device="meta")
    made.weight, made.bias = nn.Parameter(conv.weight.detach()), nn.Parameter(conv.bias.detach())
    return made


class _Graph(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.net(input_values, attention_mask=attention_mask).logits
        return logits


def _trace(net: Any, file: Path, masked: bool, name: str) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 16_000), np.float32))
    inputs: tuple[Tensor, ...] = (values,)
    names, axes = ["input_values"], [{0: "batch", 1: "time"}]
    if masked:
        mask = torch.ones(values.shape, dtype=torch.int64)
        mask[1, 12_000:] = 0
        inputs, names, axes = (values, mask), [*names, "attention_mask"], axes * 2
    with _tracing(name):
        torch.onnx.export(
            _Graph(net).eval(),
            inputs,
            str(file),
            input_names=names,
            output_names=["logits"],
            dynamo=True,
            opset_version=20,
            dynamic_shapes=tuple(axes),
            verbose=False,
        )


@contextmanager
def _tracing(name: str) -> Iterator[None]:
    with _hushed():
        try:
            yield
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"torch cannot write {name} as ONNX: {reason}") from error


def _compared_live(net: Any, graph: Path, chunks: Chunks) -> tuple[float, float]:
    return one_chunk.compared(net, _opened(graph), audio.load(SAMPLE)[: SAMPLE_S * 16_000], chunks, NEVER)


def _narrow(folder: Path, graph: str) -> None:
    """A graph in `folder` with its matrix products in int8; the file names stay."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = folder / "int8"
    made.mkdir()
    with _hushed():
        quantize_dynamic(
            folder / graph,
            made / graph,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=True,
        )
    for file in folder.glob(f"{graph}*"):
        file.unlink()
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()


@torch.inference_mode()
def _compared(model: Model, net: Any, graph: Path, masked: bool) -> tuple[float, float]:
    """The largest difference of a log-probability, over noise and the bundled sample, padded where that is allowed,
    and the share of the frames with the same likeliest output."""
    session = _opened(graph)
    speech = audio.load(SAMPLE)[: SAMPLE_S * model.preprocessing.rate_hz]
    noise = np.random.default_rng(1).standard_normal(4_097).astype(np.float32)
    least = reach(net.config)
    farthest, same, frames = 0.0, 0, 0
    for clips in ([speech, noise], [noise[:least]]) if masked else ([speech], [noise], [noise[:least]]):
        ready = [audio.normalize(clip) if model.preprocessing.normalize else clip for clip in clips]
        longest = max(map(len, ready))
        values = np.stack([np.pad(clip, (0, longest - len(clip))) for clip in ready]).astype(np.float32)
        feed = {"input_values": values}
        if masked:
            lengths = np.array([len(clip) for clip in ready])
            feed["attention_mask"] = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        theirs = torch.from_numpy(session.run(["logits"], feed)[0]).log_softmax(-1).clamp(min=NEVER)
        for clip, row in zip(ready, theirs, strict=True):
            ours = net(torch.from_numpy(clip)[None]).logits[0].log_softmax(-1).clamp(min=NEVER)
            farthest = max(farthest, float((row[: len(ours)] - ours).abs().nan_to_num(nan=torch.inf).max()))
            same += int((row[: len(ours)].argmax(-1) == ours.argmax(-1)).sum())
            frames += len(ours)
    return farthest, same / frames


def _opened(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _write_note(model: Model, folder: Path, masked: bool, int8: bool, compared: dict[str, float]) -> None:
    words = model.vocabulary
    note = {
        "format": FORMAT,
        "kind": KIND,
        "family": model.family.name,
        "scheme": "int8" if int8 else "float32",
        "masked": masked,
        "origin": {name: value for name, value in asdict(model.origin).items() if name != "folder"},
        "weights_sha256": digest(model),
        "files": {file.name: store.sha256_of(file) for file in sorted(folder.glob("*.onnx*"))},
        "compared": compared,
        "vocabulary": {
            "tokens": words.tokens,
            "blank": words.blank,
            "delimiter": words.delimiter,
            "specials": sorted(words.specials),
        },
        "preprocessing": asdict(model.preprocessing),
        "made_by": store.makers()
        | {package: store.version_of(package) for package in ("onnx", "onnxscript", "onnxruntime")},
    }
    (folder / NOTE).write_text(json.dumps(note, ensure_ascii=False, indent=1), encoding="utf-8")


@contextmanager
def _hushed() -> Iterator[None]:
    """The exporter and the quantiser warn of what is not ours to mend, and log every operator they lack."""
    chatter = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [one.level for one in chatter]
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        for one in chatter:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(chatter, levels, strict=True):
                one.setLevel(level)
