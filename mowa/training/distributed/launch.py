"""Start the processes of a fine-tuning run with torchrun, and report how they end in one line."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mowa import hardware
from mowa.errors import RecipeError, TrainingStopped
from mowa.training.config import schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from mowa.training.distributed.strategy import validate_hardware
from mowa.training.run_dir import RUN_FOLDER, is_finished, resume_hint

NEEDS_LAUNCHER = ("zero2", "zero3", "fsdp")  # strategies that need worker processes even on one device
SHUTDOWN_TIMEOUT_S = 10  # for a process that is asked to end
_IGNORED_WARNINGS = "ignore::FutureWarning:torch.distributed.c10d_logger"  # DeepSpeed calls what torch has renamed


def needs_launcher(recipe: CTCRecipe | CausalRecipe) -> bool:
    """Return whether the run needs worker processes."""
    config = recipe.distributed
    return config.devices * config.nodes > 1 or config.strategy in NEEDS_LAUNCHER


def launch_workers(recipe: CTCRecipe | CausalRecipe, output_dir: Path, *, threads: int | None = None) -> None:
    """Run `mowa train` on all devices of this machine, and return when every process has finished.

    Writes the recipe to `output_dir`/recipe.yaml. With several machines, call it once on each.

    Args:
        recipe: the recipe.
        output_dir: folder of the run.
        threads: CPU threads of all processes together; None: all cores.

    Raises:
        RecipeError: the recipe needs devices that are not there, or the folder holds another run.
        MissingDependency: the strategy needs DeepSpeed.
        TrainingStopped: a process died; the others were stopped, and the same command resumes the run.
        KeyboardInterrupt: after Ctrl-C, when all processes have ended.
    """
    file = output_dir / "recipe.yaml"
    is_finished(recipe, output_dir / RUN_FOLDER)
    output_dir.mkdir(parents=True, exist_ok=True)
    schema.write_yaml(recipe, file)
    each = max(1, (threads or hardware.cpu_count()) // recipe.distributed.devices)
    command = ["--module", "mowa", "train", str(file), "-o", str(output_dir), "--threads", str(each)]
    run_torchrun(command, recipe, output_dir, threads=each)


def run_torchrun(command: Sequence[str], recipe: CTCRecipe | CausalRecipe, output_dir: Path, *, threads: int) -> None:
    """Start `command` (torchrun's positional arguments) once per device, and wait for the end of all processes.

    Args:
        command: script or module, and its arguments.
        recipe: its `distributed` section says how many processes to start.
        output_dir: folder of the run, named in errors.
        threads: CPU threads per process.

    Raises:
        As `launch_workers`.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    config = recipe.distributed
    on_gpus = validate_hardware(recipe)
    variables = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S)}
    variables |= {} if on_gpus else {"DS_ACCELERATOR": "cpu"}
    variables["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS", ""), _IGNORED_WARNINGS]))
    with _agent_environment(variables):
        try:
            run(parse_args(["--nproc-per-node", str(config.devices), *_rendezvous_options(config.nodes), *command]))
        except ChildFailedError as failed:
            _kill_process_groups(failed)
            reason = _describe_failure(failed, config.devices * config.nodes)
            raise TrainingStopped(f"{reason}; {resume_hint(output_dir)}") from None
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            name = signal.Signals(stopped.sigval).name
            raise TrainingStopped(f"stopped by {name}; {resume_hint(output_dir)}") from None
        except (RendezvousError, DistError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingStopped(f"rendezvous of the processes on {config.nodes} machines failed: {reason}") from None


def _rendezvous_options(nodes: int) -> list[str]:
    """Return torchrun's options for where the processes find each other."""
    if nodes == 1:
        return ["--standalone", "--local-addr", "127.0.0.1"]
    host, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"))
    if "SLURM_JOB_ID" in os.environ:
        host = host or _first_host(os.environ.get("SLURM_JOB_NODELIST", ""))
        port = port or str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000)
        rank = rank or os.environ.get("SLURM_NODEID", "")
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port), ("NODE_RANK", rank)):
        if not value:
            raise RecipeError(
                f"distributed: nodes is {nodes}, but {name} is not set: give every machine MASTER_ADDR and MASTER_PORT "
                "of the first one, and its own NODE_RANK, counted from 0"
            )
    options = {"nnodes": nodes, "node-rank": rank, "master-addr": host, "master-port": port}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: `node[07-09,12],gpu1` → node07."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    return f"{found[1]}{found[2] or ''}{found[3] or ''}" if found else ""


@contextmanager
def _agent_environment(changes: dict[str, str]) -> Iterator[None]:
    """Set environment variables, silence torchrun's agent, and afterwards restore variables and signal handlers."""
    import torch.distributed.elastic.multiprocessing  # noqa: F401  (creates its loggers before they are silenced)

    variables = dict(os.environ)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {name: handler for name in signals if (handler := signal.getsignal(name)) is not None}
    os.environ.update(changes)
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
    """Kill what a dead process had started, such as data loaders; each process leads its own group."""
    for failure in failed.failures.values():
        try:
            os.killpg(failure.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _describe_failure(failed: Any, count: int) -> str:
    """Describe the first failure; within a second, a kill before an exit, and what the agent itself stopped last."""
    stopped = -signal.SIGTERM
    rank, failure = min(
        failed.failures.items(), key=lambda item: (item[1].exitcode == stopped, item[1].timestamp, item[1].exitcode > 0)
    )
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"process {rank} of {count} was killed by {name}{hint}, so the others were stopped"
    reason = f"failed with exit code {failure.exitcode} (see its output above)"
    return f"process {rank} of {count} {reason}, so the others were stopped"
