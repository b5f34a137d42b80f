"""Export CTC models to TensorRT: a strongly typed ONNX graph, and an engine or the files to build one elsewhere.

The folder holds `model.onnx` with its weights; `build.py`, `diff.py`, `build.json` and `reference.npz`, which build the
engine on a machine with a GPU and save it only if it matches the model; `build.sh`, the same with trtexec; and
`model.engine`, if TensorRT and a GPU are available at export.

- inputs: `input_values` float32 [B, N], normalized as the audio settings say; for models with layer norm in the feature
  extractor also `attention_mask` int64 [B, N], 1 for samples and 0 for padding.
- output: `logits` float32 [B, T, V].

TensorRT chooses no precision itself. Only products are in half precision, while LayerNormalization and Softmax stay
float32: in float16 they overflow after attention, and the result may be finite and wrong (github.com/NVIDIA/TensorRT,
issues 4111 and 4493). int8 is symmetric for inputs and weights, as TensorRT requires, with other products in float16.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
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
from mowa.io.hub import SAMPLE_CLIP
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models import diff as model_diff
from mowa.models.ctc_encoder import anatomy
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.diff import ModelDiff, compare
from mowa.models.tolerances import ENGINE_DRIFT_RATIO, MAX_ABS_DIFF, MIN_AGREEMENT
from mowa.types import FLOAT32, CTCModel

log = logging.getLogger("mowa")

ENGINE_FILE = "model.engine"
Profile = Sequence[Sequence[int]]
DEFAULT_PROFILE: Profile = ((1, 16_000), (1, 160_000), (4, 480_000))
MAX_VERIFY_S = 5  # limit for the length of compared inputs, except for the largest of the profile
HALF_DTYPES = {"float16": "float16", "bfloat16": "bfloat16", "int8": "float16"}  # scheme → unquantized products
MASK_VALUE = -1e9  # added to attention scores of padding
SUPPORTED_SCHEMES = (("float32", "none"), ("float16", "none"), ("bfloat16", "none"), ("int8", "static"))
UNSUPPORTED_SCHEMES = {
    ("int8", "dynamic"): "TensorRT's ONNX parser has no DynamicQuantizeLinear",
    ("int8", "none"): "TensorRT multiplies int8 weights by int8 inputs only",
    ("int4", "none"): "TensorRT does not support ONNX Runtime's MatMulNBits",
    ("nf4", "none"): "TensorRT does not support ONNX Runtime's MatMulBnb4",
    ("mixed", "dynamic"): "TensorRT does not support the operators of mixed schemes",
}
# Operators of these models that onnx-tensorrt supports in the dtypes used (its docs/operators.md, 10.15).
SUPPORTED_OPS = frozenset(
    "Abs Add And Cast Clip Concat Constant ConstantOfShape Conv DequantizeLinear Div Equal Expand Floor Gather"
    " GatherND Gelu Gemm Greater GreaterOrEqual Identity InstanceNormalization LayerNormalization Less LessOrEqual Log"
    " MatMul Max Min Mul Neg Not Or Pad Pow QuantizeLinear Range Reciprocal ReduceMean ReduceSum Relu Reshape Shape"
    " Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where".split()
)


def unsupported_reason(model: CTCModel) -> str:
    """See `Exporter.unsupported_reason`."""
    storage = model.scheme.weights, model.scheme.activations
    if storage in SUPPORTED_SCHEMES:
        return ""
    return f"{UNSUPPORTED_SCHEMES.get(storage, 'TensorRT does not support this scheme')}; use int8-static, or bf16"


def write(model: CTCModel, folder: Path, *, optimization_profile: Profile = DEFAULT_PROFILE) -> ExportResult:
    """See `Exporter.write`. `optimization_profile`: (batch, samples) of the smallest, the usual and the largest input.

    The graph is run in ONNX Runtime with its own dtypes emulated, and the engine if it can be built. In float32,
    log-probabilities may differ from the net's in float64 by 1e-3 nats, or twice as much as the net's own in float32;
    else the top token must be the same in 94 % of frames. An engine may differ from the net by twice as much as the
    graph does.
    """
    net = prepare_for_export(model, dequantize=True)
    _validate_profile(optimization_profile, frame_geometry(net.config).receptive_field)
    takes_mask = _supports_mask(net)
    _trace(model, net, folder, takes_mask)
    files = initializers.rewrite_graphs(folder, [GRAPH_FILE], FLOAT32, graphs.collect_metadata(model, takes_mask))
    exact = model.scheme.weights == "float32"
    cases, float32_error = _reference_cases(model, net, optimization_profile, takes_mask, exact=exact)
    found = compare(*building.valid_rows(_run_graph(folder / GRAPH_FILE, cases), cases))
    if exact:
        tolerances = {"max_abs_diff": max(ENGINE_DRIFT_RATIO * float32_error.max_abs_diff, MAX_ABS_DIFF)}
    else:
        tolerances = {"rms_diff": max(ENGINE_DRIFT_RATIO * found.rms_diff, MAX_ABS_DIFF), "agreement": MIN_AGREEMENT}
    _verify_graph(model, found, tolerances)
    names = ["input_values", *(["attention_mask"] if takes_mask else [])]
    shapes = {name: [list(shape) for shape in optimization_profile] for name in names}
    settings = {"graph": GRAPH_FILE, "engine": ENGINE_FILE, "profile": shapes, "tolerances": tolerances}
    _write_build_files(folder, settings, cases)
    engine, unverified_reason = ENGINE_FILE if _can_build() else None, ""
    if engine is not None:
        found = _build_and_verify(model, folder, tolerances, cases)
        files = (*files, engine)
    else:
        unverified_reason = (
            "TensorRT was not run: model.onnx was compared in ONNX Runtime, with its half precision emulated; build.py"
            " compares the engine when it builds it"
        )
    details = settings | {"engine": engine, "attention_mask": takes_mask, "opset": DEFAULT_OPSET}
    packages = ("onnx", "onnxscript", "onnxruntime", *(["tensorrt"] if engine else []))
    return ExportResult(
        net.config, files, details, found.max_abs_diff, found.agreement, unverified_reason, packages=packages
    )


def _validate_profile(profile: Profile, min_samples: int) -> None:
    try:
        ascending = all(1 <= a <= b <= c for a, b, c in zip(*profile, strict=True))
        fits = len(profile) == 3 and all(len(shape) == 2 for shape in profile) and ascending
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ModelError(
            "the optimization profile must be (batch, samples) of the smallest, the usual and the largest input, such"
            f" as {DEFAULT_PROFILE}; got {profile}"
        )
    if profile[0][1] < min_samples:
        raise ModelError(
            f"the model needs {min_samples} samples for a frame, and the profile begins at {profile[0][1]}"
        )


def _supports_mask(net: Any) -> bool:
    has_adapter = getattr(net.config, "add_adapter", False)
    is_maskable = not anatomy.unsupported_reason(net, "tensorrt_mask") and not has_adapter
    return is_maskable and anatomy.read_anatomy(net).is_padding_exact


class _LogitsNet(nn.Module):
    """A transformers model that returns only its logits.

    With a mask, its modules are called one by one, and frame t of a row is valid if t · hop + receptive_field ≤ n.
    transformers computes the same mask with operators that TensorRT lacks for these dtypes (NonZero, CumSum).
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.geometry = frame_geometry(net.config)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            logits: Tensor = self.net(input_values).logits
            return logits
        parts = anatomy.read_anatomy(self.net)
        states = parts.project(parts.features(input_values))
        ends = self.geometry.num_samples(torch.arange(states.shape[1]) + 1)
        valid = (ends[None] <= attention_mask.sum(-1, keepdim=True)).to(states.dtype)
        return parts.masked_logits(states, valid, MASK_VALUE)


