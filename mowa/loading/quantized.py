"""A checkpoint whose linears are in few bits → the net with `NarrowLinear`s in place, by none of the packages for it.

What `mowa export --to safetensors` wrote comes back as it was shrunk; of what others wrote, that which
`adapt.quantized` can read. How a net is fed or computed is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mowa.adapters import checkpoint as store
from mowa.errors import ModelError
from mowa.io.atomic import read_json
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.loading import checkpoint
from mowa.quantization import formats
from mowa.types import FLOAT32, Family, Scheme

FORMAT = "safetensors"  # what mowa.json calls exports of this format
WEIGHTS_FILE = "model.safetensors"


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """What mowa.json in `folder` says, where it is an export of this format; else nothing.

    ModelError where it is, and a file is missing or another; and for exports of other formats, which hold no net.
    """
    file = folder / store.MANIFEST
    said = read_json(file) if file.is_file() else {}
    if said.get("kind") != FORMAT:
        if "files" in said:
            kind = said["kind"]
            raise ModelError(f"{folder} was exported as {kind}, to be run as it is: name the model it was made of")
        return {}
    for name, known in said.get("files", {}).items():
        if not (folder / name).is_file() or store.sha256_file(folder / name) != known:
            raise ModelError(f"{folder / name} is missing or damaged: export the model again")
    return said


def read_quantization_config(folder: Path) -> Mapping[str, Any]:
    """How the narrow weights in `folder` are kept, as its config.json has it; empty where they are all wide.

    ModelError where they are kept in a way that cannot be read here.
    """
    how: Mapping[str, Any] = read_json(folder / "config.json").get("quantization_config") or {}
    if how and (why := formats.unsupported_reason(how)):
        raise ModelError(f"the weights of {folder} are kept by {why}: name the checkpoint that they were made of")
    return how


def load_quantized_net(
    auto_class: Any, folder: Path, family: Family, dtype: str, quantization_config: Mapping[str, Any]
) -> Any:
    """The net in `folder` as `auto`, an AutoModel class, makes it, in eval mode, with narrow linears as `how` says.

    ModelError where weights are missing or damaged, or do not fit the config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}, where narrow weights are looked for")
    try:
        linears, rest = formats.unpack_linears(quantization_config, load_file(file))
    except SafetensorError as error:
        raise ModelError(f"the weights of {folder} are damaged: {error}") from error
    config = checkpoint.load_config(folder, family)
    vars(config).pop("quantization_config", None)
    config.dtype = torch.float32
    with torch.device("meta"):
        net = auto_class.from_config(config)
    try:
        net = formats.assign_weights(net, linears, rest)
    except ModelError as error:
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    return net.to(getattr(torch, dtype))


def infer_scheme(manifest: Mapping[str, Any], net: Any, family: Family) -> Scheme:
    """In what the net is: as `note` said, or as its blocks' narrow linears look."""
    if manifest:
        try:
            return Scheme(**manifest["scheme"])
        except (KeyError, TypeError) as missing:
            raise ModelError(
                f"{store.MANIFEST} is damaged: it does not say {missing}; export the model again"
            ) from None
    names = [name for group in family.linears.values() for name in group]
    found = {
        _scheme(module)
        for name, module in net.named_modules()
        if isinstance(module, QuantizedLinear) and name.rpartition(".")[2] in names
    }
    if len(found) < 2:
        return found.pop() if found else FLOAT32
    group = max(scheme.group_size for scheme in found)
    inputs = "dynamic" if any(scheme.activations != "none" for scheme in found) else "none"
    return Scheme("mixed", "mixed", inputs, group, all(scheme.symmetric for scheme in found))


def _scheme(linear: QuantizedLinear) -> Scheme:
    weights = "nf4" if linear.quant_type == "nf4" else f"int{linear.bits}"
    name = "nf4" if weights == "nf4" else f"{weights}-{linear.activations.replace('none', 'weight')}"
    group = linear.group_size if linear.group_size < linear.in_features or linear.bits == 4 else 0
    return Scheme(name, weights, linear.activations, group, linear.zero_point is None)
