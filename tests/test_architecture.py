"""Imports go down only and never in circles, and packages stay small. The plan is docs/architecture.md."""

import ast
import pkgutil
from pathlib import Path

import pytest

import mowa

PACKAGE = Path(mowa.__file__).parent
LAYERS = [
    {"errors"},
    {"types", "hardware"},
    {"io", "kernels", "families"},
    {"data", "decode"},
    {"models"},
    {"tasks", "adapters"},
    {"quantization"},
    {"loading"},
    {"training"},
    {"exporters"},
    {"engines"},
    {"evaluation"},
    {"cli"},
]
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
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
}  # imported inside the function that needs them
LARGE = {"families", "cli"}  # one file per architecture, one per command
MODULES = sorted(PACKAGE.rglob("*.py"))
VERBS = {
    *("load", "transcribe", "stream", "generate", "train", "distill", "merge", "quantize", "export", "evaluate"),
    *("bench", "align", "embed", "push", "serve", "tune"),
}


def dotted(path: Path) -> str:
    parts = ("mowa", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in MODULES}


def imported(path: Path, *, top_only: bool = False) -> list[str]:
    """The modules that a file imports, here and inside functions, but not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{name.name}" for name in node.names]
            found += [name if name in NAMES else node.module for name in inner]
    return found


def package(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", [name for name in NAMES if package(name) not in ("", "__main__")])
def test_imports_only_from_lower_layers(name):
    here = package(name)
    assert here in LAYER_OF, f"{here} has no layer: give it one here and in docs/architecture.md"
    for other in imported(NAMES[name]):
        if (there := package(other)) in LAYER_OF and other.startswith("mowa.") and there != here:
            assert LAYER_OF[there] < LAYER_OF[here], f"{name} may not import {other}"


def test_no_module_imports_itself_through_others():
    graph = {name: {other for other in imported(path) if other in NAMES} - {name} for name, path in NAMES.items()}
    while ends := {name for name, others in graph.items() if not others & graph.keys()} | (
        graph.keys() - set().union(*graph.values(), ())
    ):
        graph = {name: others for name, others in graph.items() if name not in ends}
    assert not {name: sorted(others & graph.keys()) for name, others in graph.items()}


@pytest.mark.parametrize("name", NAMES)
def test_heavy_packages_are_imported_where_used(name):
    assert not HEAVY & {other.split(".")[0] for other in imported(NAMES[name], top_only=True)}


def test_the_package_imports_nothing_beside_it():
    assert not [name for name, path in NAMES.items() for other in imported(path) if other.split(".")[0] == "projects"]


def test_packages_are_small_and_say_what_they_are_for():
    folders = {path.parent for path in MODULES}
    full = {str(folder.relative_to(PACKAGE)): len([*folder.glob("*.py")]) - 1 for folder in folders}
    assert not {name: count for name, count in full.items() if count > 15 and name not in LARGE}
    silent = [folder for folder in folders if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))]
    assert not silent


def test_no_module_is_a_drawer_or_a_verb():
    drawers = {"utils", "util", "common", "base", "manager", "helpers", "misc"}
    assert not [path for path in MODULES if path.stem in drawers]
    assert not VERBS & {module.name for module in pkgutil.iter_modules(mowa.__path__)}
