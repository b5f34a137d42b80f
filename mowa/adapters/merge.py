"""An adapter made one with its base: a plain checkpoint, and a measure of whether it says what the two said.

LoRA becomes part of the weights, W + alpha / rank · B A. Bottlenecks have a nonlinearity between their matrices and can
be part of no linear: they stay where transformers has its own place for them, `adapter_layer`, so the checkpoint is as
plain as the other and loads the same. Which recordings are compared is not decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mowa.adapters import checkpoint, lora
from mowa.data import audio
from mowa.errors import ModelError
from mowa.io import processor
from mowa.io.atomic import atomic_folder
from mowa.io.hub import silence_transformers
from mowa.io.weights import fix_weight_permissions
from mowa.types import Model


@dataclass(frozen=True, slots=True)
class EmissionDiff:
    """How far the emissions of two models are apart: the largest difference of a log-probability (nats), the share of
    frames in which both find the same output likeliest, and how many frames were compared."""

    max_abs_diff: float
    agreement: float
    frames: int


def merge_adapter(model: Model) -> Model:
    """The net of `model` without PEFT: every linear with low-rank updates has them in its weights. `model` stays.

    Linears without updates share their weights with `model`. A net without LoRA comes back as it is, in modules of its
    own. Sums are made in float64 and rounded once, to the weights' dtype.
    """
    net = checkpoint.copy_sharing_weights(model.net)
    if lora.has(net):
        lora.merge_and_unload(net)
        del net.peft_config
    net.mowa_adapter = f"{getattr(net, 'mowa_adapter', 'that it had')} (merged)"  # no other may stand on it
    return replace(model, net=net)


@torch.inference_mode()
def compare_emissions(reference: Model, candidate: Model, clips: Sequence[np.ndarray]) -> EmissionDiff:
    """Emissions of both over `sounds` (float32 [n] each, at the models' rate, not yet normalised), one at a time.

    In float64: what is seen is what their weights differ in, not how the sums of float32 happened to be rounded.

    Raises ModelError where they do not mean the same by their outputs, or no sound is long enough for a frame.
    """
    if reference.vocabulary != candidate.vocabulary or reference.preprocessing != candidate.preprocessing:
        raise ModelError(
            f"{reference.origin.name} and {candidate.origin.name} have other letters or other audio settings: nothing compares"
        )
    largest, agreeing, frames = 0.0, 0, 0
    for ours, theirs in zip(_emissions(reference, clips), _emissions(candidate, clips), strict=True):
        largest = max(largest, float((ours - theirs).abs().max()))
        agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        frames += len(ours)
    if not frames:
        raise ModelError("there is no sound to compare emissions over")
    return EmissionDiff(largest, agreeing / frames, frames)


def _emissions(model: Model, sounds: Sequence[np.ndarray]) -> list[Tensor]:
    """Log-probabilities float64 [T, V] of each sound, on the CPU."""
    net = copy.deepcopy(model.net).double().eval()
    device = next(net.parameters()).device
    emissions = []
    for sound in sounds:
        samples = audio.normalize(sound) if model.preprocessing.normalize else sound
        values = torch.from_numpy(np.ascontiguousarray(samples))[None].to(device, torch.float64)
        emissions.append(net(values).logits[0].log_softmax(-1).cpu())
    return emissions


@contextmanager
def atomic_checkpoint(model: Model, out: Path) -> Iterator[Path]:
    """A folder with the whole checkpoint of `model`, to be examined; it becomes `out` as `files.becoming` says."""
    with atomic_folder(out) as folder:
        with silence_transformers():
            model.net.save_pretrained(folder)
        processor.write_processor(model.vocabulary, model.preprocessing, folder)
        fix_weight_permissions(folder)
        yield folder
