"""Names and prose use the field's words: a list of banned identifiers and phrases, with a short list of exceptions."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
BANNED = re.compile("hear|narrow|pupil|lesson|apart|surety|told|sift", re.IGNORECASE)
PHRASES = re.compile(
    r"made good|gone on with|refuses? to know|is not known here|are not known here|\bis heard\b|\blearnt\b|"
    r"\bso many \w+ at a time\b|\bthis room\b",
    re.IGNORECASE,
)
IDENTIFIERS_ALLOWED: frozenset[str] = frozenset()
PHRASES_ALLOWED = {
    "CHANGELOG.md",  # old names stand there beside the new ones
    "tests/test_language.py",
}
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".sh", ".js", ".html", ".ipynb"}


def tracked() -> list[str]:
    """Files of the repository: what git knows, or everything outside build folders in a copy without git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    if not names:
        skipped = {".venv", "build", "node_modules", "__pycache__"}
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [str(path) for path in files if not skipped & set(path.parts)]
    return sorted(name for name in names if Path(name).suffix in SUFFIXES and (ROOT / name).is_file())


FILES = tracked()


def identifiers(source: str) -> set[str]:
    """Names in Python source, those inside f-strings included."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            found.add(token.string)
        elif token.type == tokenize.STRING and re.match(r"[rb]?f", token.string, re.IGNORECASE):
            found |= set(re.findall(r"\{\s*([A-Za-z_]\w*)", token.string))
    return found


def test_identifiers_are_the_fields_own():
    found = {}
    for name in (name for name in FILES if name.endswith(".py")):
        words = {word for word in identifiers((ROOT / name).read_text("utf-8")) if BANNED.search(word)}
        found[name] = sorted(words - IDENTIFIERS_ALLOWED)
    assert not {name: words for name, words in found.items() if words}
    assert not [name for name in FILES if BANNED.search(Path(name).stem)]


def test_prose_is_plain():
    found = {}
    for name in (name for name in FILES if name not in PHRASES_ALLOWED):
        found[name] = PHRASES.findall(" ".join((ROOT / name).read_text("utf-8").split()))
    assert not {name: phrases for name, phrases in found.items() if phrases}
