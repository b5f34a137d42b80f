"""Two small real tasks on English text, with held-out measures: what Debian's packages say of themselves.

    python benchmarks/packages_task.py [--out build/packages] [--tokenizer build/smollm2]

The text is the package index of Debian's main archive, as apt serves it to this machine: the long descriptions
(Translation-en) and each package's section. It is fetched into `--out`/apt, beside the machine's own lists; the
descriptions stand under the licences of their packages, and nothing of them is committed.

sections (`--out`/{train,dev,test}.jsonl): user, a long description without its synopsis and with the package's name
struck out; assistant, the package's section, one of ten. 2,000 / 100 / 300 conversations, the same number of each
section; measure: the share of the test's answers that are the section, word for word (guessing: 10 %).
synopses (`--out`/synopses/{train,dev,test}.jsonl): one conversation a source package, a turn for each of its binary
packages: user, the long description; assistant, its one-line synopsis. Sources have one package or dozens, so lengths
have the long tail that chats have; 4,000 / 100 / 300 conversations.

Rows are `{"messages": [{"role": …, "content": …}, …]}`. No source package stands in two parts, nor do texts that
share half of their three-word sequences. The choice depends on nothing but the index: candidates are taken by the
SHA-256 of their source's name. Another release of Debian has other packages, so another task.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("admin", "fonts", "games", "graphics", "java", "math", "python", "science", "sound", "web")
ASKED_SECTION = f"Name the section of the Debian archive that the described package is in: {', '.join(SECTIONS)}."
ASKED_SYNOPSIS = "Sum up each description of a Debian package in one line."
PARTS = {"train": 2000, "dev": 100, "test": 300}
SYNOPSES = {"train": 4000, "dev": 100, "test": 300}
BODY = (120, 1200)  # characters of a description that sections asks about
TURN = (40, 2500)  # characters of a description in synopses
ALIKE = 0.5  # of the three-word sequences of two texts, for them to be one
CAT = "/usr/lib/apt/apt-helper"


@dataclass(frozen=True, slots=True)
class Package:
    """One binary package of the index: its synopsis is the first line of its description, its body the rest."""

    name: str
    source: str
    section: str
    synopsis: str
    body: str


def fetched(folder: Path) -> Path:
    """apt's lists with the English descriptions, in a folder of our own: the machine's own may lack them."""
    lists = (folder / "apt").resolve()
    if not any(lists.glob("*_i18n_Translation-en*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = ["-o", "Acquire::Languages=en", "-o", f"Dir::State::lists={lists}"]
        subprocess.run(["apt-get", "update", "-qq", *options], check=True)
    return lists


def records(lists: Path, pattern: str) -> Iterator[dict[str, str]]:
    """The paragraphs of the release's own lists; security and update lists change from day to day and are left out."""
    files = [file for file in sorted(lists.glob(pattern)) if not re.search(r"-(security|updates)_", file.name)]
    for file in files:
        text = subprocess.run([CAT, "cat-file", str(file)], stdout=subprocess.PIPE, text=True, check=True).stdout
        for paragraph in text.split("\n\n"):
            fields: dict[str, str] = {}
            name = ""
            for line in paragraph.splitlines():
                if line.startswith((" ", "\t")):
                    fields[name] += "\n" + line[1:]
                else:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
            if fields:
                yield fields


def packages(lists: Path) -> list[Package]:
    said = {row["Description-md5"]: row["Description-en"] for row in records(lists, "*_main_i18n_Translation-en*")}
    found = []
    for row in records(lists, "*_main_binary-*_Packages*"):
        synopsis, _, body = said.get(row.get("Description-md5", ""), "").partition("\n")
        source = row.get("Source", row["Package"]).split()[0]
        body = "\n".join("" if line.strip() == "." else line for line in body.splitlines()).strip()
        if synopsis and body:
            found.append(Package(row["Package"], source, row.get("Section", ""), synopsis.strip(), body))
    return sorted(found, key=lambda package: (order(package.source), package.name))


