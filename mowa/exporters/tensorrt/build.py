"""Makes `model.engine` of `model.onnx` with TensorRT, and keeps it only if it says what the net says.

    python build.py                     build, compare, keep
    python build.py unchecked.engine    compare what trtexec made (see build.sh), keep

Every tensor of the graph has the type it is to be computed in, so the network is strongly typed and no precision is
chosen here. An engine is for the GPU and the version of TensorRT that it was built with. `build.json` says which shapes
it takes and how far it may be from `reference.npz`, in which inputs and the net's own logits are. Needs TensorRT 10 or
11, torch with CUDA, and numpy.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
MIN_LOG_PROB = -50.0  # nats: what is less likely than this is not compared
MIN_LOG_PROB_RMS = -10.0  # nor by `rms`, where it would drown what is likely


def build_engine(folder: Path) -> bytes:
    """The engine of the graph in `folder`, serialised. RuntimeError, with TensorRT's own words, where there is none."""
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]

    how = json.loads((folder / "build.json").read_text())
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / how["graph"])):
        said = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT {trt.__version__} cannot read {how['graph']}: {said}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float32 is to be float32
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in how["profile"].items():
        profile.set_shape(name, tuple(least), tuple(best), tuple(most))
    config.add_optimization_profile(profile)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RuntimeError(f"TensorRT {trt.__version__} cannot build {how['graph']}: its log above says why")
    return bytes(made)


def run_engine(engine: bytes, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """What an engine says: inputs by name → logits float32 [B, T, V], of each."""
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]
    import torch

    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise RuntimeError("this engine cannot be loaded here: it is of another GPU or version of TensorRT")
    context, stream = loaded.create_execution_context(), torch.cuda.Stream()
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    said = []
    for feed in feeds:
        given = {name: torch.from_numpy(np.ascontiguousarray(value)).cuda() for name, value in feed.items()}
        for name in names & set(given):
            context.set_input_shape(name, tuple(given[name].shape))
            context.set_tensor_address(name, given[name].data_ptr())
        out = torch.empty(tuple(context.get_tensor_shape("logits")), dtype=torch.float32, device="cuda")
        context.set_tensor_address("logits", out.data_ptr())
        torch.cuda.synchronize()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"the engine does not run with inputs of {feed['input_values'].shape}")
        stream.synchronize()
        said.append(out.cpu().numpy())
    return said


def read_references(folder: Path) -> list[Arrays]:
    """What was asked of the net and what it said: inputs by name, `logits` and `frames` (of each row), of each case."""
    cases: dict[str, Arrays] = {}
    with np.load(folder / "reference.npz") as kept:
        for key in kept.files:
            number, _, name = key.partition(".")
            cases.setdefault(number, {})[name] = kept[key]
    return [cases[number] for number in sorted(cases)]


def select_inputs(case: Mapping[str, np.ndarray]) -> Arrays:
    return {name: value for name, value in case.items() if name not in ("logits", "frames")}


def compare_logits(logits: Sequence[np.ndarray], cases: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """How far logits are from the net's, in log-probabilities of frames where there is sound: `farthest` and `rms`
    (nats), and `agreeing`, the share of frames with the same likeliest output. Infinitely far where one is not a
    number."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for ours, case in zip(logits, cases, strict=True):
        for row, theirs, frames in zip(ours, case["logits"], case["frames"], strict=True):
            parts.append((row[:frames], theirs[:frames]))
    found, truth = (_log_probabilities(np.concatenate(side)) for side in zip(*parts, strict=True))
    if not np.isfinite(found).all():
        return {"farthest": np.inf, "rms": np.inf, "agreeing": 0.0}
    likely = np.maximum(found, MIN_LOG_PROB_RMS) - np.maximum(truth, MIN_LOG_PROB_RMS)
    return {
        "farthest": float(np.abs(found - truth).max()),
        "rms": float(np.sqrt(np.square(likely).mean())),
        "agreeing": float((found.argmax(-1) == truth.argmax(-1)).mean()),
    }


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        logits = logits.astype(np.float64)
        logits = logits - logits.max(-1, keepdims=True)
        made: np.ndarray = np.maximum(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), MIN_LOG_PROB)
    return made


def check_tolerances(measured: Mapping[str, float], tolerances: Mapping[str, float]) -> str:
    """Why an engine is not kept; empty where it is."""
    for name, bound in tolerances.items():
        inside = measured[name] >= bound if name == "agreeing" else measured[name] <= bound
        if not inside:
            return f"{name} is {measured[name]:.3g}, and {bound:.3g} is allowed"
    return ""


def main(folder: Path, engine_file: str = "") -> int:
    how = json.loads((folder / "build.json").read_text())
    cases = read_references(folder)
    try:
        engine = (folder / engine_file).read_bytes() if engine_file else build_engine(folder)
        found = compare_logits(run_engine(engine, [select_inputs(case) for case in cases]), cases)
    except (ImportError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if engine_file:
            (folder / engine_file).unlink(missing_ok=True)
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    if why := check_tolerances(found, how["allowed"]):
        print(f"the engine does not say what the net says: {why}; nothing is kept", file=sys.stderr)
        return 1
    unfinished = folder / f".{how['engine']}.{os.getpid()}"
    unfinished.write_bytes(engine)
    os.replace(unfinished, folder / how["engine"])
    print(f"{folder / how['engine']}: {len(engine) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent, *sys.argv[1:2]))
