"""Build `model.engine` from `model.onnx` with TensorRT, and save it only if its outputs match the model's.

    python build.py                     build, compare and save
    python build.py unchecked.engine    compare and save an engine that trtexec built (see build.sh)

The graph is strongly typed, so TensorRT chooses no precision. An engine works only on the GPU model and TensorRT
version that it was built with. `build.json` holds the input shapes and tolerances, `reference.npz` inputs and the
model's logits, and `diff.py` compares. Needs TensorRT 10 or 11, torch with CUDA, and numpy.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
DIFF_FILE = "diff.py"  # mowa/models/diff.py, which measures the difference between two models' outputs


def build_engine(folder: Path) -> bytes:
    """Build and serialize the engine of the graph in `folder`. Raises RuntimeError with TensorRT's message."""
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]

    settings = json.loads((folder / "build.json").read_text())
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / settings["graph"])):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT {trt.__version__} cannot read {settings['graph']}: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in settings["profile"].items():
        profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"TensorRT {trt.__version__} cannot build {settings['graph']}: see its log above")
    return bytes(engine)


def run_engine(engine: bytes, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """Run an engine on inputs by name. Returns logits, float32 [B, T, V], for each."""
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]
    import torch

    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise RuntimeError("the engine cannot be loaded: it was built for another GPU or version of TensorRT")
    context, stream = loaded.create_execution_context(), torch.cuda.Stream()
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    outputs = []
    for feed in feeds:
        inputs = {name: torch.from_numpy(np.ascontiguousarray(value)).cuda() for name, value in feed.items()}
        for name in names & set(inputs):
            context.set_input_shape(name, tuple(inputs[name].shape))
            context.set_tensor_address(name, inputs[name].data_ptr())
        logits = torch.empty(tuple(context.get_tensor_shape("logits")), dtype=torch.float32, device="cuda")
        context.set_tensor_address("logits", logits.data_ptr())
        torch.cuda.synchronize()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"the engine failed on an input of shape {feed['input_values'].shape}")
        stream.synchronize()
        outputs.append(logits.cpu().numpy())
    return outputs


def read_references(folder: Path) -> list[Arrays]:
    """Read the reference cases: inputs by name, the model's `logits`, and `frames`, the valid frames of each row."""
    cases: dict[str, Arrays] = {}
    with np.load(folder / "reference.npz") as arrays:
        for key in arrays.files:
            number, _, name = key.partition(".")
            cases.setdefault(number, {})[name] = arrays[key]
    return [cases[number] for number in sorted(cases)]


def select_inputs(case: Mapping[str, np.ndarray]) -> Arrays:
    """Return the inputs of a case."""
    return {name: value for name, value in case.items() if name not in ("logits", "frames")}


def valid_rows(
    logits: Sequence[np.ndarray], cases: Sequence[Mapping[str, np.ndarray]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the model's logits and `logits`, float32 [T, V] for each row of the cases, without frames of padding."""
    reference, found = [], []
    for ours, case in zip(logits, cases, strict=True):
        for row, theirs, frames in zip(ours, case["logits"], case["frames"], strict=True):
            reference.append(theirs[:frames])
            found.append(row[:frames])
    return reference, found


def check_tolerances(diff: Any, tolerances: Mapping[str, float]) -> str:
    """Return which tolerance is violated; empty if none is. `agreement` has a lower limit, the others upper ones."""
    for name, limit in tolerances.items():
        value = getattr(diff, name)
        if not (value >= limit if name == "agreement" else value <= limit):
            return f"{name} is {value:.3g} (limit {limit:.3g})"
    return ""


def main(folder: Path, engine_file: str = "") -> int:
    """Build an engine, or read `engine_file`, and save it if it is within the tolerances. Returns the exit status."""
    settings = json.loads((folder / "build.json").read_text())
    cases = read_references(folder)
    try:
        engine = (folder / engine_file).read_bytes() if engine_file else build_engine(folder)
        logits = run_engine(engine, [select_inputs(case) for case in cases])
        diff = runpy.run_path(str(folder / DIFF_FILE))["compare"](*valid_rows(logits, cases))
    except (ImportError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if engine_file:
            (folder / engine_file).unlink(missing_ok=True)
    print(diff)
    if reason := check_tolerances(diff, settings["tolerances"]):
        print(f"the engine differs from the model: {reason}; it was not saved", file=sys.stderr)
        return 1
    out = folder / settings["engine"]
    unfinished = folder / f".{out.name}.{os.getpid()}"  # this script runs where mowa is not installed
    unfinished.write_bytes(engine)
    os.replace(unfinished, out)
    print(f"{out}: {len(engine) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent, *sys.argv[1:2]))
