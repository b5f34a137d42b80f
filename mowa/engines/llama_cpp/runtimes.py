"""The packages that hold llama.cpp, and which of them is used.

| package            | is installed from                   | is used as           | scores                           |
|--------------------|-------------------------------------|----------------------|----------------------------------|
| `xllamacpp`        | wheels for Linux, macOS and Windows | server (`server`)    | all tokens or the top ones, JSON |
| `llama-cpp-python` | source, with a compiler             | library (`bindings`) | all tokens                       |

xllamacpp is used where both are installed, because it follows llama.cpp closely (a release per build) and frees
Python's lock while it computes. It is the server of llama.cpp without a process of its own. That server also listens on
a port of this machine, on 127.0.0.1 only; a random key, which nobody is given, closes it.

OpenMP: threads of libgomp wait by spinning, and where cores are busy with something else, those that compute wait for
them: 0.06 instead of 10 tokens/s for SmolLM2-135M in two threads on two busy cores. `OMP_WAIT_POLICY=PASSIVE` and
`GOMP_SPINCOUNT=0` prevent it, and libgomp reads them when it is loaded. On Linux it is torch's, which is shared, so
`mowa generate` sets them before it imports torch (`hardware.set_passive_openmp`); a program that uses Python has to
choose for itself. Where another libgomp is loaded with llama.cpp, they are set while that happens.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mowa import hardware
from mowa.engines.llama_cpp.bindings import LlamaCppPython
from mowa.engines.llama_cpp.protocol import Runtime, Session
from mowa.engines.llama_cpp.server import XLlamaCpp
from mowa.errors import MissingDependency

log = logging.getLogger("mowa")

OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def find_runtime() -> str | None:
    """Return the package that runs GGUF files here: xllamacpp or llama_cpp; None if neither is installed."""
    return next((name for name in RUNTIMES if find_spec(name) is not None), None)


def require_runtime(path: object) -> str:
    """As `find_runtime`. Raises MissingDependency if there is none."""
    if (found := find_runtime()) is None:
        raise MissingDependency(
            f"{path} needs llama.cpp: pip install 'mowa[gguf]', or run it in PyTorch (engine pytorch, mowa.load)"
        )
    return found


def open_runtime(path: Path, session: Session) -> Runtime:
    """Load a file. Raises ModelError if llama.cpp cannot load it, MissingDependency without a runtime."""
    name = require_runtime(path)
    with _passive_openmp():
        module = import_module(name)
    return RUNTIMES[name](module, path, session)


@contextmanager
def _passive_openmp() -> Iterator[None]:
    """Set what libgomp reads within the context, as `hardware.set_passive_openmp`; the environment is then restored."""
    before = {name: os.environ.get(name) for name in OPENMP}
    if before["OMP_WAIT_POLICY"] is None:
        log.info(
            "threads of llama.cpp may spin while they wait, which is slow where cores are busy: OMP_WAIT_POLICY=PASSIVE"
            " and GOMP_SPINCOUNT=0 prevent it, if they are set before torch is imported"
        )
    hardware.set_passive_openmp()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


RUNTIMES: dict[str, Callable[[Any, Path, Session], Runtime]] = {"xllamacpp": XLlamaCpp, "llama_cpp": LlamaCppPython}
"""Module → class, the preferred one first."""
