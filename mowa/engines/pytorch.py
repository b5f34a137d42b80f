"""Run a CTC net in PyTorch such that the output for a clip does not depend on the other clips of its batch.

Adapters are separate engines that share the base model's weights; `PyTorchEngine.with_adapter` selects one per request.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mowa import hardware
from mowa.adapters.checkpoint import copy_sharing_weights
from mowa.adapters.loading import load_adapter
from mowa.decode.stream import LogProbs
from mowa.decode.stream_state import Samples
from mowa.engines.protocol import BatchPolicy, ChunkStep, FloatArray
from mowa.engines.registry import ENGINES
from mowa.errors import ModelError
from mowa.loading.ctc import load
from mowa.models.ctc_encoder import chunk_mask, cpu_plan
from mowa.models.ctc_encoder import streaming as encoder_streaming
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.models.ctc_encoder.streaming import EagerPlan
from mowa.types import CTCModel, Origin, Preprocessing, Vocabulary


@dataclass(frozen=True, slots=True)
class PyTorchEngine:
    """A loaded model with its device and precision. Create it with `open_engine`.

    `plan` is the CPU implementation of the net; without one the net itself is called.
    """

    model: CTCModel
    device: str
    precision: hardware.Precision
    batch_policy: BatchPolicy
    plan: cpu_plan.CpuPlan | None = None
    adapters: Mapping[str, PyTorchEngine] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "pytorch"

    @property
    def origin(self) -> Origin:
        return self.model.origin

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @property
    def preprocessing(self) -> Preprocessing:
        return self.model.preprocessing

    @property
    def config(self) -> Any:
        return self.model.net.config

    @property
    def dtype(self) -> str:
        return self.precision.dtype

    @property
    def scheme(self) -> str:
        """Name of the weight storage scheme, e.g. float32 or int8-dynamic."""
        return self.model.scheme.name

    def with_adapter(self, adapter: str | Path | None) -> PyTorchEngine:
        """Return the engine with an adapter: the name of a loaded one, or a folder; self for None.

        A name is a dictionary look-up and thread-safe; a folder is loaded on every call. Raises ModelError for an
        unknown name and for an adapter of another base model.
        """
        if adapter is None:
            return self
        if isinstance(adapter, str) and adapter in self.adapters:
            return self.adapters[adapter]
        if isinstance(adapter, str) and not Path(adapter).is_dir():
            raise ModelError(
                f"unknown adapter {adapter!r}: neither a folder nor one of the loaded adapters"
                f" ({', '.join(self.adapters) or 'none'})"
            )
        model = load_adapter(self.model, adapter)
        plan = _plan(model, self.device, self.precision, like=self.plan)
        return replace(
            self,
            model=model,
            plan=plan,
            batch_policy=_batch_policy(model, self.device, self.precision, plan),
            adapters={},
        )

    def chunk_step(self) -> ChunkStep | None:
        """As `SteppingEngine.chunk_step`."""
        return None if chunk_mask.unsupported_reason(self.model.net) else _PyTorchStep(self)

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Engine.emissions`. Raises ValueError for clips that cannot share a batch."""
        lengths = [len(clip) for clip in clips]
        if min(lengths) != max(lengths) and self.batch_policy is not BatchPolicy.PADDED:
            raise ValueError(f"clips of different lengths {lengths} cannot share a batch of this net")
        if self.plan is not None:
            with torch.inference_mode(), hardware.matmul_precision(self.precision.matmul):
                planned = self.plan([torch.from_numpy(clip) for clip in clips])
                return [torch.log_softmax(logits, dim=-1).numpy() for logits in planned]
        values = torch.full((len(clips), max(lengths)), self.model.preprocessing.padding_value)
        for row, clip in enumerate(clips):
            values[row, : len(clip)] = torch.from_numpy(clip)
        mask = None
        if min(lengths) != max(lengths):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(self.device)
        dtype = next(self.model.net.parameters()).dtype
        with torch.inference_mode(), hardware.matmul_precision(self.precision.matmul), _exact_convolutions():
            logits = self.model.net(values.to(self.device, dtype), attention_mask=mask).logits
            scores = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
        geometry = frame_geometry(self.model.net.config)
        return [row[: geometry.num_frames(n)] for row, n in zip(scores, lengths, strict=True)]


class _PyTorchStep:
    def __init__(self, engine: PyTorchEngine) -> None:
        self._engine, self._plan = engine, engine.plan or EagerPlan(engine.model.net)
        self.cache_shape = encoder_streaming.cache_shape(engine.model.net)

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]:
        device = self._engine.device
        with torch.inference_mode(), hardware.matmul_precision(self._engine.precision.matmul):
            sound, kv, conv = (torch.from_numpy(one).to(device) for one in (samples, kv_cache, conv_cache))
            logits, new_kv, new_conv = encoder_streaming.encode_chunk(self._plan, sound, position, kv, conv)
            scores = torch.log_softmax(logits, -1)
            return scores.cpu().numpy(), new_kv.float().cpu().numpy(), new_conv.float().cpu().numpy()


