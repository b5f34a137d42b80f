"""Write a LoRA adapter alone as GGUF, as `llama-server --lora` and Ollama's `ADAPTER` read it.

    y = W x + alpha / r · B A x

The file has `NAME.lora_a` [r, K] and `NAME.lora_b` [N, r] for each weight NAME of the base model's file, and one alpha
for all of them; llama.cpp reads r from each B. Where PEFT scales layers differently (`alpha_pattern`, `rank_pattern`,
rslora), the ratio is multiplied into B. Rows of B are reordered as those of W are.

Adapters that hold more than that are refused: merge them into the model instead.

Source: convert_lora_to_gguf.py, src/llama-adapter.cpp and src/llama-graph.cpp of llama.cpp (MIT), build 10434.
Its converter writes `lora_alpha` whatever the layers' scales are, so that adapters with rslora or patterns are wrong.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mowa.errors import ModelError
from mowa.exporters.gguf.general import base_model_metadata
from mowa.exporters.gguf.mixes import file_type_metadata, fit_type
from mowa.io.atomic import read_json
from mowa.io.gguf import TensorInfo, open_writer
from mowa.io.hub import silence_transformers
from mowa.kernels.quant.gguf_blocks import encode
from mowa.models.gguf import find_architecture, net_state, to_gguf
from mowa.models.gguf.architecture import TensorRule
from mowa.models.gguf.convert import expand
from mowa.models.gguf.transforms import INTERLEAVE_KEY, INTERLEAVE_QUERY, KEEP, SPLIT_GATE_UP

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FILE_TYPES = ("f32", "f16", "bf16", "q8_0")
_PREFIX = "base_model.model."
_ROW_TRANSFORMS = (KEEP, INTERLEAVE_QUERY, INTERLEAVE_KEY, SPLIT_GATE_UP)  # act on the rows of W, and so on those of B
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.(?:default\.)?weight")
# Keys of adapter_config.json that say where LoRA is, or how it was initialized and trained; of any other key, a value
# changes what the adapter computes.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform lora_dropout megatron_core peft_type peft_version qalora_group_size revision "
    "runtime_config target_modules task_type r lora_alpha alpha_pattern rank_pattern use_rslora bias init_lora_weights "
    "auto_map".split()
)
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the weights of the base
_REASONS = {
    "use_dora": "it is a DoRA adapter, and llama.cpp has no magnitudes",
    "modules_to_save": "it holds modules in full (modules_to_save: {value}), and llama.cpp adds only LoRA",
    "trainable_token_indices": "it holds rows of embeddings (trainable_token_indices), and llama.cpp adds only LoRA",
    "lora_bias": "its LoRA layers have biases, and llama.cpp's have none",
    "target_parameters": "it has LoRA of experts ({value}), which PEFT and llama.cpp store in different ways",
}
# What llama.cpp multiplies without looking for LoRA: a file with these would load, and they would have no effect.
_IGNORED = {"deepseek2": re.compile(r"attn_(?!output)")}


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What was written: where, for which architecture and how many weights, and with which alpha.

    `rescaled` are weights whose B was multiplied by a number, so that one alpha holds for all.
    """

    path: Path
    architecture: str
    alpha: float
    weights: tuple[str, ...]
    rescaled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """LoRA of one linear layer: A [r, K] and B [N, r], and PEFT's factor of B A x."""

    module: str
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def alpha(self) -> float:
        return self.scaling * len(self.a)


def write_lora(
    adapter_folder: str | Path, base_config: Any, out: str | Path, *, file_type: str = "f16", name: str = ""
) -> LoraFile:
    """Write the LoRA adapter in a folder, as PEFT saves it, to the GGUF file `out`.

    Args:
        adapter_folder: with adapter_config.json and adapter_model.safetensors.
        base_config: of transformers, of the model that the adapter was trained over.
        file_type: f32, f16, bf16 or q8_0; rows that fill no block of q8_0 are stored in f16.
        name: `general.name`; by default that of the folder.

    Raises:
        ModelError: GGUF has no place for what the adapter holds, the architecture is not supported, or the adapter does
            not fit it or is damaged.
        DataError: `out` cannot be written.
    """
    folder, out = Path(adapter_folder), Path(out)
    if file_type not in FILE_TYPES:
        raise ModelError(f"unknown type {file_type!r} of a LoRA adapter in GGUF: known are {', '.join(FILE_TYPES)}")
    settings = read_json(folder / CONFIG_FILE)
    layers = read_layers(folder)
    alpha = float(Counter(layer.alpha for layer in layers).most_common(1)[0][0])
    if not alpha or not math.isfinite(alpha):
        _refuse(folder, f"its alpha is {alpha:g}")  # llama.cpp takes 0 for a scale of 1
    rules = _find_rules(folder, base_config, layers)
    tensors: dict[str, tuple[Tensor, str]] = {}
    for layer in layers:
        for key, matrix in _map_layer(folder, base_config, layer, rules[layer.module], alpha).items():
            tensors[key] = (matrix, fit_type(file_type, matrix.shape[-1]))
    architecture = find_architecture(base_config).name
    metadata = _metadata(folder, settings, architecture, alpha, name) | file_type_metadata(file_type)
    _write(out, metadata, tensors)
    targets = {layer.module: rules[layer.module].targets for layer in layers}
    rescaled = (target for layer in layers if layer.alpha != alpha for target in targets[layer.module])
    return LoraFile(
        out, architecture, alpha, tuple(one for targets in targets.values() for one in targets), tuple(rescaled)
    )


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise ModelError(
        f"{folder} cannot be written as GGUF alone: {reason}. Merge it into its model: mowa export MODEL --adapter"
        f" {folder} --to gguf"
    )


