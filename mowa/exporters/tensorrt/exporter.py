"""A CTC net for TensorRT: a typed ONNX graph, and the engine of it, or all that builds and checks one where it can be.

A folder holds `model.onnx` and its weights; `build.py` with `build.json` and `reference.npz`, which make the engine on
a machine with a GPU and keep it only if it says what the net says; `build.sh`, the same by trtexec; and `model.engine`,
where TensorRT and a GPU are here.

- inputs: `input_values` float32 [B, N], normalised as the audio settings say; where front ends let a mask keep padding
  out, `attention_mask` int64 [B, N], 1 where there is sound.
- output: `logits` float32 [B, T, V].

Nothing is left to TensorRT to choose. Half precision is in the graph's own types and in products alone, so that
LayerNormalization and Softmax are float32: in float16 they overflow after attention, and what comes of it may be finite
and wrong (github.com/NVIDIA/TensorRT, issues 4111 and 4493). int8 is symmetric on both sides of a product, as TensorRT
has no other, and products beside it are float16. Who runs the folder is not known here.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.data import audio
from mowa.errors import ModelError
from mowa.exporters import verify
from mowa.exporters.manifest import ExportResult
from mowa.exporters.onnx import exporter as graphs
from mowa.exporters.onnx import initializers, quant_ops, strong_typing
from mowa.exporters.onnx.exporter import DEFAULT_OPSET, GRAPH_FILE
from mowa.exporters.prepare import dequantize_linear, prepare_for_export
from mowa.exporters.tensorrt import build as building
from mowa.exporters.verify import MAX_ABS_DIFF, MIN_AGREEMENT
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder.chunk_mask import receptive_field
from mowa.types import FLOAT32, Model

log = logging.getLogger("mowa")

ENGINE_FILE = "model.engine"
Profile = Sequence[Sequence[int]]
DEFAULT_PROFILE: Profile = ((1, 16_000), (1, 160_000), (4, 480_000))
MAX_VERIFY_S = 5  # the longest that is compared but for the profile's own
TOLERANCE_FACTOR = 2.0  # times the error that such arithmetic was seen to make here
MASKABLE_NETS = ("Wav2Vec2ForCTC", "HubertForCTC")
HALF_DTYPES = {"float16": "float16", "bfloat16": "bfloat16", "int8": "float16"}  # of what is not quantised
MASK_VALUE = -1e9  # added to the scores of what is not there
SUPPORTED_SCHEMES = (("float32", "none"), ("float16", "none"), ("bfloat16", "none"), ("int8", "static"))
UNSUPPORTED_SCHEMES = {
    ("int8", "dynamic"): "TensorRT's ONNX parser has no DynamicQuantizeLinear",
    ("int8", "none"): "TensorRT multiplies int8 weights with int8 inputs alone",
    ("int4", "none"): "its int4 is ONNX Runtime's MatMulNBits, which TensorRT has not",
    ("nf4", "none"): "nf4 is ONNX Runtime's MatMulBnb4, which TensorRT has not",
    ("mixed", "dynamic"): "it has operators that TensorRT has not",
}
# Operators of nets like these that onnx-tensorrt reads in the types they come in (its docs/operators.md, 10.15).
SUPPORTED_OPS = frozenset(
    "Abs Add And Cast Clip Concat Constant ConstantOfShape Conv DequantizeLinear Div Equal Expand Floor Gather"
    " GatherND Gelu Gemm Greater GreaterOrEqual Identity InstanceNormalization LayerNormalization Less LessOrEqual Log"
    " MatMul Max Min Mul Neg Not Or Pad Pow QuantizeLinear Range Reciprocal ReduceMean ReduceSum Relu Reshape Shape"
    " Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where".split()
)


def unsupported_reason(model: Model) -> str:
    """As `Exporter.can`."""
    kind = model.scheme.weights, model.scheme.activations
    return (
        ""
        if kind in SUPPORTED_SCHEMES
        else f"{UNSUPPORTED_SCHEMES.get(kind, 'TensorRT has no such products')}; use int8-static, or bf16"
    )


def require_packages() -> None:
    """MissingPart where what exporting needs is not installed; TensorRT itself need not be."""
    graphs.require_packages()


def write(model: Model, folder: Path, *, profile: Profile = DEFAULT_PROFILE) -> tuple[Any, ExportResult]:
    """As `Exporter.write`. `profile`: batch and samples of the smallest, the usual and the largest input.

    What the graph says is compared in ONNX Runtime, in its own types, and what the engine says where there can be one.
    float32 must say what the net says in float64, to 1e-3 nats or twice what its own float32 is away; anything narrower
    must find the same output likeliest in 80 % of frames, and an engine may be twice as far from the net as the graph.
    """
    wide = prepare_for_export(model, dequantize=True)
    _check(profile, receptive_field(wide.config))
    masked = _masked(wide)
    _trace(model, wide, folder, masked)
    files = initializers.rewrite_graphs(folder, [GRAPH_FILE], FLOAT32, graphs.collect_metadata(model, masked))
    cases, own = _cases(model, wide, profile, masked, exact=model.scheme.weights == "float32")
    found = building.compare_logits(_said(folder / GRAPH_FILE, cases), cases)
    if model.scheme.weights == "float32":
        allowed = {"farthest": max(TOLERANCE_FACTOR * own["farthest"], MAX_ABS_DIFF)}
    else:
        allowed = {"rms": max(TOLERANCE_FACTOR * found["rms"], MAX_ABS_DIFF), "agreeing": MIN_AGREEMENT}
    _judge(model, found, allowed)
    names = ["input_values", *(["attention_mask"] if masked else [])]
    shapes = {name: [list(shape) for shape in profile] for name in names}
    how = {"graph": GRAPH_FILE, "engine": ENGINE_FILE, "profile": shapes, "allowed": allowed}
    _kit(folder, how, cases)
    engine, unchecked = ENGINE_FILE if _here() else None, ""
    if engine is not None:
        found = _built(model, folder, allowed, cases)
        files = (*files, engine)
    else:
        unchecked = (
            "TensorRT itself was not run: compared is model.onnx in ONNX Runtime, its products rounded as its types"
            " say; build.py compares the engine where it is built"
        )
    details = how | {"engine": engine, "masked": masked, "opset": DEFAULT_OPSET}
    made_by = ("onnx", "onnxscript", "onnxruntime", *(["tensorrt"] if engine else []))
    return wide, ExportResult(files, details, found["farthest"], found["agreeing"], unchecked, made_by)


def _check(profile: Profile, least: int) -> None:
    try:
        ascending = all(1 <= a <= b <= c for a, b, c in zip(*profile, strict=True))
        fits = len(profile) == 3 and all(len(shape) == 2 for shape in profile) and ascending
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ModelError(
            f"a profile is batch and samples of the smallest, the usual and the largest input, as {DEFAULT_PROFILE};"
            f" not {profile}"
        )
    if profile[0][1] < least:
        raise ModelError(f"the net needs {least} samples for a frame, and the profile begins at {profile[0][1]}")


def _masked(net: Any) -> bool:
    """Whether padding can be kept out, by a net that is computed part by part."""
    config = net.config
    stock = type(net).__name__ in MASKABLE_NETS and not getattr(config, "add_adapter", False)
    return stock and config.feat_extract_norm == "layer"


class _Net(nn.Module):
    """A net as a function of tensors. With a mask its encoder's parts are called one by one, and frame t of a row is
    there where its samples are: t · hop + reach ≤ n. transformers' own mask is the same, but made of operators that
    TensorRT has not in these types (NonZero of booleans, CumSum of integers)."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.hop, self.reach = math.prod(net.config.conv_stride), receptive_field(net.config)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            logits: Tensor = self.net(input_values).logits
            return logits
        base, stable = self.net.base_model, self.net.config.do_stable_layer_norm
        states = base.feature_projection(base.feature_extractor(input_values).transpose(1, 2))
        states = states[0] if isinstance(states, tuple) else states
        ends = torch.arange(states.shape[1]) * self.hop + self.reach
        there = (ends[None] <= attention_mask.sum(-1, keepdim=True)).to(states.dtype)
        states = states * there[..., None]
        states = states + base.encoder.pos_conv_embed(states)
        states = states if stable else base.encoder.layer_norm(states)
        for layer in base.encoder.layers:
            made = layer(states, attention_mask=(1 - there[:, None, None]) * MASK_VALUE)
            states = made[0] if isinstance(made, tuple) else made
        states = base.encoder.layer_norm(states) if stable else states
        out: Tensor = self.net.lm_head(states)
        return out


