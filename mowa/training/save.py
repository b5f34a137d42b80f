"""Write the results of a run: checkpoint files, report, recipe and curve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mowa.io.atomic import atomic_update, write_json
from mowa.io.hashing import sha256_file
from mowa.io.manifest import MANIFEST_FILE, find_manifest, update_manifest, write_manifest
from mowa.io.weights import weight_files
from mowa.training.config import schema
from mowa.training.monitor import progress
from mowa.training.run_dir import RECIPE_FILE, RUN_FOLDER, mark_finished
from mowa.types import AnyModel

CONFIG_FILE, REPORT_FILE = "config.json", "report.json"


@contextmanager
def atomic_output_dir(output_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `output_dir` when the block ends.

    config.json is moved last: until then the folder does not load as a new model.
    """
    with atomic_update(output_dir, CONFIG_FILE) as partial:
        yield partial
        (output_dir / MANIFEST_FILE).unlink(missing_ok=True)  # of an earlier model


def finalize_run(
    recipe: Any, model: AnyModel, trainer: Any, output_dir: Path, report: dict[str, Any], *, best_step: int | None
) -> None:
    """Write report.json, recipe.yaml, history.jsonl, curve.png (with `best_step` marked) and the manifest of the run.

    Checkpoints are deleted.
    """
    write_json(output_dir / REPORT_FILE, report)
    schema.write_yaml(recipe, output_dir / RECIPE_FILE)
    progress.write_history(trainer.state.log_history, output_dir, best_step=best_step)
    _write_run_manifest(recipe, model, output_dir, report)
    mark_finished(output_dir / RUN_FOLDER)


def _write_run_manifest(recipe: Any, model: AnyModel, output_dir: Path, report: dict[str, Any]) -> None:
    """Write the manifest of a trained checkpoint, or add the section `run` to that of a trained adapter."""
    run = {
        "method": recipe.method,
        "model": recipe.model,
        "global_step": report["global_step"],
        "report": REPORT_FILE,
        "recipe": {"file": RECIPE_FILE, "sha256": sha256_file(output_dir / RECIPE_FILE)},
    }
    if find_manifest(output_dir) is not None:
        update_manifest(output_dir, run=run)
        return
    write_manifest(
        output_dir,
        "run",
        task=model.task,
        family=model.family.name,
        origin=model.origin,
        files=[file.name for file in weight_files(output_dir)],
        run=run,
    )


def replace_parameters(net: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Replace sharded parameters of `net` by the full tensors of `state_dict`."""
    for name, value in state_dict.items():
        holder, _, leaf = name.rpartition(".")
        module = net.get_submodule(holder)
        if leaf in module._parameters:
            old = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)
