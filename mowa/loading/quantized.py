"""Load a checkpoint with quantized weights into `QuantizedLinear` modules, without the packages that wrote it.

Reads what `mowa export --to safetensors` writes, and those checkpoints of others that `quantization.formats` supports.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mowa.errors import ModelError
from mowa.io.atomic import read_json
from mowa.io.manifest import MANIFEST_FILE, Manifest, damaged, find_manifest
from mowa.io.weights import weight_files
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.loading import checkpoint
from mowa.quantization import formats
from mowa.types import FLOAT32, Family, Scheme

WEIGHTS_FILE = "model.safetensors"


def read_checkpoint_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint that `mowa export` wrote, and check its files; None for other folders.

    Raises ModelError if files are missing or changed, and for exports to other formats, which cannot be loaded.
    """
    manifest = find_manifest(folder)
    if manifest is None or "format" not in manifest.sections:
        return None
    if manifest.artifact == "export":
        raise ModelError(
            f"{folder} is an export ({manifest.sections['format']}) and can only be run; use the original model,"
            f" {manifest.origin['name']}"
        )
    manifest.verify_files()
    return manifest


def read_quantization_config(folder: Path) -> Mapping[str, Any]:
    """Return `quantization_config` of config.json, empty if there is none. Raises ModelError if it is unsupported."""
    config: Mapping[str, Any] = read_json(folder / "config.json").get("quantization_config") or {}
    if config and (reason := formats.unsupported_reason(config)):
        raise ModelError(f"{folder} cannot be loaded: {reason}; use the full-precision checkpoint")
    return config


def load_quantized_net(
    auto_class: Any, folder: Path, family: Family, dtype: str, quantization_config: Mapping[str, Any]
) -> Any:
    """Load the net in `folder` with `auto_class`, with `QuantizedLinear` modules, in eval mode.

    Scales and buffers stay in float32; other weights are in `dtype`. Raises ModelError if weights are missing, damaged
    or do not match the config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    if not files:
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}, which a quantized checkpoint needs")
    try:
        tensors = {name: value for file in files for name, value in load_file(file).items()}
        linears, others = formats.unpack_linears(quantization_config, tensors)
    except SafetensorError as error:
        raise ModelError(f"the weights of {folder} are damaged: {error}") from error
    config = checkpoint.load_config(folder, family)
    vars(config).pop("quantization_config", None)
    config.dtype = torch.float32
    with torch.device("meta"):
        net = auto_class.from_config(config)
    try:
        net = formats.assign_weights(net, linears, others)
    except ModelError as error:
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    for parameter in net.parameters():  # not buffers: transformers computes rotary frequencies in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return net


def infer_scheme(manifest: Manifest | None, net: Any, family: Family) -> Scheme:
    """Return the scheme of a net, from its manifest, or else from the quantized linear layers of its blocks."""
    if manifest is not None:
        try:
            return Scheme(**manifest.sections["scheme"])
        except (KeyError, TypeError) as error:
            raise damaged(manifest.folder / MANIFEST_FILE, error) from None
    schemes = {
        _infer_linear_scheme(module)
        for name, module in net.named_modules()
        if isinstance(module, QuantizedLinear) and family.find_linear(name)
    }
    if len(schemes) < 2:
        return schemes.pop() if schemes else FLOAT32
    group_size = max(scheme.group_size for scheme in schemes)
    activations = "dynamic" if any(scheme.activations != "none" for scheme in schemes) else "none"
    return Scheme("mixed", "mixed", activations, group_size, all(scheme.symmetric for scheme in schemes))


def _infer_linear_scheme(linear: QuantizedLinear) -> Scheme:
    weights = "nf4" if linear.quant_type == "nf4" else f"int{linear.bits}"
    name = "nf4" if weights == "nf4" else f"{weights}-{linear.activations.replace('none', 'weight')}"
    group_size = linear.group_size if linear.group_size < linear.in_features or linear.bits == 4 else 0
    return Scheme(name, weights, linear.activations, group_size, linear.zero_point is None)
