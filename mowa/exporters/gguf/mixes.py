"""Which tensor is stored in which type: the mixes of llama.cpp's quantizer, such as q4_k_m, and changes to them.

Norms, biases, routers of experts and other small tensors stay in float32. Rows that do not fill a type's blocks fall
back to a type with smaller blocks, and to float16 if those do not fit either (where llama.cpp's quantizer may fail).

Source: `llama_tensor_get_type` of llama.cpp (MIT), build 10434.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from mowa.errors import ModelError
from mowa.io.gguf.types import TENSOR_TYPES
from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES

QUANTIZATION_VERSION = 2  # of ggml's block formats
FALLBACK = "f16"  # for rows that fill no block


@dataclass(frozen=True, slots=True)
class FileType:
    """A mix: its value of `general.file_type`, and the type of tensors that no rule names."""

    id: int
    tensor_type: str


FILE_TYPES: Mapping[str, FileType] = MappingProxyType(
    {
        **{"f32": FileType(0, "f32"), "f16": FileType(1, "f16"), "bf16": FileType(32, "bf16")},
        **{"q8_0": FileType(7, "q8_0"), "q4_0": FileType(2, "q4_0"), "q4_1": FileType(3, "q4_1")},
        **{"q5_0": FileType(8, "q5_0"), "q5_1": FileType(9, "q5_1"), "q2_k": FileType(10, "q2_k")},
        **{"q3_k_s": FileType(11, "q3_k"), "q3_k_m": FileType(12, "q3_k"), "q3_k_l": FileType(13, "q3_k")},
        **{"q4_k_s": FileType(14, "q4_k"), "q4_k_m": FileType(15, "q4_k"), "q5_k_s": FileType(16, "q5_k")},
        **{"q5_k_m": FileType(17, "q5_k"), "q6_k": FileType(18, "q6_k")},
        **{"iq4_nl": FileType(25, "iq4_nl"), "iq4_xs": FileType(30, "iq4_xs"), "mxfp4_moe": FileType(38, "mxfp4")},
    }
)
_SMALLER_BLOCKS = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
}  # fmt: skip
FLOAT_TYPES = ("f32", "f16", "bf16")
_CATEGORIES = ("attn_qkv", "attn_kv_b", "attn_v", "attn_k", "attn_q", "attn_output")  # in this order, with ".weight"
_VALUES = ("attn_qkv", "attn_kv_b", "attn_v")  # most sensitive to rounding
_SEVENTY_B = {"llama": 80, "qwen2": 80}  # architecture → layers of what llama.cpp calls 70B
_MIXTRAL_EXPERTS = 8  # Mixtral's, which gets larger attention


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What mixes depend on besides names and shapes."""

    num_layers: int
    heads_per_key: int
    num_experts: int
    is_70b: bool

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> ModelFacts:
        """Read them from the metadata of a GGUF file."""
        name = metadata["general.architecture"]

        def number(key: str, default: int = 0) -> int:
            return int(metadata.get(f"{name}.{key}", default))

        layers, heads = number("block_count"), number("attention.head_count")
        keys = number("attention.head_count_kv", heads)
        experts = number("expert_count")
        is_70b = _SEVENTY_B.get(name) == layers and (name != "llama" or (keys != heads and experts != _MIXTRAL_EXPERTS))
        return cls(layers, heads // keys if keys else 0, experts, is_70b)


@dataclass(slots=True)
class _Mix:
    """A mix that is being applied to the tensors of a model, in order: some rules depend on how many came before."""

    name: str
    facts: ModelFacts
    tied: bool
    has_importance: bool
    num_values: int
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return FILE_TYPES[self.name].tensor_type

    def count(self, category: str) -> int:
        """Return how many tensors of a category came before this one."""
        index = self.seen.get(category, 0)
        self.seen[category] = index + 1
        return index


def get_file_type(name: str) -> FileType:
    """Return the mix called `name`. Raises ModelError with the known names."""
    if name not in FILE_TYPES:
        raise ModelError(f"unknown GGUF scheme {name!r}: known are {', '.join(FILE_TYPES)}")
    return FILE_TYPES[name]


def choose_types(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, Any],
    file_type: str,
    *,
    has_importance: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """Return the type of each tensor, in the order of `shapes`.

    Args:
        shapes: name in GGUF → shape in torch's order.
        metadata: of the file, with the sizes of the model.
        file_type: a key of `FILE_TYPES`.
        has_importance: whether an importance matrix is used, which changes some choices.
        overrides: (regular expression, type) pairs; the first one that is found in a name decides. They apply to
            tensors that a mix may quantize.

    Raises ModelError if the file type, an override's type or its expression is unknown, or if an override applies to no
    tensor.
    """
    get_file_type(file_type)
    patterns = [_compile(pattern, type_name) for pattern, type_name in overrides]
    values = sum(_category(name) in _VALUES for name in shapes)
    mix = _Mix(file_type, ModelFacts.of(metadata), "output.weight" not in shapes, has_importance, values)
    chosen: dict[str, str] = {}
    unused = list(range(len(patterns)))
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):
        if not may_quantize(name, shapes[name]):
            chosen[name] = "f32"
            continue
        matching = next((index for index, (pattern, _) in enumerate(patterns) if pattern.search(name)), None)
        if matching is not None:
            unused = [index for index in unused if index != matching]
            chosen[name] = patterns[matching][1]
        else:
            chosen[name] = _choose(mix, name, shapes[name])
        chosen[name] = fit_type(chosen[name], shapes[name][-1])
    if unused:
        raise ModelError(
            f"--tensor-type {overrides[unused[0]][0]!r} applies to no tensor: none that can be"
            " quantized matches it before another --tensor-type"
        )
    return {name: chosen[name] for name in shapes}


