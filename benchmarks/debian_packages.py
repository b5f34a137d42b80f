"""Two small real tasks on English text, with held-out sets: what Debian's packages say about themselves.

    python -m benchmarks.debian_packages [--out build/packages] [--tokenizer build/smollm2]

The text is the package index of Debian's main archive, as apt serves it to this machine: the long descriptions
(Translation-en) and each package's section. It is fetched into OUT/apt, beside the machine's own lists; the
descriptions are under the licences of their packages, and none of them are committed.

sections (OUT/{train,dev,test}.jsonl): user, a long description without its synopsis and with the package's name
replaced; assistant, the package's section, one of ten. 2,000 / 100 / 300 conversations, the same number for each
section; metric: the share of test answers that are the section, word for word (guessing: 10 %).
synopses (OUT/synopses/{train,dev,test}.jsonl): one conversation per source package, with a turn for each of its binary
packages: user, the long description; assistant, its one-line synopsis. Sources have one package or dozens, so lengths
have the long tail of chats; 4,000 / 100 / 300 conversations.

Samples are `{"messages": [{"role": …, "content": …}, …]}`. No source package occurs in two splits, nor do texts that
share half of their three-word sequences. The choice depends on nothing but the index: candidates are ordered by the
SHA-256 of their source's name. Another release of Debian has other packages, so it makes another task.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT

SECTIONS = ("admin", "fonts", "games", "graphics", "java", "math", "python", "science", "sound", "web")
ASKED_SECTION = f"Name the section of the Debian archive that the described package is in: {', '.join(SECTIONS)}."
ASKED_SYNOPSIS = "Sum up each description of a Debian package in one line."
PARTS = {"train": 2000, "dev": 100, "test": 300}
SYNOPSES = {"train": 4000, "dev": 100, "test": 300}
BODY = (120, 1200)  # characters of a description that sections asks about
TURN = (40, 2500)  # characters of a description in synopses
ALIKE = 0.5  # share of common three-word sequences at which two texts count as one
CAT = "/usr/lib/apt/apt-helper"


@dataclass(frozen=True, slots=True)
class Package:
    """One binary package of the index: its synopsis is the first line of its description, its body the rest."""

    name: str
    source: str
    section: str
    synopsis: str
    body: str


def fetch_lists(folder: Path) -> Path:
    """Fetch apt's lists with the English descriptions into a separate folder: the machine's own may lack them."""
    lists = (folder / "apt").resolve()
    if not any(lists.glob("*_i18n_Translation-en*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = ["-o", "Acquire::Languages=en", "-o", f"Dir::State::lists={lists}"]
        subprocess.run(["apt-get", "update", "-qq", *options], check=True)
    return lists


def read_lists(lists: Path, pattern: str) -> Iterator[dict[str, str]]:
    """Yield the paragraphs of the release's own lists; security and update lists, which change daily, are skipped."""
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


def read_packages(lists: Path) -> list[Package]:
    descriptions = {
        row["Description-md5"]: row["Description-en"] for row in read_lists(lists, "*_main_i18n_Translation-en*")
    }
    found = []
    for row in read_lists(lists, "*_main_binary-*_Packages*"):
        synopsis, _, body = descriptions.get(row.get("Description-md5", ""), "").partition("\n")
        source = row.get("Source", row["Package"]).split()[0]
        body = "\n".join("" if line.strip() == "." else line for line in body.splitlines()).strip()
        if synopsis and body:
            found.append(Package(row["Package"], source, row.get("Section", ""), synopsis.strip(), body))
    return sorted(found, key=lambda package: (sort_key(package.source), package.name))


def sort_key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def anonymize(package: Package) -> str:
    """Return the body with the package's name replaced: `fonts-…` and `python3-…` would give the section away."""
    return re.sub(rf"(?<![\w-]){re.escape(package.name)}(?![\w-])", "…", package.body, flags=re.IGNORECASE)


class Deduplicator:
    """Find near-duplicates among the texts added so far, by their three-word sequences."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Add `text` unless its sequences overlap (Jaccard) by ALIKE with those of an earlier text; return whether."""
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
    """Return conversations of the ten sections in turn, so that any range of them is balanced."""
    wanted = sum(PARTS.values()) // len(SECTIONS)
    seen = Deduplicator()
    sources: set[str] = set()
    taken: dict[str, list[dict[str, object]]] = {section: [] for section in SECTIONS}
    for package in found:
        here = taken.get(package.section)
        text = anonymize(package)
        if here is None or len(here) == wanted or package.source in sources or not BODY[0] <= len(text) <= BODY[1]:
            continue
        if seen.add(text):
            sources.add(package.source)
            here.append(conversation(ASKED_SECTION, [(text, package.section)]))
    short = {section: len(rows) for section, rows in taken.items() if len(rows) < wanted}
    if short:
        raise SystemExit(f"this archive has too few packages of {short}; {wanted} are needed")
    return [row for rows in zip(*taken.values(), strict=True) for row in rows]


def synopses(found: list[Package]) -> list[dict[str, object]]:
    """Return one conversation per source, in the order of `found`, of the packages with new descriptions."""
    turns: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen = Deduplicator()
    rows = 0
    for package in found:
        if package.source not in turns and rows == sum(SYNOPSES.values()):
            break
        if TURN[0] <= len(package.body) <= TURN[1] and seen.takes(package.body):
            rows += package.source not in turns
            turns[package.source].append((package.body, package.synopsis))
    return [conversation(ASKED_SYNOPSIS, pairs) for pairs in turns.values()]


def write_splits(rows: list[dict[str, object]], parts: dict[str, int], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Test and dev come first, so that they do not depend on the size of the training split.
    start = 0
    for name in ("test", "dev", "train"):
        part = rows[start : start + parts[name]]
        start += parts[name]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))


def describe_lengths(rows: list[dict[str, object]], tokenizer: str) -> str:
    import numpy as np
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    counts = np.array([len(tokens.apply_chat_template(row["messages"])["input_ids"]) for row in rows])
    padded = sum(int(batch.max()) * len(batch) for batch in np.split(counts, range(8, len(counts), 8)))
    marks = [1, 10, 25, 50, 75, 90, 99, 100]
    at = "  ".join(f"{mark}%: {int(value)}" for mark, value in zip(marks, np.percentile(counts, marks), strict=True))
    return f"tokens {counts.sum()}, mean {counts.mean():.0f}; {at}; padded in eights {padded / counts.sum():.2f} x"


def prepare(folder: Path = ROOT / "build" / "packages", tokenizer: str = "") -> Path:
    """Return `folder` with both tasks in it, made where they are missing or where `tokenizer` asks for lengths."""
    if (folder / "synopses" / "train.jsonl").is_file() and not tokenizer:
        return folder
    found = read_packages(fetch_lists(folder))
    tasks = {
        "sections": (sections(found), PARTS, folder),
        "synopses": (synopses(found), SYNOPSES, folder / "synopses"),
    }
    for name, (rows, parts, out) in tasks.items():
        write_splits(rows, parts, out)
        print(f"{name}: {parts} -> {out}", file=sys.stderr)
        if tokenizer:
            print("  " + describe_lengths(rows[-parts["train"] :], tokenizer))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "packages")
    parser.add_argument("--tokenizer", default="", help="a folder or name, to print the lengths of the conversations")
    given = parser.parse_args()
    print(prepare(given.out, given.tokenizer))


if __name__ == "__main__":
    main()
