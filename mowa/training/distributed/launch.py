"""One fine-tuning run on several devices: its processes, and how the stock Trainer shares the weights among them.

torchrun's agent starts and watches the processes; here is what it is told, and what its end means in one line. What a
strategy costs in memory `memory` knows; what is learnt nobody here does.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mowa import hardware
from mowa.errors import MissingDependency, RecipeError, TrainingStopped
from mowa.families import get_family
from mowa.training.config import schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from mowa.training.distributed import memory, zero_config
from mowa.training.distributed.memory import StrategyChoice

NEEDS_LAUNCHER = ("zero2", "zero3", "fsdp")  # need their processes even on one device
SHARDED = ("zero3", "zero3-offload", "fsdp")  # no process has all the weights
SHUTDOWN_TIMEOUT_S = 10  # for a process that is asked to end
_IGNORED_WARNINGS = (
    "ignore::FutureWarning:torch.distributed.c10d_logger"  # DeepSpeed's calls of what torch 2.13 has renamed
)
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def needs_launcher(recipe: CTCRecipe | CausalRecipe) -> bool:
    """Whether the run needs processes of its own."""
    how = recipe.distributed
    return how.devices * how.nodes > 1 or how.strategy in NEEDS_LAUNCHER


def is_worker_process() -> bool:
    """Whether this is one of a run's processes: torchrun (or srun, deepspeed, accelerate) said which."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def launch_workers(recipe: CTCRecipe | CausalRecipe, output_dir: Path, *, threads: int | None = None) -> None:
    """Run `mowa train` as `plan` says on all devices of this machine, and return when every process has finished.

    The recipe is written to `out`/recipe.yaml. On several machines this is called once on each. RecipeError where the
    plan asks for what is not there; MissingPart without DeepSpeed; TrainingStopped when a process dies: the others are
    ended, and the same command goes on from the last checkpoint. KeyboardInterrupt after Ctrl-C, when all have ended.
    """
    file = output_dir / "recipe.yaml"
    for note in (file, output_dir / "run" / "recipe.yaml"):
        if note.is_file() and schema.from_dict(type(recipe), schema.read_yaml(note), str(note)) != recipe:
            raise RecipeError(f"{note.parent} holds a run by another recipe: choose another folder, or delete that one")
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = output_dir / f"recipe.{os.uname().nodename}.partial"  # several machines may share the folder
    schema.write_yaml(recipe, partial)
    partial.replace(file)
    each = max(1, (threads or hardware.cpu_count()) // recipe.distributed.devices)
    run_torchrun(
        ["--module", "mowa", "train", str(file), "-o", str(output_dir), "--threads", str(each)],
        recipe,
        output_dir,
        threads=each,
    )


def run_torchrun(command: Sequence[str], recipe: CTCRecipe | CausalRecipe, output_dir: Path, *, threads: int) -> None:
    """Start `command` (what torchrun takes after its options) once for each device, and see to its end.

    threads: of the processor, for each process. Raises as `launch` does.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    how = recipe.distributed
    on_gpus = validate_hardware(recipe)
    own = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S)}
    own |= {} if on_gpus else {"DS_ACCELERATOR": "cpu"}
    own["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS", ""), _IGNORED_WARNINGS]))
    with _agent_environment(own):
        try:
            run(parse_args(["--nproc-per-node", str(how.devices), *_rendezvous_options(how.nodes), *command]))
        except ChildFailedError as failed:
            _kill_process_groups(failed)
            raise TrainingStopped(
                f"{_describe_failure(failed, how.devices * how.nodes)}; {_resume(output_dir)}"
            ) from None
        except SignalException as asked:
            if asked.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise TrainingStopped(f"stopped by {signal.Signals(asked.sigval).name}; {_resume(output_dir)}") from None
        except (RendezvousError, DistError) as apart:
            where = " ".join(str(apart).split())[:200]
            raise TrainingStopped(f"the processes on {how.nodes} machines did not find each other: {where}") from None


def validate_hardware(recipe: CTCRecipe | CausalRecipe) -> bool:
    """Whether the processes will have GPUs; RecipeError or MissingPart where this machine cannot run the plan."""
    import torch

    how, gpus = recipe.distributed, torch.cuda.device_count()
    if gpus and how.devices > gpus:
        raise RecipeError(f"parallel: devices is {how.devices}, and this machine has {gpus} GPU{'s' * (gpus > 1)}")
    if how.strategy.startswith("zero") and not _deepspeed():
        raise MissingDependency(f"strategy {how.strategy} needs deepspeed: pip install deepspeed")
    if how.strategy == "fsdp" and not gpus:
        raise RecipeError("parallel: strategy: fsdp needs GPUs; without one: ddp, zero2 or zero3")
    if recipe.optimizer.precision == "fp16" and not gpus:
        raise RecipeError("optimise: precision: fp16 needs a GPU; without one: float32 or bf16")
    return gpus > 0


def _deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def _rendezvous_options(nodes: int) -> list[str]:
    """torchrun's options for where the processes find each other."""
    if nodes == 1:
        return ["--standalone", "--local-addr", "127.0.0.1"]
    host, port, number = _environment("MASTER_ADDR"), _environment("MASTER_PORT"), _environment("NODE_RANK")
    if "SLURM_JOB_ID" in os.environ:
        host = host or _first_host(_environment("SLURM_JOB_NODELIST"))
        port = port or str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000)
        number = number or _environment("SLURM_NODEID")
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port), ("NODE_RANK", number)):
        if not value:
            raise RecipeError(
                f"parallel: nodes is {nodes} and {name} is not set: give every machine MASTER_ADDR and MASTER_PORT, "
                "where the first one listens, and NODE_RANK, its number from 0"
            )
    options = {"nnodes": nodes, "node-rank": number, "master-addr": host, "master-port": port}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _environment(name: str) -> str:
    return os.environ.get(name, "")