def _trace(model: Model, wide: Any, folder: Path, masked: bool) -> None:
    """`model.onnx` in `folder`, every tensor in its type. ModelError: an operator has no equal in ONNX or TensorRT."""
    import onnx

    scheme = model.scheme.weights
    net = _quantised(model) if scheme == "int8" else wide
    with graphs.translate_export_errors(model.origin.name), TemporaryDirectory(dir=folder.parent) as place:
        graphs.export_graph(_Net(net), Path(place) / GRAPH_FILE, masked, DEFAULT_OPSET)
        made = onnx.load(f"{place}/{GRAPH_FILE}")
    if unknown := sorted(strong_typing.list_operators(made.graph) - SUPPORTED_OPS):
        raise ModelError(f"TensorRT does not read {', '.join(unknown)}, which {model.origin.name} needs: use onnx")
    strong_typing.make_symmetric(made.graph)
    if scheme in HALF_DTYPES:
        strong_typing.cast_to_half(made.graph, HALF_DTYPES[scheme])
    _save(made, folder)


def _quantised(model: Model) -> Any:
    """The net with products of int8 where inputs have a range, and wide linears elsewhere."""
    net = prepare_for_export(model)
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantizedLinear) and module.activations != "static":
            net.set_submodule(name, dequantize_linear(module))
    return quant_ops.replace_linears(net)


def _save(model: Any, folder: Path) -> None:
    import onnx

    onnx.save_model(
        model, folder / GRAPH_FILE, save_as_external_data=True, location=f"{GRAPH_FILE}.data", size_threshold=1024
    )


