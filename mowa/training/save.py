"""Write the results of a run: checkpoint files, report, recipe and curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mowa.io.atomic import atomic_write
from mowa.io.weights import fix_weight_permissions
from mowa.training.config import schema
from mowa.training.monitor import progress
from mowa.training.run_dir import RUN_FOLDER, mark_finished

CONFIG_FILE = "config.json"


@contextmanager
def atomic_output_dir(output_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `output_dir` when the block ends.

    config.json is moved last: until then the folder does not load as a new model.
    """
    partial = output_dir / ".partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    fix_weight_permissions(partial)
    (output_dir / CONFIG_FILE).unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == CONFIG_FILE):
        file.replace(output_dir / file.name)
    partial.rmdir()


def finalize_run(recipe: Any, trainer: Any, output_dir: Path, report: dict[str, Any], *, best_step: int | None) -> None:
    """Write report.json, recipe.yaml, history.jsonl and curve.png (with `best_step` marked), and delete checkpoints."""
    atomic_write(output_dir / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
    schema.write_yaml(recipe, output_dir / "recipe.yaml")
    progress.write_history(trainer.state.log_history, output_dir, best_step=best_step)
    mark_finished(output_dir / RUN_FOLDER)


def replace_parameters(net: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Replace sharded parameters of `net` by the full tensors of `state_dict`."""
    for name, value in state_dict.items():
        holder, _, leaf = name.rpartition(".")
        module = net.get_submodule(holder)
        if leaf in module._parameters:
            old = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)
