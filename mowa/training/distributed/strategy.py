"""Choose how the stock Trainer shards weights, and build the TrainingArguments for it; runs inside each process."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from mowa import hardware
from mowa.errors import MissingDependency, RecipeError
from mowa.families import family_of
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from mowa.training.distributed import memory, zero_config
from mowa.training.distributed.memory import StrategyChoice
from mowa.training.distributed.process import exit_with_parent, is_main_process, is_worker_process

SHARDED = ("zero3", "zero3-offload", "fsdp")  # no process has all the weights


def validate_hardware(recipe: CTCRecipe | CausalRecipe) -> bool:
    """Return whether the processes will have GPUs.

    Raises:
        RecipeError: this machine has too few GPUs for the recipe, or none where it needs one.
        MissingDependency: the strategy needs DeepSpeed.
    """
    import torch

    config, gpus = recipe.distributed, torch.cuda.device_count()
    if gpus and config.devices > gpus:
        raise RecipeError(
            f"distributed: devices is {config.devices}, but this machine has {gpus} GPU{'s' * (gpus > 1)}"
        )
    if config.strategy.startswith("zero") and not _has_deepspeed():
        raise MissingDependency(f"strategy {config.strategy} needs deepspeed: pip install deepspeed")
    if config.strategy == "fsdp" and not gpus:
        raise RecipeError("distributed: strategy: fsdp needs a GPU; on CPUs use ddp, zero2 or zero3")
    if recipe.optimizer.precision == "fp16" and not gpus:
        raise RecipeError("optimizer: precision: fp16 needs a GPU; on CPUs use float32 or bf16")
    return gpus > 0


def _has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def distributed_arguments(
    recipe: CTCRecipe | CausalRecipe, net: Any, num_devices: int, *, precision: str = "auto"
) -> dict[str, Any]:
    """Return the TrainingArguments that depend on devices, strategy and precision; they override others.

    Call it after requires_grad was set in `net` and before TrainingArguments are made. In a worker process it also
    makes the process exit with its launcher, and sets layerdrop to 0, since all processes must run the same blocks.

    Args:
        recipe: the recipe.
        net: the net to train.
        num_devices: devices on this machine.
        precision: float32, bf16, fp16, or auto (`resolve_precision`).
    """
    import torch

    on_gpus = torch.cuda.is_available()
    precision = resolve_precision(recipe, net.config) if precision == "auto" else precision
    arguments: dict[str, Any] = {"bf16": precision == "bf16", "fp16": precision == "fp16", "use_cpu": not on_gpus}
    if not is_worker_process():
        return arguments
    exit_with_parent()
    if hasattr(net.config, "layerdrop"):
        net.config.layerdrop = 0.0
    choice = resolve_strategy(recipe, net, num_devices * recipe.distributed.nodes, precision=precision)
    if choice.strategy == "ddp":
        backend = "nccl" if on_gpus else "gloo"
        return arguments | {"ddp_backend": backend, "ddp_find_unused_parameters": _has_unused_parameters(recipe, net)}
    if choice.strategy == "fsdp":
        names = [type(module).__name__ for module in net.modules()]
        block = next(name for name in names if name in family_of(net).blocks)
        return arguments | {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [block]}}
    config = zero_config.deepspeed_config(
        choice.strategy, recipe, bucket_parameters=memory.max_block_parameters(net), precision=precision
    )
    arguments = {"deepspeed": config, "bf16": False, "fp16": precision == "fp16", "use_cpu": False}
    if on_gpus:
        return arguments
    zero_config.init_gloo()
    return arguments | {"accelerator_config": {"use_configured_state": True}, "dataloader_pin_memory": False}


def resolve_strategy(recipe: CTCRecipe | CausalRecipe, net: Any, num_devices: int, *, precision: str) -> StrategyChoice:
    """Return the strategy of a run and the reason for it.

    `auto` takes the fastest strategy that supports the recipe and fits by `memory.estimate_memory`; the main process
    prints the estimate.

    Args:
        recipe: the recipe.
        net: the net to train, with requires_grad set.
        num_devices: devices over all machines.
        precision: float32, bf16 or fp16.

    Raises:
        RecipeError: the recipe names a strategy that does not support it.
    """
    import torch

    config, on_gpus = recipe.distributed, validate_hardware(recipe)
    if config.strategy != "auto":
        if reason := unsupported_reason(config.strategy, recipe, net):
            raise RecipeError(f"distributed: strategy: {config.strategy}: {reason}")
        return StrategyChoice(config.strategy, f"{config.strategy}, as set in the recipe")
    host = hardware.total_memory_bytes()
    device = torch.cuda.get_device_properties(0).total_memory if on_gpus else host / config.devices
    estimate = memory.estimate_memory(
        net, recipe, gpu_bytes=device, host_bytes=host, num_devices=num_devices, precision=precision
    )
    supported = [name for name in _candidates(on_gpus) if not unsupported_reason(name, recipe, net)]
    choice = memory.choose_strategy(estimate, supported)
    if is_main_process():
        print(f"{memory.format_table(estimate)}\nstrategy {choice.reason}", file=sys.stderr)
    return choice


def _candidates(on_gpus: bool) -> tuple[str, ...]:
    if not _has_deepspeed():
        return ("ddp", "fsdp") if on_gpus else ("ddp",)
    return ("ddp", "zero2", "zero3", "zero3-offload") if on_gpus else ("ddp", "zero2", "zero3")


def unsupported_reason(strategy: str, recipe: CTCRecipe | CausalRecipe, net: Any) -> str:
    """Return why a strategy cannot run this recipe; empty if it can."""
    if strategy not in SHARDED:
        return ""
    if getattr(recipe, "qat", "none") != "none":
        return "qat rounds whole weights, which no process has under this strategy; use ddp or zero2"
    if recipe.optimizer.ema_decay:
        return "optimizer: ema_decay needs all weights on one process; use ddp or zero2"
    packed_speech = recipe.task == "ctc" and recipe.batch.packing
    if packed_speech and read_anatomy(net).normalizes_over_time:
        return (
            "a group-norm front end encodes packed recordings one by one, so the processes would run out of step; use "
            "batch: packing: false, or ddp or zero2"
        )
    return ""


def gather_state_dict(trainer: Any) -> dict[str, Any] | None:
    """Gather the full weights of the trained module on the CPU of the main process, after training.

    Call it on every process. Frozen weights are included, even those that the module omits from its checkpoints.

    Returns:
        The state dict (float32; float16 under fp16 with ZeRO) on the main process, None on others.
    """
    module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state: dict[str, Any] = {}
    if not trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # None on other ranks under ZeRO-3
    for name, weight in module.named_parameters(remove_duplicate=False):
        if hasattr(weight, "full_tensor"):
            state[name] = weight.full_tensor()  # collective
        elif not hasattr(weight, "ds_id"):  # ZeRO-3 shards were gathered above
            state.setdefault(name, weight)
    if not trainer.is_world_process_zero():
        return None
    gathered = {}
    for name, value in state.items():
        tensor = value.detach().to("cpu").contiguous()
        owns_storage = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        gathered[name] = tensor if owns_storage else tensor.clone()  # safetensors refuses shared storage
    return gathered


def resolve_precision(recipe: CTCRecipe | CausalRecipe, config: Any) -> str:
    """Return the compute precision on this machine, float32, bf16 or fp16: the recipe's, or the fastest."""
    import torch

    if recipe.optimizer.precision != "auto":
        return recipe.optimizer.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    text = config.get_text_config()
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width  # GPT-2's and OPT's have other names
    found = hardware.select_precision(width, inner)
    return "bf16" if found.dtype == "bfloat16" else "float32"


def _has_unused_parameters(recipe: CTCRecipe | CausalRecipe, net: Any) -> bool:
    """Return whether some steps leave a trainable parameter without gradient, for which DDP must search."""
    embedding = getattr(net.base_model, "masked_spec_embed", None)  # language models have none
    return embedding is not None and embedding.requires_grad and not recipe.spec_augment.mask_time_prob  # type: ignore[union-attr]