def file_type_metadata(file_type: str) -> dict[str, Any]:
    """Return what a file says about its mix."""
    return {
        "general.file_type": np.uint32(FILE_TYPES[file_type].id),
        "general.quantization_version": np.uint32(QUANTIZATION_VERSION),
    }


def parse_override(text: str) -> tuple[str, str]:
    """Parse `PATTERN=TYPE`, as `attn_v=q6_k`. Raises ModelError if it is not of this form."""
    pattern, separator, type_name = text.rpartition("=")
    if not separator or not pattern:
        raise ModelError(f"{text!r} is not of the form PATTERN=TYPE, such as attn_v=q6_k")
    return pattern, type_name.lower()


def _compile(pattern: str, type_name: str) -> tuple[re.Pattern[str], str]:
    if type_name not in BLOCK_TYPES:
        raise ModelError(f"unknown type {type_name!r} for {pattern!r}: known are {', '.join(BLOCK_TYPES)}")
    try:
        return re.compile(pattern), type_name
    except re.error as error:
        raise ModelError(f"{pattern!r} is not a regular expression: {error}") from None


def may_quantize(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may be stored in another type than float32: matrices that are neither norms nor routers."""
    dimensions = len(shape) - next((index for index, size in enumerate(shape) if size != 1), len(shape))
    return (
        dimensions > 1
        and name.endswith("weight")
        and not name.endswith("_norm.weight")
        and "ffn_gate_inp.weight" not in name
    )


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _category(name: str) -> str:
    if name in ("output.weight", "token_embd.weight"):
        return name.removesuffix(".weight")
    found = next((category for category in _CATEGORIES if f"{category}.weight" in name), "")
    return found or next((category for category in ("ffn_up", "ffn_gate", "ffn_down") if category in name), "")


def fit_type(type_name: str, row: int) -> str:
    """Return the type, or what replaces it where rows do not fill its blocks."""
    candidates = (type_name, _SMALLER_BLOCKS.get(type_name, FALLBACK), FALLBACK)
    return next(one for one in candidates if row % TENSOR_TYPES[one].block_weights == 0)


def _choose(mix: _Mix, name: str, shape: tuple[int, ...]) -> str:
    category = _category(name)
    if mix.base in FLOAT_TYPES:
        return mix.base
    if category == "output" or (category == "token_embd" and mix.tied):
        return _output_type(mix, shape[-1])
    if mix.name == "mxfp4_moe":
        return "mxfp4" if len(shape) > 2 and shape[0] > 1 else "q8_0"
    if category in _VALUES:
        return _value_type(mix)
    if category == "attn_k" and mix.facts.num_experts == _MIXTRAL_EXPERTS:
        return "q8_0"
    if category == "ffn_down":
        index = mix.count(category)
        return _down_type(mix, _layer(name) if mix.facts.num_experts > 1 else index)
    if category == "attn_output":
        return _attention_output_type(mix)
    return mix.base


def _output_type(mix: _Mix, row: int) -> str:
    """Type of the head, or of the embeddings where they are the head."""
    if mix.name == "mxfp4_moe" or row % TENSOR_TYPES[mix.base].block_weights or mix.base == "q8_0":
        return "q8_0"
    return "q6_k"


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer is among the first and last eighths, or every third between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _value_type(mix: _Mix) -> str:
    """Type of value projections, and of those that contain them."""
    index, grouped = mix.count("attn_v"), mix.facts.heads_per_key >= 4
    chosen = mix.base
    match mix.name:
        case "q2_k":
            chosen = "q4_k" if grouped else "q3_k"
        case "q3_k_m":
            chosen = "q5_k" if index < 2 else "q4_k"
        case "q3_k_l":
            chosen = "q5_k"
        case "iq4_nl" | "iq4_xs" if grouped:
            chosen = "q5_k"
        case "q4_k_m" | "q5_k_m" if _gets_more_bits(index, mix.num_values):
            chosen = "q6_k"
        case "q4_k_s" if index < 4:
            chosen = "q5_k"
    if mix.facts.is_70b and chosen in ("q3_k", "q4_k"):
        chosen = "q5_k"
    return "q8_0" if mix.facts.num_experts == _MIXTRAL_EXPERTS else chosen


def _down_type(mix: _Mix, layer: int) -> str:
    """Type of down projections."""
    count = mix.facts.num_layers
    early = layer < count // 8
    match mix.name:
        case "q2_k":
            return "q3_k"
        case "q3_k_m":
            return "q5_k" if layer < count // 16 else "q4_k"
        case "q3_k_l":
            return "q5_k"
        case "q4_k_m" | "q5_k_m" if _gets_more_bits(layer, count):
            return "q6_k"
        case "q4_k_s" if early:
            return "q5_k"
        case "iq4_nl" | "iq4_xs" if early and not mix.has_importance:
            return "q5_k"
        case "q4_0" | "q5_0" if early and mix.has_importance:
            return "q4_1" if mix.name == "q4_0" else "q5_1"
    return mix.base


def _attention_output_type(mix: _Mix) -> str:
    """Type of output projections of attention."""
    if mix.facts.num_experts == _MIXTRAL_EXPERTS:
        larger = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
        return "q5_k" if mix.name in larger else mix.base
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix.name, mix.base)
