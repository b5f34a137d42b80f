"""`import mowa` and `mowa --help` import no heavy packages, and public names stay what they are."""

import subprocess
import sys

HEAVY = "{'torch', 'transformers', 'numpy', 'onnxruntime', 'soundfile', 'av', 'huggingface_hub'}"


def loaded(code: str) -> str:
    check = f"{code}; import sys; print(*sorted({HEAVY} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    assert loaded("import mowa") == ""


def test_help_is_light():
    run = "from click.testing import CliRunner; from mowa.cli.main import cli"
    assert loaded(f"{run}; assert 'transcribe' in CliRunner().invoke(cli, ['--help']).output") == ""


def test_submodules_do_not_replace_public_functions():
    """Importing a submodule sets an attribute of its package, which must not hide a function of the same name."""
    code = """
import importlib, pkgutil, mowa
for module in pkgutil.walk_packages(mowa.__path__, "mowa."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for _ in range(2):
    for name in mowa.__all__:
        function = getattr(mowa, name)
        assert callable(function) and function.__module__.startswith("mowa."), name
        exec(f"from mowa import {name}")
        assert locals()[name] is function, name
top_level = {module.name for module in pkgutil.iter_modules(mowa.__path__)}
assert not top_level & {*mowa.__all__, "align", "bench", "distill", "embed", "evaluate", "export", "generate", "merge",
                        "publish", "push", "quantize", "serve", "tune"}, top_level
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-2000:]


def test_unknown_attribute():
    code = "import mowa\ntry: mowa.nothing\nexcept AttributeError as e: print(e)"
    assert "nothing" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
