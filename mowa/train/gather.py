"""What a fine-tuning run learns from and is measured on: read, sifted, and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mowa.data import sift, sources
from mowa.errors import DataError, RecipeError
from mowa.nouns import Example, Vocabulary
from mowa.tasks.ctc import vocabulary
from mowa.train.tuning import Data, Part, Tuning

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Gathered:
    """Sifted recordings. `dev` and `test` by name, names that begin with replay are of what the checkpoint was good at.

    `notes` say what was left out and why, and `leak` what train and dev have in common.
    """

    train: list[tuple[list[Example], float]]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    words: Vocabulary
    notes: tuple[str, ...]
    leak: sift.Overlap


def gather(plan: Tuning, words: Vocabulary | None, frames: Callable[[float], int], cache: Path) -> Gathered:
    """Everything that `plan.data` names. `words` is what the checkpoint's head says; `frames(seconds)` how many it has.

    DataError where nothing is left to learn from or to measure on.
    """
    data, texts = plan.data, not plan.taught  # a teacher needs none
    train = [(_read(part, cache, texts), part.share) for part in data.train]
    dev = {name: _read(part, cache) for name, part in named(data.dev, "dev").items()}
    test = {name: _read(part, cache) for name, part in named(data.test, "test").items()}
    if not dev:
        train, dev = _held_out(train, data, plan.optimise.seed)
    said = _words(plan, words, [example.text for examples, _ in train for example in examples])
    replay = {name: _read(part, cache) for name, part in named(data.replay, "replay").items()}
    if replay and plan.vocabulary == "new":
        raise RecipeError(
            "data: replay: a head with a new vocabulary cannot be asked what the old one knew; leave it out"
        )
    rules = sift.Rules(data.shortest_s, data.longest_s, data.strange, data.letters)
    notes: list[str] = []

    def sifted(name: str, examples: Sequence[Example]) -> list[Example]:
        wordless = [e for e in examples if not (texts or e.text) and data.shortest_s <= e.duration_s <= data.longest_s]
        spoken = [e for e in examples if texts or e.text]
        result = sift.sift(spoken, rules, tokens=said.tokens, frames=frames)
        notes.append(f"{name}\n{result.table()}" + (f"\nwithout a text {len(wordless)}" if wordless else ""))
        if not (result.kept or wordless):
            raise DataError(f"{name}: none of the {len(examples)} recordings can be learnt from\n{result.table()}")
        return [*result.kept, *wordless]

    learnt = [(sifted(part.path, examples), share) for part, (examples, share) in zip(data.train, train, strict=True)]
    watched = {name: some(sifted(name, examples), data.measured) for name, examples in (dev | replay).items()}
    measured = {name: sifted(name, examples) for name, examples in test.items()}
    everything = [example for examples, _ in learnt for example in examples]
    unseen = [example for name, examples in (watched | measured).items() for example in examples]
    return Gathered(learnt, watched, measured, said, tuple(notes), sift.overlap(everything, unseen))


def _read(part: Part, cache: Path, texts: bool = True) -> list[Example]:
    return list(sources.read(part.path, part.split, cache=cache, texts=texts))


def named(parts: Sequence[Part], kind: str) -> dict[str, Part]:
    """One part is called by its kind, several by their files' names too."""
    if len(parts) == 1:
        return {kind: parts[0]}
    names: dict[str, Part] = {}
    for part in parts:
        name = f"{kind}-{part.split or Path(part.path).stem}"
        while name in names:
            name += "+"
        names[name] = part
    return names


def _held_out(
    train: list[tuple[list[Example], float]], data: Data, seed: int
) -> tuple[list[tuple[list[Example], float]], dict[str, list[Example]]]:
    kept, taken = [], list[Example]()
    for examples, share in train:
        learnt, measured = sift.hold_out(examples, data.hold_out, seed)
        kept.append((list(learnt), share))
        taken.extend(measured)
    if not taken:
        raise DataError("no recordings to measure on: give data.dev, or hold out more (data.hold_out)")
    return kept, {"dev": taken}


def _words(plan: Tuning, words: Vocabulary | None, texts: Sequence[str]) -> Vocabulary:
    """The vocabulary of the head to be: the checkpoint's, one of the texts' letters, or both."""
    if plan.vocabulary == "keep":
        if words is None:
            raise RecipeError(f"{plan.model} has no head yet, so there is none to keep: vocabulary: new")
        return words
    letters = sift.alphabet(texts, letters=plan.data.letters)
    if not letters:
        raise DataError("the training texts have no letters to make a vocabulary of")
    if plan.vocabulary == "new" or words is None:
        return vocabulary(letters)
    known = {token.casefold() for token in words.tokens}
    return replace(words, tokens=(*words.tokens, *(letter for letter in letters if letter.casefold() not in known)))


def some(examples: list[Item], most: int) -> list[Item]:
    """The same `most` of them every time."""
    if not most or len(examples) <= most:
        return examples
    chosen = np.random.default_rng(0).permutation(len(examples))[:most]
    return [examples[index] for index in sorted(chosen)]
