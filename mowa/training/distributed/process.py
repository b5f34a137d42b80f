"""Find out which process of a distributed run this is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def is_worker_process() -> bool:
    """Return whether this is one of a run's processes, started by torchrun, srun, deepspeed or accelerate."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_main_process() -> bool:
    """Return whether this process prints and writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def exit_with_parent() -> None:
    """Ask the kernel (Linux only) to terminate this process when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