def _first_host(names: str) -> str:
    """`node[07-09,12],gpu1` → node07, as `scontrol show hostnames` begins."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", names)
    return f"{found[1]}{found[2] or ''}{found[3] or ''}" if found else ""


@contextmanager
def _agent_environment(own: dict[str, str]) -> Iterator[None]:
    """torchrun's agent sets variables, handles signals and logs at length; afterwards all is as it was."""
    import torch.distributed.elastic.multiprocessing  # noqa: F401  (its loggers, before they are silenced)

    variables = dict(os.environ)
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {name: handler for name in handled if (handler := signal.getsignal(name)) is not None}
    os.environ.update(own)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        os.environ.clear()
        os.environ.update(variables)


def _kill_process_groups(failed: Any) -> None:
    """What a dead process had started (the readers of its batches) goes with it: each is the head of its own group."""
    for failure in failed.failures.values():
        try:
            os.killpg(failure.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _describe_failure(failed: Any, count: int) -> str:
    """The failure that came first; in the same second, a kill before an exit, and what the agent itself ended last."""
    asked = -signal.SIGTERM
    rank, failure = min(
        failed.failures.items(), key=lambda item: (item[1].exitcode == asked, item[1].timestamp, item[1].exitcode > 0)
    )
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"process {rank} of {count} was ended by {name}{hint}, so the others were ended too"
    said = f"with exit code {failure.exitcode}; what it said stands above"
    return f"process {rank} of {count} ended {said}, and the others were ended too"


def _resume(out: Path) -> str:
    steps = [int(path.name.rpartition("-")[2]) for path in out.rglob("checkpoint-*") if path.name[11:].isdigit()]
    if not steps:
        return f"no checkpoint lies in {out} yet, so the same command begins anew"
    return f"the same command goes on from checkpoint {max(steps)} in {out}"


# --- inside each process: what the Trainer is told ----------------------------------------------------------------


def distributed_arguments(
    recipe: CTCRecipe | CausalRecipe, net: Any, num_devices: int, *, precision: str = "auto"
) -> dict[str, Any]:
    """The TrainingArguments that depend on devices, strategy and precision; they replace whatever stands there.

    Call it after what learns in `net` was marked and before TrainingArguments are made. `devices`: on this machine;
    precision: float32, bf16, fp16, or auto as `plan` and this machine have it. In a run's process two things are seen
    to besides: it ends when its launcher does, and layerdrop is 0, for all processes must run the same blocks.
    """
    import torch

    on_gpus = torch.cuda.is_available()
    kind = resolve_precision(recipe, net.config) if precision == "auto" else precision
    whole: dict[str, Any] = {"bf16": kind == "bf16", "fp16": kind == "fp16", "use_cpu": not on_gpus}
    if not is_worker_process():
        return whole
    exit_with_parent()
    if hasattr(net.config, "layerdrop"):
        net.config.layerdrop = 0.0
    choice = resolve_strategy(recipe, net, num_devices * recipe.distributed.nodes, precision=kind)
    if choice.strategy == "ddp":
        backend = "nccl" if on_gpus else "gloo"
        return whole | {"ddp_backend": backend, "ddp_find_unused_parameters": _has_unused_parameters(recipe, net)}
    if choice.strategy == "fsdp":
        (block, *_) = [
            name for name in map(_class_name, net.modules()) if name in get_family(net.config.model_type).blocks
        ]
        return whole | {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [block]}}
    config = zero_config.deepspeed_config(
        choice.strategy, recipe, bucket_parameters=memory.max_block_parameters(net), precision=kind
    )
    shared = {"deepspeed": config, "bf16": False, "fp16": kind == "fp16", "use_cpu": False}
    if on_gpus:
        return shared
    zero_config.init_gloo()
    return shared | {"accelerator_config": {"use_configured_state": True}, "dataloader_pin_memory": False}


