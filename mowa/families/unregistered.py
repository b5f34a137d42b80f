"""Describe a causal language model without a registry entry, from its transformers net.

Blocks and linear layers are read from the net, so that it can be loaded, trained, merged and used for generation with
transformers' own modules. What a registry entry says beside that, and what was tested with one, stays unknown: such a
net is not accelerated. torch and transformers are imported only when a model is described.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from mowa.errors import ModelError
from mowa.types import Family

NO_ENTRY = "it has no registry entry, so transformers' own modules are used"
_LINEAR_CLASSES = ("Linear", "Conv1D")  # classes that LoRA can be added to; GPT-2 has transformers' Conv1D
_ROUTERS = ("gate", "router", "shared_expert_gate")  # choose experts, and get no LoRA
_KERNEL_WEIGHTS = re.compile(r"(^|\.)(mamba|mixer)\.out_proj$")  # state-space kernels read the weight: no LoRA (PEFT)
_UNKNOWN = ("acceleration", "attention", "fused_loss", "rms_norm", "rms_norm_plus_one", "swiglu", "geglu")


def is_registered(family: Family) -> bool:
    """Return whether `family` is from the registry, and not read from a net."""
    return "acceleration" not in family.unsupported


def describe_config(config: Mapping[str, Any]) -> Family:
    """Describe the causal net of a config.json whose `model_type` is not registered; builds it without weights.

    See `unsupported_reason`, which must be empty. Raises ModelError if the config is invalid.
    """
    return _describe_config(json.dumps(config, sort_keys=True, default=str))


@cache  # a checkpoint is resolved several times while it is loaded
def _describe_config(serialized: str) -> Family:
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = json.loads(serialized, object_hook=_restore_float)
    config.pop("quantization_config", None)
    try:
        loaded = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(loaded)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(f"config.json is not a valid {config['model_type']} config: {reason}") from error
    return describe_net(net)


def _restore_float(value: dict[str, Any]) -> Any:
    """Return the number that transformers writes as `{"__float__": "Infinity"}`, and other objects as they are."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def unsupported_reason(config: Mapping[str, Any]) -> str:
    """Return why a config of an unregistered model type cannot be loaded, or an empty string where it can."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type, architectures = str(config["model_type"]), config.get("architectures") or []
    if model_type not in CONFIG_MAPPING:
        return "transformers does not have it, and mowa runs no code of repositories"
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
    if causal is None:
        return "it is not a causal language model"
    if causal.__name__ not in architectures:
        named = ", ".join(map(str, architectures)) or "nothing"
        return f"architectures in config.json names {named}, and the causal language model is {causal.__name__}"
    return ""


def describe_net(net: Any) -> Family:
    """Describe a causal transformers net by its modules: blocks, their linear layers, head and tensor names."""
    path, blocks = _find_blocks(net)
    linears = _linears_by_group(blocks)
    names = {id(module): name for name, module in net.named_modules()}
    head = names.get(id(net.get_output_embeddings()), "")
    tensor_names = {
        "block": f"{path}.{{i}}.",
        "embeddings": f"{names[id(net.get_input_embeddings())]}.weight",
        "norm": f"{norm}.weight" if (norm := _last_norm(net, path)) else "",
        "head": f"{head}.weight",
    }
    return Family(
        name=net.config.model_type,
        model_types=(net.config.model_type,),
        task="causal",
        blocks=tuple(sorted({type(block).__name__ for block in blocks})),
        linears=linears,
        head=head,
        architectures=(type(net).__name__,),
        tensor_names={part: name for part, name in tensor_names.items() if name},
        unsupported=dict.fromkeys(_UNKNOWN, NO_ENTRY),
    )


def _find_blocks(net: Any) -> tuple[str, list[Any]]:
    """Return path and modules of the outermost list with one module per layer of the config, or of the longest one.

    Raises ModelError if there is none.
    """
    depth = getattr(net.config.get_text_config(), "num_hidden_layers", None)
    lists: dict[str, list[Any]] = {}
    for name, module in net.named_modules():
        if type(module).__name__ == "ModuleList" and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = list(module)
    if not lists:
        raise ModelError(
            f"{type(net).__name__} has no list of blocks (ModuleList), so its layers are unknown: add a registry entry"
        )
    return max(lists.items(), key=lambda item: (len(item[1]) == depth, len(item[1])))


def _linears_by_group(blocks: list[Any]) -> dict[str, tuple[str, ...]]:
    """Return group (attention, mlp, mixer) → names of the linear layers of blocks, with dots where one is ambiguous."""
    groups: dict[str, str] = {}
    excluded: set[str] = set()
    for block in blocks:
        for path, module in block.named_modules():
            if _is_linear(module):
                leaf = path.rpartition(".")[2]
                if leaf in _ROUTERS or _KERNEL_WEIGHTS.search(path):
                    excluded.add(leaf)
                else:
                    groups[path] = _group(path)
    used: dict[str, set[str]] = {}
    for path, group in groups.items():
        used.setdefault(path.rpartition(".")[2], set()).add(group)
    named: dict[str, set[str]] = {}
    for path, group in groups.items():
        leaf = path.rpartition(".")[2]
        ambiguous = len(used[leaf]) > 1 or leaf in excluded
        named.setdefault(group, set()).add(".".join(path.split(".")[-2:]) if ambiguous else leaf)
    return {group: tuple(sorted(names)) for group, names in sorted(named.items())}


def _is_linear(module: Any) -> bool:
    return any(kind.__name__ in _LINEAR_CLASSES for kind in type(module).__mro__)


def _group(path: str) -> str:
    first = path.partition(".")[0].lower()
    if "attn" in first or "attention" in first:
        return "attention"
    return "mixer" if any(word in first for word in ("mamba", "mixer", "conv", "recurrent", "temporal")) else "mlp"


def _last_norm(net: Any, blocks_path: str) -> str:
    """Return the name of the norm after the blocks, empty if there is none: the last one beside them."""
    parent = blocks_path.rpartition(".")[0]
    siblings = net.get_submodule(parent).named_children()
    norms = [name for name, module in siblings if "norm" in type(module).__name__.lower()]
    return f"{parent}.{norms[-1]}" if norms else ""