def open_engine(
    model: CTCModel | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    from_disk: bool = False,
) -> PyTorchEngine:
    """Return the engine of a model, or of the one in a folder, on a device and in a dtype. The model does not change.

    Weights that need another device or dtype are copied; with `from_disk`, they are converted in place.

    device: "auto" is a GPU if there is one. dtype: "auto" is the dtype that `hardware` measured to be fastest; for a
    model whose scheme quantizes activations it is int8 where the CPU supports it. Another dtype computes with the
    quantized weights and unquantized activations; where there is no plan, activations are quantized as the scheme says
    in any dtype. adapters: name → folder, loaded once, for `PyTorchEngine.with_adapter`.

    Raises ModelError for an unavailable device, an unsupported dtype and an adapter of another base model.
    """
    if dtype not in (dtypes := ENGINES.get("pytorch").dtypes):
        raise ModelError(f"unknown dtype {dtype!r}: use {', '.join(dtypes)}")
    if isinstance(model, Path):
        model, from_disk = load(str(model)), True
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device}: torch finds no CUDA device; use --device cpu")
    if device == "cpu":
        torch.set_num_threads(threads or hardware.cpu_count())
    precision = _precision(model, device, dtype)
    torch_dtype = torch.float32 if precision.dtype == "int8" else getattr(torch, precision.dtype)
    try:
        if not from_disk:
            model = replace(model, net=_copy(model.net, torch.device(device), torch_dtype))
        precompute_absolute_positions(model.net)
        model.net.to(device, torch_dtype)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used ({str(error).splitlines()[0]})") from None
    plan = _plan(model, device, precision)
    base = PyTorchEngine(model, device, precision, _batch_policy(model, device, precision, plan), plan)
    return replace(base, adapters={name: base.with_adapter(Path(folder)) for name, folder in (adapters or {}).items()})


def _copy(net: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a copy of `net` whose conversion leaves `net` as it is; weights are shared if none is converted."""
    floating = [value for value in chain(net.parameters(), net.buffers()) if value.is_floating_point()]
    same = all(value.dtype == dtype and value.device.type == device.type for value in floating)
    return copy_sharing_weights(net) if same else copy.deepcopy(net)


def _precision(model: CTCModel, device: str, dtype: str) -> hardware.Precision:
    config = model.net.config
    if device != "cpu":
        if dtype == "int8":
            raise ModelError(f"int8 runs on the CPU only: omit --dtype on {device}, or use --device cpu")
        return hardware.Precision("float32" if dtype == "auto" else dtype)
    if dtype == "auto":
        if model.scheme.activations == "none" or cpu_plan.unsupported_reason(model.net, "int8"):
            return hardware.select_precision(config.hidden_size, config.intermediate_size)
        dtype = "int8"
    if dtype == "int8" and model.scheme.weights in ("int4", "nf4"):
        raise ModelError(
            f"{model.origin.name} is quantized with scheme {model.scheme.name}, which does not compute in int8: omit"
            " --dtype, or quantize the original model with int8-dynamic"
        )
    if dtype in ("float32", "int8"):
        return replace(hardware.select_float32_precision(config.hidden_size, config.intermediate_size), dtype=dtype)
    return hardware.Precision(dtype)


def _plan(
    model: CTCModel, device: str, precision: hardware.Precision, like: cpu_plan.CpuPlan | None = None
) -> cpu_plan.CpuPlan | None:
    """Return the CPU plan, or None where the net is called as it is. Raises ModelError for int8 without a plan."""
    dtype: cpu_plan.ComputeDtype
    if device != "cpu" or (dtype := precision.dtype) not in ("float32", "bfloat16", "int8"):  # type: ignore[assignment]
        return None
    if not (reason := cpu_plan.unsupported_reason(model.net, dtype)):
        with torch.inference_mode():
            return cpu_plan.CpuPlan(model.net, dtype, like)
    if dtype == "int8":
        raise ModelError(f"{model.origin.name} cannot run in int8: {reason}; use --dtype auto")
    return None


def _batch_policy(
    model: CTCModel, device: str, precision: hardware.Precision, plan: cpu_plan.CpuPlan | None
) -> BatchPolicy:
    if device == "cpu" and precision.dtype != "float32":
        return BatchPolicy.SINGLE
    if plan is None and model.scheme.activations != "none":  # activations are quantized by the range of the whole batch
        return BatchPolicy.SINGLE
    padded = plan is not None or read_anatomy(model.net).is_padding_exact  # a plan does not pad
    return BatchPolicy.PADDED if padded else BatchPolicy.EQUAL_LENGTH


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Disable TF32 in cuDNN, whose error of 1e-3 is far above the tolerance between batches.

    Also ignore torch's warning that WavLM's padding mask and position bias have different dtypes.
    """
    with warnings.catch_warnings(), ExitStack() as exact:
        warnings.filterwarnings("ignore", "Support for mismatched", UserWarning)
        if torch.cuda.is_available():
            exact.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        yield
