"""Who may import whom: only from a lower floor, never sideways between rooms. The plan is docs/architecture.md."""

import ast
from pathlib import Path

import pytest

import mowa

PACKAGE = Path(mowa.__file__).parent
FLOORS = [
    {"errors"},
    {"nouns", "machine"},
    {"files", "kernels"},
    {"data", "families", "decode"},
    {"tasks", "adapt"},
    {"loading", "train", "shrink", "export"},
    {"engines"},
    {"evaluate", "serve", "publish"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {
    "av",
    "accelerate",
    "bitsandbytes",
    "compressed_tensors",
    "coremltools",
    "ctranslate2",
    "datasets",
    "deepspeed",
    "jiwer",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "pyarrow",
    "sounddevice",
    "tensorrt",
    "torchao",
    "trl",
    "yaml",
}  # only inside the function that needs them
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path, *, top_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{name.name}" if node.module == "mowa" else node.module for name in node.names]
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != PACKAGE or not p.name.startswith("__")], ids=str)
def test_imports_only_from_lower_floors(path):
    here = room(path)
    assert here in FLOOR_OF, f"{here} has no floor: give it one here and in docs/architecture.md"
    for name in imports(path):
        if name.startswith("mowa.") and (there := name.split(".")[1]) in FLOOR_OF and there != here:
            assert FLOOR_OF[there] < FLOOR_OF[here], f"{path.name} ({here}) may not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_packages_are_imported_where_used(path):
    assert not HEAVY & {name.split(".")[0] for name in imports(path, top_only=True)}


def test_no_room_is_a_drawer():
    drawers = {"utils", "util", "common", "base", "manager", "helpers", "misc"}
    assert not [path for path in MODULES if path.stem in drawers]
