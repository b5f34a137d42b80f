"""Merge an adapter into its CTC base model, and compare the merged model with the unmerged one.

LoRA is added to the weights, W + alpha / rank · B A. Bottleneck adapters are nonlinear and cannot be merged into a
linear layer: they stay in transformers' `adapter_layer`, and the checkpoint loads in transformers all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mowa.adapters import checkpoint, lora
from mowa.data import audio
from mowa.errors import ModelError
from mowa.io import processor
from mowa.io.hub import silence_transformers
from mowa.io.weights import fix_weight_permissions
from mowa.models.diff import ModelDiff, compare
from mowa.types import CTCModel


def merge_adapter(model: CTCModel) -> CTCModel:
    """Return a copy of `model` whose LoRA is merged into the weights and that needs no PEFT.

    Layers without LoRA share their weights with `model`. Sums are computed in float64 and rounded once, to the weights'
    dtype.
    """
    net = checkpoint.copy_sharing_weights(model.net)
    if lora.has(net):
        lora.merge_and_unload(net)
        del net.peft_config
        adapter = getattr(net, "mowa_adapter", "of this model")
        net.mowa_adapter = adapter + checkpoint.MERGED_SUFFIX  # so that no other is loaded over it
    return replace(model, net=net)


@torch.inference_mode()
def compare_emissions(reference: CTCModel, candidate: CTCModel, clips: Sequence[np.ndarray]) -> ModelDiff:
    """Compare the emissions of two models over `clips` (float32 [n] each, at the models' rate, not normalized).

    Computed in float64 and one clip at a time, so that only differences of the weights are measured.

    Raises ModelError if vocabulary or audio settings differ, or if no clip is long enough for a frame.
    """
    if reference.vocabulary != candidate.vocabulary or reference.preprocessing != candidate.preprocessing:
        raise ModelError(
            f"{reference.origin.name} and {candidate.origin.name} cannot be compared: their vocabularies or audio"
            " settings differ"
        )
    found = compare(_logits(reference, clips), _logits(candidate, clips))
    if not found.num_frames:
        raise ModelError("no clip is long enough for a frame: nothing was compared")
    return found


def _logits(model: CTCModel, clips: Sequence[np.ndarray]) -> list[Tensor]:
    """Return the logits of each clip, float64 [T, V] on the CPU."""
    net = copy.deepcopy(model.net).double().eval()
    device = next(net.parameters()).device
    logits = []
    for clip in clips:
        samples = audio.preprocess(clip, model.preprocessing)
        values = torch.from_numpy(np.ascontiguousarray(samples))[None].to(device, torch.float64)
        logits.append(net(values).logits[0].cpu())
    return logits


def write_checkpoint(model: CTCModel, folder: Path) -> None:
    """Write weights, config, vocabulary and audio settings into `folder`."""
    with silence_transformers():
        model.net.save_pretrained(folder)
    processor.write_processor(model.vocabulary, model.preprocessing, folder)
    fix_weight_permissions(folder)
