"""What DeepSpeed is told about a fine-tuning run, and how its processes meet where there are no GPUs.

Which strategy a run takes is not known here: `memory` weighs them and `parallel` settles it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe

PERSISTENCE_THRESHOLD = 10_000  # parameters: smaller ones (norms, biases) stay whole on every process under ZeRO-3


def deepspeed_config(
    strategy: str, recipe: CTCRecipe | CausalRecipe, *, bucket_parameters: int, precision: str
) -> dict[str, Any]:
    """What DeepSpeed is told. `block`: parameters of one block, which every bucket holds.

    Only the sizes of batches are left to the Trainer ("auto"); what it would look up in the model's config it would not
    find, for it is given a wrapper. bf16 is autocast, as without DeepSpeed: weights, sound and what processes tell each
    other stay float32. fp16 is DeepSpeed's own, with its loss scale: only that undoes the scale before it clips.
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
            "stage3_max_reuse_distance": 2
            * bucket_parameters,  # DeepSpeed's own, 10⁹, would never let go of a net of this size
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if strategy == "zero3-offload":
        zero |= {name: {"device": "cpu", "pin_memory": on_gpus} for name in ("offload_optimizer", "offload_param")}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled on the user's machine
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
    """Let DeepSpeed's processes find each other over gloo.

    Without a GPU accelerate looks for a backend only for use_cpu, which in turn leaves DeepSpeed out; told the backend,
    it counts the processes rightly. (accelerate 1.15: PartialState, `use_configured_state`.)
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
