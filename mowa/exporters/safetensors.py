"""A model as a checkpoint of stock transformers in few bits: `model.safetensors` and a config.json that says how.

`AutoModelForCTC.from_pretrained(folder)` gives the very weights of the shrunk net, with the package that the scheme
needs there; `mowa.load(folder)` gives the shrunk model itself, and needs none.

| scheme              | package            | what is no block's linear                                          |
|---------------------|--------------------|--------------------------------------------------------------------|
| float32, fp16, bf16 | none               | as the rest                                                        |
| int8-…, mixed       | compressed-tensors | the feature projection in int8, other matrices in float16          |
| int4-weight         | compressed-tensors | the same; beside zeros the feature projection is in float16 too    |
| nf4                 | bitsandbytes       | float32: transformers leaves it in what the file has it in         |

transformers holds narrow linears alone, so convolutions that other formats keep in int8 are in float16 here. It rounds
inputs as the scheme says, but multiplies in floating point, with the weights made wide again: files are smaller, nets
are not faster there. How the tensors are called is `adapt.quantized`'s affair, how they are loaded
`loading.narrowed`'s.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mowa.adapters import merge
from mowa.errors import ModelError
from mowa.exporters import verify
from mowa.exporters.manifest import ExportResult
from mowa.io.hub import silence_transformers
from mowa.io.weights import fix_weight_permissions
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder.chunk_mask import receptive_field
from mowa.quantization import formats
from mowa.types import Model

log = logging.getLogger("mowa")

WEIGHTS_FILE = "model.safetensors"
FLOAT_DTYPES = ("float32", "float16", "bfloat16")
REQUIRED_PACKAGES = {
    formats.COMPRESSED_TENSORS: ("compressed-tensors",),
    formats.BITSANDBYTES: ("bitsandbytes", "accelerate"),
}


@dataclass(frozen=True, slots=True)
class ExportedNet:
    """What was written, as far as whoever writes the rest of the folder needs it."""

    config: Any


def unsupported_reason(model: Model) -> str:
    """As `Exporter.can`."""
    kept = _narrow(model.net)
    for name, module in model.net.named_modules():
        if isinstance(module, QuantizedLinear) and module.activations != "none" and name not in kept:
            return (
                f"transformers does not round the inputs of {name} beside zeros of groups, nf4 or groups that do not"
                " fill a row; shrink it symmetric, or use onnx"
            )
    return ""


def require_packages() -> None:
    """As `Exporter.parts`: nothing is needed for writing."""


def write(model: Model, folder: Path, **options: Any) -> tuple[ExportedNet, ExportResult]:
    """As `Exporter.write`; there are no options.

    Every tensor is read again and must be the one that was written. Compared is what the net says of the bundled sample
    and of noise with what the file's net says, and, where the package is installed, stock transformers' one.
    """
    if options:
        raise ModelError(f"safetensors has no option {next(iter(options))!r}")
    net = merge.merge_adapter(model).net
    linears = _narrow(net)
    config, kept = _config(model, net, linears), _tensors(model, net, linears)
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)
    fix_weight_permissions(folder)
    how = getattr(config, "quantization_config", None)
    ours = _read(folder, config, how, linears, kept)
    if {(p.dtype, p.device.type) for p in net.parameters()} != {(torch.float32, "cpu")}:
        net = copy.deepcopy(net).to("cpu", torch.float32)
    clips = verify.load_clips(model)
    again = verify.compute_logits(ours, clips)
    farthest, agreeing = verify.compare_logits(again, verify.compute_logits(net, clips))
    verify.verify_tolerance(
        model, WEIGHTS_FILE, farthest, agreeing, exact=model.scheme.weights in FLOAT_DTYPES, alternative="onnx"
    )
    package = how["quant_method"] if how else ""
    details: dict[str, Any] = {"package": package}
    missing = next(
        (name for name in REQUIRED_PACKAGES.get(package, ()) if find_spec(name.replace("-", "_")) is None), ""
    )
    if missing:
        log.info("%s is not installed: whether transformers says the same was not tried", missing)
        details["transformers"] = f"not tried: {missing} is not installed"
    else:
        apart, alike = verify.compare_logits(verify.compute_logits(_stock(folder), clips), again)
        exact = model.scheme.activations == "none" and package != formats.BITSANDBYTES
        verify.verify_tolerance(model, f"{WEIGHTS_FILE} in transformers", apart, alike, exact=exact, alternative="onnx")
        details["transformers"] = {"farthest": apart, "agreeing": alike}
    made_by = ("safetensors", package) if package else ("safetensors",)
    return ExportedNet(config), ExportResult((WEIGHTS_FILE,), details, farthest, agreeing, packages=made_by)


def _narrow(net: Any) -> dict[str, QuantizedLinear]:
    """The linears that stay narrow in the file. One package reads it, so nothing else is beside nf4, or zeros.

    compressed-tensors reads no row whose last group is shorter; schemes give such to the feature projection alone.
    """
    found = {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
    found = {n: one for n, one in found.items() if one.in_features % min(one.group_size, one.in_features) == 0}
    levels = {name: linear for name, linear in found.items() if linear.quant_type == "nf4"}
    return levels or {name: linear for name, linear in found.items() if linear.zero_point is not None} or found


def _config(model: Model, net: Any, linears: dict[str, QuantizedLinear]) -> Any:
    config = copy.deepcopy(net.config)
    config.architectures = [type(net).__name__]
    config.dtype = getattr(torch, model.scheme.weights if model.scheme.weights in FLOAT_DTYPES else "float32")
    if linears:
        others = [n for n, m in net.named_modules() if isinstance(m, nn.Linear | QuantizedLinear) and n not in linears]
        config.quantization_config = formats.quantization_config(linears, others)
    return config


def _tensors(model: Model, net: Any, linears: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Name → tensor, as it lies in the file."""
    narrow = {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
    wide = {name: value for name, value in net.state_dict().items() if name.rpartition(".")[0] not in narrow}
    kept: dict[str, Tensor] = {}
    for name, linear in narrow.items():
        if name in linears:
            kept |= formats.pack_linear(name, linear)
        else:
            wide[f"{name}.weight"] = linear.weight
            wide |= {} if linear.bias is None else {f"{name}.bias": linear.bias}
    as_it_is = any(linear.quant_type == "nf4" for linear in linears.values())
    for name, value in wide.items():
        dtype = torch.float32 if as_it_is else _dtype(model, name, value)
        value = value.detach().cpu()
        kept[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous()
    return kept


def _dtype(model: Model, name: str, value: Tensor) -> torch.dtype:
    if model.scheme.weights in FLOAT_DTYPES:
        return getattr(torch, model.scheme.weights)
    where = name.removeprefix(f"{model.net.base_model_prefix}.")
    narrower = value.ndim > 1 and any(where.startswith(f"{part}.") for part in model.family.non_block_weights)
    return torch.float16 if narrower else torch.float32


def _read(folder: Path, config: Any, how: Any, linears: dict[str, QuantizedLinear], kept: dict[str, Tensor]) -> Any:
    """The net in the file, as `mowa.load` makes it. ModelError where a tensor is not the one that was written."""
    from transformers import AutoModelForCTC

    found = load_file(folder / WEIGHTS_FILE)
    again, rest = formats.unpack_linears(how, found) if how else ({}, found)
    same = found.keys() == kept.keys() and all(torch.equal(found[name], value) for name, value in kept.items())
    for name, linear in linears.items():
        before, after = linear.state_dict(), again[name].state_dict() if name in again else {}
        same = same and before.keys() == after.keys() and linear.activations == again[name].activations
        same = same and all(torch.equal(after[key], value.cpu()) for key, value in before.items())
    if not same:
        raise ModelError(f"{WEIGHTS_FILE} does not hold what was written into it: export the model again")
    with torch.device("meta"):
        net = AutoModelForCTC.from_config(_dense(config))
    return formats.assign_weights(net, again, rest)


def _dense(config: Any) -> Any:
    dense = copy.deepcopy(config)
    vars(dense).pop("quantization_config", None)
    dense.dtype = torch.float32
    return dense


def _stock(folder: Path) -> Any:
    """The net as transformers loads it, in float32, without what it and its packages have to say."""
    from transformers import AutoModelForCTC

    with silence_transformers(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            net = AutoModelForCTC.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
            with torch.inference_mode():
                net(
                    torch.zeros(1, receptive_field(net.config))
                )  # compressed-tensors makes weights wide at the first call
        except Exception as error:  # of any kind: they come from three packages
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"transformers does not load what was written: {reason}") from error
    return net
