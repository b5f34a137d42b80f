"""A CTC net in PyTorch, fed so that what it says of one recording never depends on what shares the batch.

It knows tensors, lengths and precision; it refuses to know files, windows and words.

Adapters are engines of their own over the base's weights, which are in memory once: `choose` one for each request.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mowa import hardware
from mowa.adapters import checkpoint
from mowa.engines.protocol import BatchPolicy, num_frames
from mowa.errors import ModelError
from mowa.models.ctc_encoder import cpu_plan
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.types import Model, Origin, Preprocessing, Vocabulary

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class PyTorchEngine:
    """A loaded model with the device and precision it runs in. Make one with `engine`.

    `plan` is how a processor computes the net; without one the net itself is called.
    """

    model: Model
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
        """In what the weights are: float32, or what the model was shrunk to."""
        return self.model.scheme.name

    def with_adapter(self, adapter: str | Path | None) -> PyTorchEngine:
        """The engine that one of `adapters` is, by its name, or that an adapter's folder makes; itself for None.

        A name costs a look-up and may be asked from any thread; a folder is read anew each time. ModelError where it is
        neither, or the adapter is another base's.
        """
        if adapter is None:
            return self
        if isinstance(adapter, str) and adapter in self.adapters:
            return self.adapters[adapter]
        if isinstance(adapter, str) and not Path(adapter).is_dir():
            loaded = f"loaded are {', '.join(self.adapters)}" if self.adapters else "none were loaded"
            raise ModelError(f"no adapter is called {adapter!r}: {loaded}; name one of them, or an adapter's folder")
        model = checkpoint.load_adapter(self.model, adapter)
        plan = _plan(model, self.device, self.precision, like=self.plan)
        return replace(
            self, model=model, plan=plan, batch_policy=_sharing(model, self.device, self.precision, plan), adapters={}
        )

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Engine.emissions`. ValueError for clips that may not share a batch."""
        lengths = [len(clip) for clip in clips]
        if self.plan is not None:
            if min(lengths) != max(lengths) and self.batch_policy is not BatchPolicy.PADDED:
                raise ValueError(f"clips of different lengths {lengths} may not share a batch of this net")
            with torch.inference_mode(), hardware.matmul_precision(self.precision.matmul):
                planned = self.plan([torch.from_numpy(clip) for clip in clips])
                return [torch.log_softmax(logits, dim=-1).numpy() for logits in planned]
        values = torch.full((len(clips), max(lengths)), self.model.preprocessing.padding_value)
        for row, clip in enumerate(clips):
            values[row, : len(clip)] = torch.from_numpy(clip)
        mask = None
        if min(lengths) != max(lengths):
            if self.batch_policy is not BatchPolicy.PADDED:
                raise ValueError(f"clips of different lengths {lengths} may not share a batch of this net")
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(self.device)
        dtype = next(self.model.net.parameters()).dtype
        with torch.inference_mode(), hardware.matmul_precision(self.precision.matmul), _arithmetic():
            logits = self.model.net(values.to(self.device, dtype), attention_mask=mask).logits
            scores = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
        return [row[: num_frames(self.model.net.config, n)] for row, n in zip(scores, lengths, strict=True)]


def open_engine(
    model: Model,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> PyTorchEngine:
    """Put the model on its device in its precision. "auto": a GPU if there is one; the dtype `machine` measured.

    A shrunk model whose scheme rounds inputs is multiplied in int8 by "auto", where a processor can; a dtype that is
    named is computed in, with the weights that it was shrunk to and inputs as they are. Where there is no plan, inputs
    are rounded as the scheme says, in whatever dtype.

    The net is converted in place. `adapters` (name → folder) are loaded over it, once, for `Native.choose`. Raises
    ModelError for a device that is not there, an unknown dtype, or an adapter of another base.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device}: torch sees no CUDA device here; use --device cpu")
    if device == "cpu":
        torch.set_num_threads(threads or hardware.cpu_count())
    precision = _precision(model, device, dtype)
    try:
        precompute_absolute_positions(model.net)
        model.net.to(device, torch.float32 if precision.dtype == "int8" else getattr(torch, precision.dtype))
    except (RuntimeError, AssertionError) as wrong:
        raise ModelError(f"device {device!r} cannot be used ({str(wrong).splitlines()[0]})") from None
    plan = _plan(model, device, precision)
    base = PyTorchEngine(model, device, precision, _sharing(model, device, precision, plan), plan)
    return replace(base, adapters={name: base.with_adapter(Path(folder)) for name, folder in (adapters or {}).items()})


def _precision(model: Model, device: str, dtype: str) -> hardware.Precision:
    config = model.net.config
    if device != "cpu":
        if dtype == "int8":
            raise ModelError(f"int8 is for processors: leave --dtype out on {device}, or use --device cpu")
        return hardware.Precision("float32" if dtype == "auto" else dtype)
    if dtype == "auto":
        if model.scheme.activations == "none" or cpu_plan.unsupported_reason(model.net, "int8"):
            return hardware.select_precision(config.hidden_size, config.intermediate_size)
        dtype = "int8"
    if dtype == "int8" and model.scheme.weights in ("int4", "nf4"):
        raise ModelError(
            f"{model.origin.name} is in {model.scheme.name}, which is not multiplied in int8: leave --dtype out, or"
            " shrink it to int8-dynamic"
        )
    if dtype in ("float32", "int8"):
        return replace(hardware.select_float32_precision(config.hidden_size, config.intermediate_size), dtype=dtype)
    return hardware.Precision(dtype)


def _plan(
    model: Model, device: str, precision: hardware.Precision, like: cpu_plan.CpuPlan | None = None
) -> cpu_plan.CpuPlan | None:
    """How a processor is to compute the net; None where the net is to be called as it is. ModelError: int8 without."""
    kind: cpu_plan.ComputeDtype
    if device != "cpu" or (kind := precision.dtype) not in ("float32", "bfloat16", "int8"):  # type: ignore[assignment]
        return None
    if not (why := cpu_plan.unsupported_reason(model.net, kind)):
        with torch.inference_mode():
            return cpu_plan.CpuPlan(model.net, kind, like)
    if kind == "int8":
        raise ModelError(f"{model.origin.name} cannot run in int8: {why}; use --dtype auto")
    return None


def _sharing(model: Model, device: str, precision: hardware.Precision, plan: cpu_plan.CpuPlan | None) -> BatchPolicy:
    if device == "cpu" and precision.dtype != "float32":
        return BatchPolicy.SINGLE
    if plan is None and model.scheme.activations != "none":  # inputs are rounded by the range of the whole batch
        return BatchPolicy.SINGLE
    padded = plan is not None or model.net.config.feat_extract_norm != "group"  # a plan pads nothing
    return BatchPolicy.PADDED if padded else BatchPolicy.EQUAL_LENGTH


@contextmanager
def _arithmetic() -> Iterator[None]:
    """cuDNN would compute float32 convolutions in TF32, whose error of 1e-3 is far above what batches may differ by.

    WavLM hands torch a padding mask of another dtype than its position bias; both are right, and torch warns of it.
    """
    with warnings.catch_warnings(), ExitStack() as exact:
        warnings.filterwarnings("ignore", "Support for mismatched", UserWarning)
        if torch.cuda.is_available():
            exact.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        yield
