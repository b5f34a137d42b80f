"""The folder of a run: its lock, its recipe, and its complete checkpoints.

One process trains in it, and only the recipe that began a run resumes it. A checkpoint counts only once it has a
completion marker.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mowa.errors import RecipeError
from mowa.io.atomic import atomic_write
from mowa.training.config import schema
from mowa.training.distributed.process import is_main_process

RUN_FOLDER = "run"  # of an output folder
RUN_FORMAT = 2  # of the files under run/; runs of another format cannot be resumed
DONE_MARKER, FORMAT_FILE, RECIPE_FILE, LOCK_FILE = "done", "format", "recipe.yaml", "lock"
COMPLETE_MARKER = "complete"  # of a checkpoint


def is_finished(recipe: Any, folder: Path) -> bool:
    """Return whether the run of `recipe` in `folder` has finished.

    A folder that has neither a complete checkpoint nor a result holds nothing to protect: any recipe may use it.

    Raises:
        RecipeError: the folder holds a run of another recipe, or of an older mowa.
    """
    file, done = folder / RECIPE_FILE, (folder / DONE_MARKER).is_file()
    if file.is_file():
        _check_format(folder)
        if done or list_checkpoints(folder):
            _check_recipe_file(recipe, file)
    return done


@contextmanager
def lock_run_dir(recipe: Any, folder: Path) -> Iterator[None]:
    """Reserve `folder` for `recipe` inside the context, and leave it to be resumed by this recipe.

    Without a complete checkpoint the folder is emptied first: it has only what a failed attempt left.

    Raises:
        RecipeError: as `is_finished`, or another process is training in the folder.
    """
    is_finished(recipe, folder)
    if not is_main_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        _lock_file(file)
        if not ((folder / DONE_MARKER).is_file() or list_checkpoints(folder)):
            (folder / RECIPE_FILE).unlink(missing_ok=True)  # first, as a recipe without a format is an older one
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK_FILE:
                    path.unlink()
            atomic_write(folder / FORMAT_FILE, f"{RUN_FORMAT}\n")
            schema.write_yaml(recipe, folder / RECIPE_FILE)
        yield


def mark_finished(folder: Path) -> None:
    """Mark the run in `folder` as finished and delete its checkpoints. Call it again after a kill at any moment."""
    if not is_main_process():
        return
    (folder / DONE_MARKER).touch()
    delete_checkpoints(folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, by step."""
    return [path for path in _all_checkpoints(folder) if (path / COMPLETE_MARKER).is_file()]


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint in `folder`; the main process deletes incomplete ones."""
    complete = list_checkpoints(folder)
    if is_main_process():
        for path in set(_all_checkpoints(folder)) - set(complete):
            shutil.rmtree(path)
    return complete[-1] if complete else None


def resume_hint(output_dir: Path) -> str:
    """Return a clause that says from which checkpoint the same command resumes the run."""
    if not (complete := list_checkpoints(output_dir / RUN_FOLDER)):
        return f"{output_dir} has no checkpoint yet, so the same command starts again from step 0"
    return f"the same command resumes from checkpoint {complete[-1].name.rpartition('-')[2]} in {output_dir}"


def delete_checkpoints(folder: Path) -> None:
    """Delete all checkpoints in `folder`, complete or not."""
    for path in _all_checkpoints(folder):
        delete_checkpoint(path)


def _all_checkpoints(folder: Path) -> list[Path]:
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]))


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its completion marker first, so that a half-deleted one does not count."""
    (checkpoint / COMPLETE_MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _lock_file(file: Any) -> None:
    """Lock an open file until it is closed or the process ends; file systems without locks are left unlocked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        folder = Path(file.name).parent
        raise RecipeError(f"another process is training in {folder}: wait for it, or use another folder") from None
    except OSError:  # such as ENOLCK on a network file system
        return


def _check_recipe_file(recipe: Any, file: Path) -> None:
    """Raise RecipeError where `file` holds a recipe other than `recipe`; the message names the sections that differ."""
    before, now = asdict(schema.from_dict(type(recipe), schema.read_yaml(file), str(file))), asdict(recipe)
    if before != now:
        different = ", ".join(key for key in now if now[key] != before[key])
        raise RecipeError(
            f"{file.parent} holds a run with another recipe ({different}): use another folder, or delete it"
        )


def _check_format(folder: Path) -> None:
    """Raise RecipeError where the run in `folder` was started by a mowa that wrote another format."""
    file = folder / FORMAT_FILE
    found = file.read_text(encoding="utf-8").strip() if file.is_file() else "1"
    if found != str(RUN_FORMAT):
        raise RecipeError(
            f"{folder} holds a run of format {found}, which this version of mowa cannot resume (it writes format "
            f"{RUN_FORMAT}): use another folder, or delete {folder}"
        )
