"""Write DeepSpeed's configuration of a run, and initialize gloo where there are no GPUs."""

from __future__ import annotations

import os
import sys
from typing import Any

from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe

PERSISTENCE_THRESHOLD = 10_000  # elements; smaller parameters (norms, biases) are not sharded under ZeRO-3


def deepspeed_config(
    strategy: str, recipe: CTCRecipe | CausalRecipe, *, bucket_parameters: int, precision: str
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Only batch sizes are left to the Trainer ("auto"): other automatic values come from the model's config, which the
    wrapper that is trained does not have. bf16 is autocast, as without DeepSpeed, so weights, inputs and communication
    stay float32. fp16 is DeepSpeed's own, with its loss scale, which it undoes before it clips gradients.

    Args:
        strategy: zero2, zero3 or zero3-offload.
        recipe: the recipe.
        bucket_parameters: elements of a communication bucket; the parameters of one block.
        precision: float32, bf16 or fp16.
    """
    import torch

    on_gpus = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": 2 if strategy == "zero2" else 3,
        "overlap_comm": on_gpus,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket_parameters,
    }
    if strategy == "zero2":
        zero["allgather_bucket_size"] = bucket_parameters
    else:
        zero |= {
            "stage3_prefetch_bucket_size": bucket_parameters,
            "stage3_max_live_parameters": 3 * bucket_parameters,
            # DeepSpeed's default of 10⁹ would never release the weights of a net of this size
            "stage3_max_reuse_distance": 2 * bucket_parameters,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if strategy == "zero3-offload":
        zero |= {name: {"device": "cpu", "pin_memory": on_gpus} for name in ("offload_optimizer", "offload_param")}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # would need a compiler on the user's machine
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": recipe.batch.gradient_accumulation_steps,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "steps_per_print": sys.maxsize,
    }
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return config


def init_gloo() -> None:
    """Initialize the process group of DeepSpeed with gloo, for machines without GPUs.

    Without a GPU accelerate selects a backend only with use_cpu, which in turn disables DeepSpeed (accelerate 1.15:
    PartialState, `use_configured_state`); so name the backend here.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
