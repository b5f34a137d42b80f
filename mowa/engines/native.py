"""A CTC net in PyTorch, fed so that what it says of one recording never depends on what shares the batch.

It knows tensors, lengths and precision; it refuses to know files, windows and words.

How recordings may share a batch (`Sharing`):
- PADDED: layer-norm front-ends in float32. The attention mask keeps padding out of every sum, so a padded batch gives
  what each recording gives alone, to 1e-5.
- EQUAL: group-norm front-ends normalise over time, padding included, and no mask can help; only recordings of the very
  same length share a batch.
- ALONE: half precision on a CPU. Matrix products of another shape round elsewhere, and a rounding may tip a letter;
  a CPU gains little from batches anyway.

Adapters are engines of their own over the base's weights, which are in memory once: `choose` one for each request.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mowa import machine
from mowa.adapt import store
from mowa.errors import ModelError
from mowa.families.patch import positions_by_table
from mowa.nouns import Model

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Sharing(Enum):
    PADDED = "padded"
    EQUAL = "equal"
    ALONE = "alone"


@dataclass(frozen=True, slots=True)
class Native:
    """A loaded model with the device and precision it runs in. Make one with `engine`."""

    model: Model
    device: str
    precision: machine.Precision
    sharing: Sharing
    adapters: Mapping[str, Native] = field(default_factory=dict)

    def choose(self, adapter: str | Path | None) -> Native:
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
        return replace(self, model=store.load(self.model, adapter), adapters={})

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of one batch: clips float32 [n_i], already normalised → float32 [T_i, V] each.

        T_i counts the frames of clip i alone: nothing of the padding is returned.
        """
        lengths = [len(clip) for clip in clips]
        values = torch.full((len(clips), max(lengths)), self.model.preprocessing.padding_value)
        for row, clip in enumerate(clips):
            values[row, : len(clip)] = torch.from_numpy(clip)
        mask = None
        if min(lengths) != max(lengths):
            if self.sharing is not Sharing.PADDED:
                raise ValueError(f"clips of different lengths {lengths} may not share a batch of this net")
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(self.device)
        dtype = next(self.model.net.parameters()).dtype
        with torch.inference_mode(), machine.matmul_precision(self.precision.matmul), _arithmetic():
            logits = self.model.net(values.to(self.device, dtype), attention_mask=mask).logits
            scores = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
        return [row[: frames(self.model.net.config, n)] for row, n in zip(scores, lengths, strict=True)]


def engine(
    model: Model,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> Native:
    """Put the model on its device in its precision. "auto": a GPU if there is one; the dtype `machine` measured.

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
        torch.set_num_threads(threads or machine.cores())
    precision = _precision(model, device, dtype)
    try:
        positions_by_table(model.net)
        model.net.to(device, getattr(torch, precision.dtype))
    except (RuntimeError, AssertionError) as wrong:
        raise ModelError(f"device {device!r} cannot be used ({str(wrong).splitlines()[0]})") from None
    base = Native(model, device, precision, _sharing(model.net.config, device, precision))
    return replace(base, adapters={name: base.choose(Path(folder)) for name, folder in (adapters or {}).items()})


def _precision(model: Model, device: str, dtype: str) -> machine.Precision:
    config = model.net.config
    if device != "cpu":
        return machine.Precision("float32" if dtype == "auto" else dtype)
    if dtype == "auto":
        return machine.precision(config.hidden_size, config.intermediate_size)
    if dtype == "float32":
        return machine.exact_precision(config.hidden_size, config.intermediate_size)
    return machine.Precision(dtype)


def _sharing(config: Any, device: str, precision: machine.Precision) -> Sharing:
    if device == "cpu" and precision.dtype != "float32":
        return Sharing.ALONE
    return Sharing.EQUAL if config.feat_extract_norm == "group" else Sharing.PADDED


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


def batches(lengths: Sequence[int], budget: int, sharing: Sharing) -> list[list[int]]:
    """Indices of clips that run together, shortest first; count × longest stays within `budget` samples.

    A clip longer than the budget runs alone.
    """
    grouped: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        last = grouped[-1] if grouped else []
        fits = bool(last) and lengths[index] * (len(last) + 1) <= budget
        alike = bool(last) and lengths[index] == lengths[last[0]]
        if fits and (sharing is Sharing.PADDED or (sharing is Sharing.EQUAL and alike)):
            last.append(index)
        else:
            grouped.append([index])
    return grouped


def hop(config: Any) -> int:
    """Samples from one frame to the next: 320 for every stock front-end."""
    step = int(np.prod(config.conv_stride))
    return (
        step * int(config.adapter_stride) ** int(config.num_adapter_layers)
        if getattr(config, "add_adapter", False)
        else step
    )


def frames(config: Any, samples: int) -> int:
    """How many frames the net gives for so many samples (0 for fewer than its receptive field)."""
    n = samples
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        n = (n - kernel) // stride + 1 if n >= kernel else 0
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            n = (n - 1) // config.adapter_stride + 1 if n else 0
    return n