def _cases(
    model: Model, net: Any, profile: Profile, masked: bool, *, exact: bool
) -> tuple[list[building.Arrays], dict[str, float]]:
    """Inputs at the corners of the profile and between them, what the net says, in float64 where it is to be `exact`,
    and how far from that it is in float32. Speech and noise by turns; where there is a mask, the rows of a batch are of
    many lengths. Engines were seen to be right in the usual shape alone (github.com/NVIDIA/TensorRT, issue 4450)."""
    (few, least), (usual, best), (many, most) = profile
    speech, rng = audio.load_audio(verify.SAMPLE), np.random.default_rng(1)
    enough = max(least, MAX_VERIFY_S * model.preprocessing.rate_hz)
    shapes = [(few, least), (usual, min(best, enough)), (many, min(most, enough)), (few, most)]
    cases, plainly, truth = [], [], copy.deepcopy(net).double() if exact else net
    for batch, longest in dict.fromkeys(shapes):
        lengths = np.linspace(longest, least, batch).astype(int) if masked else np.full(batch, longest)
        values = np.full((batch, longest), model.preprocessing.padding_value, np.float32)
        for index, length in enumerate(lengths):
            row = rng.standard_normal(length, np.float32) if index % 2 else np.resize(speech, length)
            values[index, :length] = verify.preprocess(model, row)
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        case = {"input_values": values} | ({"attention_mask": mask} if masked else {})
        given = {name: torch.from_numpy(value) for name, value in case.items()}
        with torch.inference_mode():
            plainly.append(net(**given).logits.numpy())
            said = plainly[-1]
            if exact:
                said = truth(**given | {"input_values": given["input_values"].double()}).logits.float().numpy()
        frames = [_frames(net.config, length) if masked else said.shape[1] for length in lengths]
        cases.append(case | {"logits": said, "frames": np.array(frames)})
    return cases, building.compare_logits(plainly, cases)


def _frames(config: Any, samples: int) -> int:
    return (int(samples) - receptive_field(config)) // math.prod(config.conv_stride) + 1


def _said(graph: Path, cases: Sequence[building.Arrays]) -> list[np.ndarray]:
    """What the graph says in ONNX Runtime, which has no such halves on processors, so they are emulated; nothing is
    optimised, as roundings would be dropped."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with TemporaryDirectory() as place:
        made = onnx.load(graph)
        strong_typing.emulate_half(made.graph)
        _save(made, Path(place))
        session = onnxruntime.InferenceSession(f"{place}/{GRAPH_FILE}", options, providers=["CPUExecutionProvider"])
        return [session.run(["logits"], building.select_inputs(case))[0] for case in cases]


def _judge(model: Model, found: dict[str, float], allowed: dict[str, float]) -> None:
    name, scheme = model.origin.name, model.scheme
    if scheme.weights == "float32":
        if why := building.check_tolerances(found, allowed):
            raise ModelError(f"the graph of {name} is not what the net is: {why}")
    else:
        instead = "bf16" if scheme.weights == "float16" else "float32"
        verify.verify_tolerance(model, "TensorRT", found["farthest"], found["agreeing"], alternative=instead)


def _kit(folder: Path, how: dict[str, Any], cases: Sequence[building.Arrays]) -> None:
    """All that builds the engine elsewhere."""
    (folder / "build.json").write_text(json.dumps(how, indent=1))
    (folder / "build.py").write_text(Path(building.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    kept: dict[str, Any] = {f"{index}.{name}": of for index, case in enumerate(cases) for name, of in case.items()}
    np.savez_compressed(folder / "reference.npz", **kept)
    shapes = []
    for index, word in enumerate(("min", "opt", "max")):
        each = (f"{name}:{'x'.join(map(str, of[index]))}" for name, of in how["profile"].items())
        shapes.append(f"  --{word}Shapes={','.join(each)}")
    line = [
        "trtexec",
        f"  --onnx={GRAPH_FILE}",
        "  --saveEngine=unchecked.engine",
        "  --stronglyTyped",
        "  --skipInference",
    ]
    line += ["  --noTF32", *shapes]
    script = folder / "build.sh"
    script.write_text(
        "#!/bin/sh\n"
        "# The engine by trtexec; build.py keeps it as model.engine only if it says what the net says.\n"
        'set -e\ncd "$(dirname "$0")"\n' + " \\\n".join(line) + "\npython3 build.py unchecked.engine\n"
    )
    script.chmod(0o755)


def _here() -> bool:
    """Whether an engine can be built on this machine."""
    try:
        import_module("tensorrt")
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def _built(model: Model, folder: Path, allowed: dict[str, float], cases: Sequence[building.Arrays]) -> dict[str, float]:
    try:
        engine = building.build_engine(folder)
        found = building.compare_logits(
            building.run_engine(engine, [building.select_inputs(case) for case in cases]), cases
        )
    except RuntimeError as error:
        raise ModelError(f"{model.origin.name}: {error}") from error
    if why := building.check_tolerances(found, allowed):
        raise ModelError(f"TensorRT's engine of {model.origin.name} does not say what the net says: {why}")
    (folder / ENGINE_FILE).write_bytes(engine)
    return found