def resolve_strategy(recipe: CTCRecipe | CausalRecipe, net: Any, num_devices: int, *, precision: str) -> StrategyChoice:
    """The strategy of a run on `devices` over all machines, and why; RecipeError where the one asked for cannot be.

    auto weighs by what `memory` estimates those that can run this plan; the first process prints the estimate.
    """
    import torch

    how, on_gpus = recipe.distributed, validate_hardware(recipe)
    if how.strategy != "auto":
        if why := unsupported_reason(how.strategy, recipe, net):
            raise RecipeError(f"parallel: strategy: {how.strategy}: {why}")
        return StrategyChoice(how.strategy, f"{how.strategy}, as the recipe says")
    host = hardware.total_memory_bytes()
    device = torch.cuda.get_device_properties(0).total_memory if on_gpus else host / how.devices
    known = memory.estimate_memory(
        net, recipe, gpu_bytes=device, host_bytes=host, num_devices=num_devices, precision=precision
    )
    among = [name for name in _candidates(on_gpus) if not unsupported_reason(name, recipe, net)]
    choice = memory.choose_strategy(known, among)
    if os.environ.get("RANK", "0") == "0":
        print(f"{memory.format_table(known)}\nstrategy {choice.reason}", file=sys.stderr)
    return choice


def _candidates(on_gpus: bool) -> tuple[str, ...]:
    if not _deepspeed():
        return ("ddp", "fsdp") if on_gpus else ("ddp",)
    return ("ddp", "zero2", "zero3", "zero3-offload") if on_gpus else ("ddp", "zero2", "zero3")


def unsupported_reason(strategy: str, recipe: CTCRecipe | CausalRecipe, net: Any) -> str:
    """Why a strategy cannot run this plan; empty where it can."""
    if strategy not in SHARDED:
        return ""
    if getattr(recipe, "qat", "none") != "none":
        return "whole weights are rounded (qat), and no process has them; use ddp or zero2"
    if recipe.optimizer.ema_decay:
        return "no process has all the weights to average (optimise: ema); use ddp or zero2"
    if recipe.batch.packing and getattr(net.config, "feat_extract_norm", "") == "group":
        return (
            "this net's front end takes packed recordings one by one, and the processes would fall out of step; "
            "use batch: layout: padded, or ddp or zero2"
        )
    return ""


def gather_state_dict(trainer: Any) -> dict[str, Any] | None:
    """After training: every weight of the module that was trained, whole, on the CPU of process 0; None on the others.

    Every process calls it. Frozen weights are there too, even where the module leaves them out of its checkpoints.
    float32, but float16 under fp16 and ZeRO.
    """
    module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state: dict[str, Any] = {}
    if not trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # None on others, under ZeRO-3
    for name, weight in module.named_parameters(remove_duplicate=False):
        if hasattr(weight, "full_tensor"):
            state[name] = weight.full_tensor()  # all processes together
        elif not hasattr(weight, "ds_id"):  # a piece of ZeRO-3, which has been put together above
            state.setdefault(name, weight)
    if not trainer.is_world_process_zero():
        return None
    whole = {}
    for name, value in state.items():
        tensor = value.detach().to("cpu").contiguous()
        alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        whole[name] = tensor if alone else tensor.clone()  # safetensors refuses what shares its storage
    return whole


def resolve_precision(recipe: CTCRecipe | CausalRecipe, config: Any) -> str:
    """What a net of this config computes in on this machine: float32, bf16 or fp16, as `plan` says or as is fastest."""
    import torch

    if recipe.optimizer.precision != "auto":
        return recipe.optimizer.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    text = config.get_text_config()
    found = hardware.select_precision(text.hidden_size, text.intermediate_size)
    return "bf16" if found.dtype == "bfloat16" else "float32"


def _class_name(module: Any) -> str:
    return type(module).__name__


def _has_unused_parameters(plan: CTCRecipe | CausalRecipe, net: Any) -> bool:
    """Whether steps leave something that learns without a gradient, which DDP has to look for."""
    vector = getattr(net.base_model, "masked_spec_embed", None)  # which nothing that reads has
    return vector is not None and vector.requires_grad and not plan.spec_augment.mask_time_prob  # type: ignore[union-attr]


def exit_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when the one that started it is gone, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
