"""Lock the folder of a run, so that it is resumed by the same recipe only."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mowa.errors import RecipeError
from mowa.io.atomic import atomic_write
from mowa.training.config import schema
from mowa.training.distributed.process import is_main_process

RUN_FORMAT = 2  # of the files under run/; runs of another format cannot be resumed
DONE_MARKER, FORMAT_FILE, RECIPE_FILE = "done", "format", "recipe.yaml"


def lock_run_dir(recipe: Any, output_dir: Path) -> bool:
    """Reserve `output_dir`/run for `recipe`, or check that it is already this recipe's.

    Returns:
        Whether the run has finished before.

    Raises:
        RecipeError: the folder holds a run of another recipe, or of an older mowa.
    """
    folder = output_dir / "run"
    if (folder / RECIPE_FILE).is_file():
        check_run_format(folder)
        check_recipe_file(recipe, folder / RECIPE_FILE)
    elif is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / FORMAT_FILE, f"{RUN_FORMAT}\n")
        schema.write_yaml(recipe, folder / RECIPE_FILE)
    return (folder / DONE_MARKER).is_file()


def check_recipe_file(recipe: Any, file: Path) -> None:
    """Raise RecipeError where `file` holds a recipe other than `recipe`; the message names the sections that differ."""
    before, now = asdict(schema.from_dict(type(recipe), schema.read_yaml(file), str(file))), asdict(recipe)
    if before != now:
        different = ", ".join(key for key in now if now[key] != before[key])
        raise RecipeError(
            f"{file.parent} holds a run with another recipe ({different}): use another folder, or delete it"
        )


def check_run_format(folder: Path) -> None:
    """Raise RecipeError where the run in `folder` was started by a mowa that wrote another format."""
    if not (folder / RECIPE_FILE).is_file():
        return
    file = folder / FORMAT_FILE
    found = file.read_text(encoding="utf-8").strip() if file.is_file() else "1"
    if found != str(RUN_FORMAT):
        raise RecipeError(
            f"{folder} holds a run of format {found}, which this version of mowa cannot resume (it writes format "
            f"{RUN_FORMAT}): use another folder, or delete {folder}"
        )