def _validate_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    if (kind := settings.get("peft_type")) != "LORA":
        raise ModelError(f"{folder}/{CONFIG_FILE} describes a {kind} adapter; only LoRA can be written as GGUF")
    for key, value in settings.items():
        if value and key not in _HARMLESS:
            reason = _REASONS.get(key, "it was made with {key}, which llama.cpp does not compute")
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            _refuse(folder, reason.format(key=key, value=text))
    if (bias := settings.get("bias", "none")) != "none":
        _refuse(folder, f"it holds trained biases (bias: {bias}), and llama.cpp adds only LoRA")
    if (start := settings.get("init_lora_weights")) not in _PLAIN_INITIALIZATIONS:
        _refuse(folder, f"it was initialized with {start}, which changes the weights of the base model")


def read_layers(folder: Path) -> list[LoraLayer]:
    """Return the layers of a LoRA adapter, float32.

    Raises ModelError if it holds more than LoRA of linear layers, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = read_json(folder / CONFIG_FILE)
    _validate_settings(folder, settings)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ModelError(f"{file} is missing: save the adapter with PEFT's save_pretrained, as safetensors")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if found is None or tensor.ndim != 2:
            what = "LoRA of embeddings" if ".lora_embedding_" in name else f"{name} {list(tensor.shape)}"
            _refuse(folder, f"it holds {what}, for which there is no place beside LoRA of linear layers")
        parts.setdefault(found["module"], {})[found["part"]] = tensor.float()
    layers = []
    for module, pair in parts.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(pair.items()))
            raise ModelError(f"{file}: {module} has {shapes}, which are not the two matrices of LoRA")
        layers.append(LoraLayer(module, pair["A"], pair["B"], _scaling(settings, module, len(pair["A"]))))
    if not layers:
        raise ModelError(f"{file} holds no LoRA")
    return layers


def _scaling(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the factor that PEFT gives to a layer: alpha / r, or alpha / sqrt(r) with rslora."""
    pattern = next((one for one in settings.get("alpha_pattern") or () if re.match(rf"(.*\.)?({one})$", module)), None)
    alpha = settings["alpha_pattern"][pattern] if pattern is not None else settings.get("lora_alpha", 8)
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _find_rules(folder: Path, config: Any, layers: list[LoraLayer]) -> dict[str, TensorRule]:
    """Return module → the rule of its weight, for every layer. Raises ModelError if one does not fit the model."""
    from transformers import AutoModelForCausalLM

    architecture = find_architecture(config)
    with silence_transformers(), torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    weights = to_gguf(config, net_state(net)).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    rules = {rule.source: rule for rule in expand(architecture, config.num_hidden_layers)}
    found = {}
    for layer in layers:
        source = f"{layer.module}.weight"
        rule = rules.get(source)
        if source not in shapes or rule is None:
            _refuse(folder, f"{source} of its LoRA is no weight that {config.model_type} has in GGUF")
        if absent := [target for target in rule.targets if target not in weights]:
            _refuse(folder, f"the head of this model is its embeddings, and GGUF has no {absent[0]} beside them")
        shape = (len(layer.b), layer.a.shape[1])
        if shape != shapes[source]:
            raise ModelError(
                f"{folder} does not fit its model: its LoRA is of {source} {list(shape)}, and the model's is"
                f" {list(shapes[source])}"
            )
        ignored = _IGNORED.get(architecture.name)
        if rule.transform not in _ROW_TRANSFORMS or (ignored and any(map(ignored.search, rule.targets))):
            _refuse(folder, f"llama.cpp computes {rule.targets[0]} of {architecture.name} without LoRA")
        found[layer.module] = rule
    return found


def _map_layer(folder: Path, config: Any, layer: LoraLayer, rule: TensorRule, alpha: float) -> dict[str, Tensor]:
    """Return name in GGUF → matrix, of one layer."""
    b = layer.b if layer.alpha == alpha else layer.b * (layer.alpha / alpha)
    for part, matrix in (("A", layer.a), ("B", b)):
        if not matrix.isfinite().all():
            raise ModelError(f"lora_{part} of {layer.module} in {folder} is not finite: its training diverged")
    found = {}
    for target, rows in zip(rule.targets, rule.transform.forward(b, config), strict=True):
        found[f"{target}.lora_a"], found[f"{target}.lora_b"] = layer.a, rows
    return found


def _metadata(folder: Path, settings: Mapping[str, Any], architecture: str, alpha: float, name: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": name or folder.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
    }
    return metadata | base_model_metadata(str(settings.get("base_model_name_or_path") or ""))


def _write(out: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Tensor, str]]) -> None:
    infos = {name: TensorInfo(tuple(matrix.shape), type_name) for name, (matrix, type_name) in tensors.items()}
    with open_writer(out, metadata, infos) as writer:
        for name, (matrix, type_name) in tensors.items():
            try:
                writer.write(name, encode(matrix.contiguous(), type_name).numpy())
            except ModelError as error:
                raise ModelError(f"{name}: {error}") from None
