"""Imports go down only and never in circles, and packages stay small. The plan is docs/architecture.md."""

import ast
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest

import mowa
from mowa.families import list_families

PACKAGE = Path(mowa.__file__).parent
LAYERS = [
    {"errors"},
    {"types", "hardware", "plugins"},
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
    {"api"},
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


def package_imports() -> dict[str, set[str]]:
    """Package → packages that it imports, without those that it reaches through another one."""
    direct: dict[str, set[str]] = {name: set() for name in LAYER_OF}
    for name, path in NAMES.items():
        if package(name) in direct:
            direct[package(name)] |= {package(other) for other in imported(path)} & LAYER_OF.keys() - {package(name)}

    @cache
    def reached(name: str) -> set[str]:
        return direct[name].union(*map(reached, direct[name]))

    return {name: others - set().union(*map(reached, others)) for name, others in direct.items()}


def drawing() -> str:
    """The packages and their imports as a Mermaid graph, a layer per line."""
    lines, imports = ["```mermaid", "graph TD"], package_imports()
    for layer in reversed(LAYERS):
        for name in sorted(layer):
            lines += [f"    {name} --> {other}" for other in sorted(imports[name])]
    return "\n".join([*lines, "```"])


def test_the_docs_draw_the_imports():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    assert drawing() in page, f"put this into docs/architecture.md:\n\n{drawing()}"


@pytest.mark.parametrize("name", NAMES)
def test_heavy_packages_are_imported_where_used(name):
    assert not HEAVY & {other.split(".")[0] for other in imported(NAMES[name], top_only=True)}


def test_the_package_imports_nothing_beside_it():
    assert not [name for name, path in NAMES.items() for other in imported(path) if other.split(".")[0] == "projects"]


# How transformers names the parts of a wav2vec2-like net; `Anatomy` names them for everybody else.
PARTS = {"feature_extractor", "feature_projection", "pos_conv_embed", "masked_spec_embed", "do_stable_layer_norm"}
CTC_ENCODER = PACKAGE / "models" / "ctc_encoder"


def parts_called(source: str) -> list[str]:
    """Attributes of a file that name a part of a net, and where it looks for a replaced forward pass."""
    found = [line for line in source.splitlines() if re.search(r'"forward" in vars|vars\(.*(\[|get\()"forward"', line)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            inner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in PARTS or (inner, node.attr) == ("encoder", "layers"):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", [name for name, path in NAMES.items() if CTC_ENCODER not in path.parents])
def test_only_the_anatomy_calls_the_parts_of_a_ctc_net(name):
    if not name.startswith("mowa.models.causal"):  # it replaces forward passes of language models
        assert not parts_called(NAMES[name].read_text())


def test_calls_of_parts_are_found():
    loops = "for layer in net.base_model.encoder.layers: pass", "for layer in encoder.layers: pass"
    others = "core.feature_extractor(x)", 'vars(module).get("forward")', 'print("forward" in vars(module))'
    assert all(len(parts_called(line)) == 1 for line in (*loops, *others))
    assert not parts_called('"wav2vec2.encoder.layers.0"; processor.decode(x); decoder.layers')


def test_the_supported_nets_are_listed_in_families_only():
    nets = {kind for family in list_families() if family.task == "ctc" for kind in family.architectures}
    for name, path in NAMES.items():
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert package(name) == "families" or not nets & constants, name


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