def order(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def anonymous(package: Package) -> str:
    """The body with the package's name struck out: `fonts-…` and `python3-…` would give the section away."""
    return re.sub(rf"(?<![\w-]){re.escape(package.name)}(?![\w-])", "…", package.body, flags=re.IGNORECASE)


class Seen:
    """Texts taken so far, by their three-word sequences; says whether another is too like one of them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def takes(self, text: str) -> bool:
        """True, and remembered, unless it shares ALIKE of the sequences (Jaccard) with a text taken before."""
        words = re.findall(r"\w+", text.lower())
        runs = set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}
        shared: dict[int, int] = defaultdict(int)
        for run in runs:
            for holder in self.holders[run]:
                shared[holder] += 1
        if any(both >= ALIKE * (len(runs) + self.sizes[holder] - both) for holder, both in shared.items()):
            return False
        for run in runs:
            self.holders[run].append(len(self.sizes))
        self.sizes.append(len(runs))
        return True


def conversation(system: str, turns: Iterable[tuple[str, str]]) -> dict[str, object]:
    messages = [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages}


def sections(found: list[Package]) -> list[dict[str, object]]:
    """Conversations of the ten sections in turn, so that any stretch of them is balanced."""
    wanted = sum(PARTS.values()) // len(SECTIONS)
    seen = Seen()
    sources: set[str] = set()
    taken: dict[str, list[dict[str, object]]] = {section: [] for section in SECTIONS}
    for package in found:
        here = taken.get(package.section)
        text = anonymous(package)
        if here is None or len(here) == wanted or package.source in sources or not BODY[0] <= len(text) <= BODY[1]:
            continue
        if seen.takes(text):
            sources.add(package.source)
            here.append(conversation(ASKED_SECTION, [(text, package.section)]))
    short = {section: len(rows) for section, rows in taken.items() if len(rows) < wanted}
    if short:
        raise SystemExit(f"this archive has too few packages of {short}; {wanted} are needed")
    return [row for rows in zip(*taken.values(), strict=True) for row in rows]


def synopses(found: list[Package]) -> list[dict[str, object]]:
    """One conversation a source, in the order of `found`, with the packages whose descriptions are not yet taken."""
    turns: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen = Seen()
    rows = 0
    for package in found:
        if package.source not in turns and rows == sum(SYNOPSES.values()):
            break
        if TURN[0] <= len(package.body) <= TURN[1] and seen.takes(package.body):
            rows += package.source not in turns
            turns[package.source].append((package.body, package.synopsis))
    return [conversation(ASKED_SYNOPSIS, pairs) for pairs in turns.values()]


def written(rows: list[dict[str, object]], parts: dict[str, int], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Test and dev come first: a larger training part leaves them as they are.
    start = 0
    for name in ("test", "dev", "train"):
        part = rows[start : start + parts[name]]
        start += parts[name]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))


def lengths(rows: list[dict[str, object]], tokenizer: str) -> str:
    import numpy as np
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    counts = np.array([len(tokens.apply_chat_template(row["messages"])["input_ids"]) for row in rows])
    padded = sum(int(batch.max()) * len(batch) for batch in np.split(counts, range(8, len(counts), 8)))
    marks = [1, 10, 25, 50, 75, 90, 99, 100]
    at = "  ".join(f"{mark}%: {int(value)}" for mark, value in zip(marks, np.percentile(counts, marks), strict=True))
    return f"tokens {counts.sum()}, mean {counts.mean():.0f}; {at}; padded in eights {padded / counts.sum():.2f} x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/packages"))
    parser.add_argument("--tokenizer", help="a folder or name, to print how long the training conversations are")
    given = parser.parse_args()
    found = packages(fetched(given.out))
    tasks = {
        "sections": (sections(found), PARTS, given.out),
        "synopses": (synopses(found), SYNOPSES, given.out / "synopses"),
    }
    for name, (rows, parts, folder) in tasks.items():
        written(rows, parts, folder)
        print(f"{name}: {parts} -> {folder}")
        if given.tokenizer:
            print("  " + lengths(rows[-parts["train"] :], given.tokenizer))


if __name__ == "__main__":
    main()