def _trace(model: CTCModel, net: Any, folder: Path, takes_mask: bool) -> None:
    """Write the strongly typed `model.onnx`. Raises ModelError for an operator that ONNX or TensorRT lacks."""
    import onnx

    scheme = model.scheme.weights
    traced = _replace_static_linears(model) if scheme == "int8" else net
    with graphs.translate_export_errors(model.origin.name), TemporaryDirectory(dir=folder.parent) as temporary:
        graphs.export_graph(_LogitsNet(traced), Path(temporary) / GRAPH_FILE, takes_mask, DEFAULT_OPSET)
        graph = onnx.load(f"{temporary}/{GRAPH_FILE}")
    if unsupported := sorted(strong_typing.list_operators(graph.graph) - SUPPORTED_OPS):
        raise ModelError(
            f"TensorRT does not support {', '.join(unsupported)}, which {model.origin.name} needs: use onnx"
        )
    strong_typing.make_symmetric(graph.graph)
    if scheme in HALF_DTYPES:
        strong_typing.cast_to_half(graph.graph, HALF_DTYPES[scheme])
    _save(graph, folder)


def _replace_static_linears(model: CTCModel) -> Any:
    """Return the net with int8 operators for layers with static input ranges, and the others dequantized."""
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


def _reference_cases(
    model: CTCModel, net: Any, profile: Profile, takes_mask: bool, *, exact: bool
) -> tuple[list[building.Arrays], ModelDiff]:
    """Return inputs with the shapes of the profile, the net's logits for them, and the error of float32.

    With `exact` the logits are computed in float64. Rows are speech and noise in turn, and of different lengths if
    there is a mask. All shapes are needed: engines have been wrong in all but the usual one
    (github.com/NVIDIA/TensorRT, issue 4450).
    """
    (min_batch, min_samples), (usual_batch, usual_samples), (max_batch, max_samples) = profile
    speech, rng, geometry = audio.load_audio(SAMPLE_CLIP), np.random.default_rng(1), frame_geometry(net.config)
    limit = max(min_samples, MAX_VERIFY_S * model.preprocessing.rate_hz)
    shapes = [
        (min_batch, min_samples),
        (usual_batch, min(usual_samples, limit)),
        (max_batch, min(max_samples, limit)),
        (min_batch, max_samples),
    ]
    cases, float32_logits, exact_net = [], [], copy.deepcopy(net).double() if exact else net
    for batch, longest in dict.fromkeys(shapes):
        lengths = np.linspace(longest, min_samples, batch).astype(int) if takes_mask else np.full(batch, longest)
        values = np.full((batch, longest), model.preprocessing.padding_value, np.float32)
        for index, length in enumerate(lengths):
            row = rng.standard_normal(length, np.float32) if index % 2 else np.resize(speech, length)
            values[index, :length] = audio.preprocess(row, model.preprocessing)
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        case = {"input_values": values} | ({"attention_mask": mask} if takes_mask else {})
        inputs = {name: torch.from_numpy(value) for name, value in case.items()}
        with torch.inference_mode():
            float32_logits.append(net(**inputs).logits.numpy())
            logits = float32_logits[-1]
            if exact:
                double = inputs | {"input_values": inputs["input_values"].double()}
                logits = exact_net(**double).logits.float().numpy()
        frames = [geometry.num_frames(int(n)) if takes_mask else logits.shape[1] for n in lengths]
        cases.append(case | {"logits": logits, "frames": np.array(frames)})
    return cases, compare(*building.valid_rows(float32_logits, cases))


