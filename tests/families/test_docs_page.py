"""docs/add-a-family.md is correct: following it by script gives families that pass the family tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import mowa
from tests.families.test_registry import install_package, run_code

ROOT = Path(mowa.__file__).parents[1]
PAGE = (ROOT / "docs" / "add-a-family.md").read_text()


def code_blocks() -> dict[str, list[str]]:
    """Python blocks by their first line, a comment that says where the code goes."""
    blocks: dict[str, list[str]] = {}
    for block in re.findall(r"^ *```python\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE):
        place, _, code = textwrap.dedent(block).partition("\n")
        blocks.setdefault(place.removeprefix("# "), []).append(code)
    return blocks


def insert_in_dict(file: Path, name: str, lines: list[str]) -> None:
    source = file.read_text()
    start = re.search(rf"^{name}\b.* = {{\n", source, re.MULTILINE)
    assert start, name
    file.write_text(source[: start.end()] + "".join(lines) + source[start.end() :])


def test_the_examples_pass_the_family_tests(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "mowa", tmp_path / "mowa", ignore=ignore)
    (tmp_path / "tests").mkdir()
    for file in (ROOT / "tests").glob("*.py"):
        shutil.copy(file, tmp_path / "tests")
    shutil.copytree(ROOT / "tests" / "families", tmp_path / "tests" / "families", ignore=ignore)
    names = []
    for place, codes in code_blocks().items():
        path, _, where = place.partition(", in ")
        if where:
            insert_in_dict(tmp_path / path, where, codes)
        else:
            (tmp_path / path).write_text("".join(codes))
            names.append(Path(path).stem)
    assert names == ["seed_oss", "unispeech"]
    package = tmp_path / "mowa" / "families" / "__init__.py"
    package.write_text(package.read_text().replace("    phi,\n", "    phi,\n    seed_oss,\n    unispeech,\n", 1))
    tests = [f"tests/families/{name}.py" for name in ("test_families", "test_registry")]
    selected = [
        "-k",
        "(seed_oss or unispeech) or (tiny_net and not small)",
        "-p",
        "no:cacheprovider",
        "-q",
        "--no-header",
    ]
    command = [sys.executable, "-m", "pytest", *tests, *selected, "-o", "addopts="]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])  # type: ignore[index]
    assert passed >= 15


def test_the_package_adds_a_family(tmp_path: Path) -> None:
    (source,) = code_blocks()["mowa/families/seed_oss.py"]
    assert "mowa_seed:SEED_OSS" in PAGE
    install_package(tmp_path, "mowa-seed", "mowa_seed", "", "SEED_OSS")
    plain = source.replace("from mowa.families.registry import register\n", "").replace("register(", "(")
    (tmp_path / "mowa_seed.py").write_text(plain)
    code = "print(f.resolve_family('ByteDance-Seed/Seed-OSS-36B-Instruct').name)"
    assert run_code(tmp_path, code) == ("seed_oss", [])
