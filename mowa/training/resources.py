"""Say before a run starts whether it fits into memory and on the disk, and refuse one that clearly does not.

Memory is estimated by formulas (`distributed.memory`) whose error is unknown for a given net, so only a run that needs
MEMORY_MARGIN times what is available is refused. The size of checkpoints is known, so the disk must hold them.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from mowa import hardware
from mowa.errors import DataError, RecipeError
from mowa.training.checkpoints import KEPT_CHECKPOINTS
from mowa.training.config.ctc import ADAPTER_METHODS
from mowa.training.distributed import memory, strategy
from mowa.training.distributed.process import is_main_process, is_worker_process

MEMORY_MARGIN = 1.5  # refuse above this multiple of the available memory


def check_resources(run: Any, output_dir: Path, *, saves_frozen: bool) -> str:
    """Return one line that says whether a run fits into memory and on the disk.

    Args:
        run: a prepared run, with `recipe`, `model`, `max_steps` and `eval_steps`.
        output_dir: folder of the run.
        saves_frozen: whether checkpoints hold the frozen weights too.

    Raises:
        RecipeError: the run needs more than MEMORY_MARGIN times the available memory.
        DataError: the disk cannot hold the checkpoints and the result.
    """
    need = checkpoint_bytes(run, saves_frozen=saves_frozen)
    parts = [_check_memory(run)] if not is_worker_process() else []  # there `strategy` prints a table per strategy
    if is_main_process():
        parts.append(f"disk: {check_disk(need, output_dir)}")
    return " · ".join([*parts, "time: estimated after the first steps"])


def checkpoint_bytes(run: Any, *, saves_frozen: bool) -> int:
    """Return the largest size of a run's checkpoints and result: weights, their average, and two moments in float32."""
    net, recipe = run.model.net, run.recipe
    frozen, trained, moments = 0, 0, 0
    for parameter in net.parameters():
        size = parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            trained, moments = trained + size, moments + 8 * parameter.numel()
        else:
            frozen += size
    average = trained if recipe.optimizer.ema_decay else 0
    each = trained + average + moments + (frozen if saves_frozen else 0)
    count = min(KEPT_CHECKPOINTS + 1, math.ceil(run.max_steps / run.eval_steps))  # one more, until the next is complete
    return count * each + trained + (0 if recipe.method in ADAPTER_METHODS else frozen)


def check_disk(need: int, folder: Path) -> str:
    """Return how much of the disk's free space `need` bytes in `folder` take; files in the folder count as free.

    Raises:
        DataError: the disk cannot hold them.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    free += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if need > free:
        raise DataError(
            f"{folder}: checkpoints need {need >> 20} MB of disk, {free >> 20} MB are free: free some, or use another "
            "folder"
        )
    return f"checkpoints need {_size(need)} of {_size(free)}"


def _check_memory(run: Any) -> str:
    """Return what the run needs beyond the memory that is in use, and what is available, in words."""
    net, recipe = run.model.net, run.recipe
    if recipe.task == "ctc" and not hasattr(net.config, "conv_stride"):
        return "memory: not estimated for this architecture"
    on_gpu = torch.cuda.is_available()
    available = torch.cuda.mem_get_info()[0] if on_gpu else hardware.available_memory_bytes()
    found = memory.estimate_memory(
        net,
        recipe,
        gpu_bytes=available,
        host_bytes=hardware.total_memory_bytes(),
        num_devices=1,
        precision=strategy.resolve_precision(recipe, net.config),
    ).breakdowns["ddp"]
    loaded = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    need = found.device_total - found.weights + (loaded if on_gpu else 0)  # on a CPU, the weights are in memory already
    words = f"memory: about {_size(need)} of {_size(available)}"
    if need <= available:
        return words
    advice = (
        f"{'on the GPU' if on_gpu else 'of RAM'} (gradients {_size(found.gradients)}, optimizer "
        f"{_size(found.optimizer_states)}, activations {_size(found.activations)}).\n  Reduce batch: "
        f"{'tokens' if recipe.task == 'causal' else 'seconds'}, set optimizer: gradient_checkpointing: true, or train "
        "fewer weights (method: lora)"
    )
    if need > MEMORY_MARGIN * available:
        raise RecipeError(f"{recipe.model}: the run does not fit: it needs {words.removeprefix('memory: ')} {advice}")
    return f"{words}, which may not suffice {advice}"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