def _run_graph(graph_file: Path, cases: Sequence[building.Arrays]) -> list[np.ndarray]:
    """Run the graph in ONNX Runtime, with half precision emulated and without optimizations, which skip roundings."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        graph = onnx.load(graph_file)
        strong_typing.emulate_half(graph.graph)
        _save(graph, Path(folder))
        session = onnxruntime.InferenceSession(f"{folder}/{GRAPH_FILE}", options, providers=["CPUExecutionProvider"])
        return [session.run(["logits"], building.select_inputs(case))[0] for case in cases]


def _verify_graph(model: CTCModel, diff: ModelDiff, tolerances: dict[str, float]) -> None:
    name, scheme = model.origin.name, model.scheme
    if scheme.weights == "float32":
        if reason := building.check_tolerances(diff, tolerances):
            raise ModelError(f"the TensorRT graph of {name} differs from the model: {reason}")
    else:
        alternative = "bf16" if scheme.weights == "float16" else "float32"
        verify.verify_tolerance(model, "TensorRT", diff, alternative=alternative)


def _write_build_files(folder: Path, settings: dict[str, Any], cases: Sequence[building.Arrays]) -> None:
    """Write the files that build and verify the engine on another machine."""
    (folder / "build.json").write_text(json.dumps(settings, indent=1))
    for name, module in (("build.py", building), (building.DIFF_FILE, model_diff)):
        shutil.copyfile(str(module.__file__), folder / name)
    arrays: dict[str, Any] = {f"{index}.{name}": v for index, case in enumerate(cases) for name, v in case.items()}
    np.savez_compressed(folder / "reference.npz", **arrays)
    shapes = []
    for index, prefix in enumerate(("min", "opt", "max")):
        inputs = (f"{name}:{'x'.join(map(str, shape[index]))}" for name, shape in settings["profile"].items())
        shapes.append(f"  --{prefix}Shapes={','.join(inputs)}")
    command = [
        "trtexec",
        f"  --onnx={GRAPH_FILE}",
        "  --saveEngine=unchecked.engine",
        "  --stronglyTyped",
        "  --skipInference",
        "  --noTF32",
        *shapes,
    ]
    script = folder / "build.sh"
    script.write_text(
        "#!/bin/sh\n"
        "# Build the engine with trtexec; build.py saves it as model.engine if it matches the model.\n"
        'set -e\ncd "$(dirname "$0")"\n' + " \\\n".join(command) + "\npython3 build.py unchecked.engine\n"
    )
    script.chmod(0o755)


def _can_build() -> bool:
    """Return whether TensorRT and a GPU are available."""
    try:
        import_module("tensorrt")
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def _build_and_verify(
    model: CTCModel, folder: Path, tolerances: dict[str, float], cases: Sequence[building.Arrays]
) -> ModelDiff:
    try:
        engine = building.build_engine(folder)
        logits = building.run_engine(engine, [building.select_inputs(case) for case in cases])
    except RuntimeError as error:
        raise ModelError(f"{model.origin.name}: {error}") from error
    found = compare(*building.valid_rows(logits, cases))
    if reason := building.check_tolerances(found, tolerances):
        raise ModelError(f"the TensorRT engine of {model.origin.name} differs from the model: {reason}")
    (folder / ENGINE_FILE).write_bytes(engine)
    return found
