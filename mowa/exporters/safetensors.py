"""Export a model, quantized or not, as a transformers checkpoint: `model.safetensors` and config.json.

`AutoModelForCTC.from_pretrained(folder)`, or AutoModelForCausalLM, loads exactly these weights, with the package that
the scheme needs; `mowa.load(folder)` loads the quantized model without it.

| scheme              | package            | weights outside the blocks' linear layers                             |
|---------------------|--------------------|-----------------------------------------------------------------------|
| float32, fp16, bf16 | none               | the same dtype                                                        |
| int8-…, mixed       | compressed-tensors | feature projection int8, other matrices float16                       |
| int4-weight         | compressed-tensors | the same; with zero points the feature projection is float16 too      |
| nf4                 | bitsandbytes       | float32, since transformers keeps the dtype of the file               |

Language models: embeddings, head and norms keep the dtype of the checkpoint that the model came from, wherever that is
exact, and transformers computes in it by default. Tied weights are stored once.

transformers quantizes linear layers only, so convolutions that other formats store as int8 are float16 here. It
quantizes inputs as the scheme says but multiplies dequantized weights: files are smaller, models are not faster there.
`quantization.formats` defines the tensor names, and `loading.quantized` loads them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mowa.adapters import causal
from mowa.adapters.loading import merge_adapter
from mowa.errors import ModelError
from mowa.exporters import verify
from mowa.exporters.manifest import ExportResult
from mowa.io.hub import silence_transformers
from mowa.io.weights import fix_weight_permissions
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.diff import compare
from mowa.quantization import formats
from mowa.types import AnyModel

log = logging.getLogger("mowa")

WEIGHTS_FILE = "model.safetensors"
FLOAT_DTYPES = ("float32", "float16", "bfloat16")
REQUIRED_PACKAGES = {
    formats.COMPRESSED_TENSORS: ("compressed-tensors",),
    formats.BITSANDBYTES: ("bitsandbytes", "accelerate"),
}


def unsupported_reason(model: AnyModel) -> str:
    """See `Exporter.unsupported_reason`."""
    stored = _quantized_linears(model.net)
    for name, module in model.net.named_modules():
        if isinstance(module, QuantizedLinear) and module.activations != "none" and name not in stored:
            return (
                f"transformers cannot quantize the inputs of {name} in a model with zero points, nf4, or groups that do"
                " not divide a row; use a symmetric scheme, or onnx"
            )
    return ""


def write(model: AnyModel, folder: Path, **options: Any) -> ExportResult:
    """See `Exporter.write`; there are no options.

    Every tensor is read back and must be the one that was written. The net read by mowa and, if the package is
    installed, the one loaded by transformers are compared with the original on the inputs of `verify.load_inputs`.
    """
    if options:
        raise ModelError(f"safetensors has no option {next(iter(options))!r}")
    net = merge_adapter(model).net
    linears = _quantized_linears(net)
    config, tensors = _build_config(model, net, linears), _collect_tensors(model, net, linears)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)
    fix_weight_permissions(folder)
    quantization_config = getattr(config, "quantization_config", None)
    auto_class = _auto_class(model)
    loaded = _read_back(auto_class, folder, config, quantization_config, linears, tensors)
    if {(p.dtype, p.device.type) for p in net.parameters()} != {(torch.float32, "cpu")}:
        net = copy.deepcopy(net).to("cpu", torch.float32)
    inputs = verify.load_inputs(model)
    logits = verify.compute_logits(loaded, inputs)
    diff = compare(verify.compute_logits(net, inputs), logits)
    exact = model.scheme.weights in FLOAT_DTYPES or model.task == "causal"
    verify.verify_tolerance(model, WEIGHTS_FILE, diff, exact=exact, alternative=_alternative(model))
    method = quantization_config["quant_method"] if quantization_config else ""
    details = {"quant_method": method, "transformers": _compare_transformers(model, folder, method, inputs, logits)}
    packages = ("safetensors", method) if method else ("safetensors",)
    return ExportResult(config, (WEIGHTS_FILE,), details, diff.max_abs_diff, diff.agreement, packages=packages)


def _auto_class(model: AnyModel) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM if model.task == "causal" else transformers.AutoModelForCTC


def _alternative(model: AnyModel) -> str:
    return "bf16" if model.task == "causal" else "onnx"


def _compare_transformers(
    model: AnyModel, folder: Path, method: str, inputs: Sequence[np.ndarray], logits: Sequence[Tensor]
) -> dict[str, float] | str:
    """Compare the net as transformers loads it with `logits`, or return why that was not possible."""
    for package in REQUIRED_PACKAGES.get(method, ()):
        if find_spec(package.replace("-", "_")) is None:
            log.info("%s is not installed: the export was not compared in transformers", package)
            return f"not compared: {package} is not installed"
    dtype = "auto" if method == formats.BITSANDBYTES else "float32"  # bitsandbytes keeps the dtype of the file
    theirs = _load_in_transformers(_auto_class(model), folder, dtype, inputs)
    diff = compare(logits, verify.compute_logits(theirs, inputs))
    exact = model.scheme.activations == "none" and method != formats.BITSANDBYTES
    label = f"{WEIGHTS_FILE} in transformers"
    verify.verify_tolerance(model, label, diff, exact=exact, alternative=_alternative(model))
    return {"max_abs_diff": diff.max_abs_diff, "agreement": diff.agreement}


def _quantized_linears(net: Any) -> dict[str, QuantizedLinear]:
    """Return the linear layers that are stored quantized. Others are stored dequantized.

    One package reads all of them, so nf4 layers, or else those with zero points, exclude the others. compressed-tensors
    does not read rows whose last group is shorter, which only the feature projection may have.
    """
    linears = {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
    linears = {n: one for n, one in linears.items() if one.in_features % min(one.group_size, one.in_features) == 0}
    nf4 = {name: linear for name, linear in linears.items() if linear.quant_type == "nf4"}
    return nf4 or {name: linear for name, linear in linears.items() if linear.zero_point is not None} or linears


def _build_config(model: AnyModel, net: Any, linears: dict[str, QuantizedLinear]) -> Any:
    config = copy.deepcopy(net.config)
    config.architectures = [type(net).__name__]
    config.dtype = _base_dtype(model)
    if linears:
        others = [n for n, m in net.named_modules() if isinstance(m, nn.Linear | QuantizedLinear) and n not in linears]
        dtype = str(config.dtype).removeprefix("torch.")
        config.quantization_config = formats.quantization_config(linears, others, dtype)
    return config


def _base_dtype(model: AnyModel) -> torch.dtype:
    """Return the dtype of config.json: a float scheme's, else that of a language model's checkpoint, else float32."""
    if model.scheme.weights in FLOAT_DTYPES:
        return getattr(torch, model.scheme.weights)
    return getattr(torch, causal.stored_dtype(model.origin.folder) if model.task == "causal" else "float32")


def _collect_tensors(model: AnyModel, net: Any, linears: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Return the tensors of the file by name; tied ones by their first name."""
    quantized = {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
    floats: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in net.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in quantized and id(value) not in seen:
            seen.add(id(value))
            floats[name] = value
    tensors: dict[str, Tensor] = {}
    for name, linear in quantized.items():
        if name in linears:
            tensors |= formats.pack_linear(name, linear)
        else:
            floats[f"{name}.weight"] = linear.weight
            floats |= {} if linear.bias is None else {f"{name}.bias": linear.bias}
    keep_float32 = any(linear.quant_type == "nf4" for linear in linears.values()) and model.task == "ctc"
    for name, value in floats.items():
        value = value.detach().cpu()
        dtype = torch.float32 if keep_float32 else _storage_dtype(model, name, value)
        tensors[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous()
    return tensors


def _storage_dtype(model: AnyModel, name: str, value: Tensor) -> torch.dtype:
    if model.scheme.weights in FLOAT_DTYPES:
        return getattr(torch, model.scheme.weights)
    if model.task == "causal":
        dtype = _base_dtype(model)
        return dtype if torch.equal(value.to(dtype).to(value.dtype), value) else torch.float32
    name = name.removeprefix(f"{model.net.base_model_prefix}.")
    is_half = value.ndim > 1 and any(name.startswith(f"{part}.") for part in model.family.non_block_weights)
    return torch.float16 if is_half else torch.float32


def _read_back(
    auto_class: Any,
    folder: Path,
    config: Any,
    quantization_config: Any,
    linears: dict[str, QuantizedLinear],
    tensors: dict[str, Tensor],
) -> Any:
    """Load the net as `mowa.load` does. Raises ModelError if a tensor is not the one that was written."""
    found = load_file(folder / WEIGHTS_FILE)
    unpacked, others = formats.unpack_linears(quantization_config, found) if quantization_config else ({}, found)
    same = found.keys() == tensors.keys() and all(torch.equal(found[name], value) for name, value in tensors.items())
    for name, linear in linears.items():
        before, after = linear.state_dict(), unpacked[name].state_dict() if name in unpacked else {}
        same = same and before.keys() == after.keys() and linear.activations == unpacked[name].activations
        same = same and all(torch.equal(after[key], value.cpu()) for key, value in before.items())
    if not same:
        raise ModelError(f"{WEIGHTS_FILE} does not read back as it was written: export the model again")
    with torch.device("meta"):
        net = auto_class.from_config(_remove_quantization(config))
    return formats.assign_weights(net, unpacked, others)


def _remove_quantization(config: Any) -> Any:
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    config.dtype = torch.float32
    return config


def _load_in_transformers(auto_class: Any, folder: Path, dtype: str, inputs: Sequence[np.ndarray]) -> Any:
    """Load the net with transformers and run it once, suppressing the output of the three packages."""
    with silence_transformers(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            net = auto_class.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
            verify.compute_logits(net, inputs[-1:])  # compressed-tensors dequantizes at the first call
        except Exception as error:  # any type, from three packages
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"transformers cannot load the export: {reason}") from error
    return net
