"""What a fine-tuning run learns from and is measured on: read, sifted, and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mowa.data.manifests import examples as sources
from mowa.data.quality import filter
from mowa.errors import DataError, RecipeError
from mowa.tasks.ctc import build_vocabulary
from mowa.training.config.ctc import CTCData, CTCRecipe, DataSource
from mowa.types import Example, Vocabulary

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class CTCSplits:
    """Sifted recordings. `dev` and `test` by name, names that begin with replay are of what the checkpoint was good at.

    `notes` say what was left out and why, and `leak` what train and dev have in common.
    """

    train: list[tuple[list[Example], float]]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    vocabulary: Vocabulary
    notes: tuple[str, ...]
    overlap: filter.Overlap


def load_splits(
    recipe: CTCRecipe, vocabulary: Vocabulary | None, num_frames: Callable[[float], int], cache_dir: Path
) -> CTCSplits:
    """Everything that `plan.data` names. `words` is what the checkpoint's head says; `frames(seconds)` how many it has.

    DataError where nothing is left to learn from or to measure on.
    """
    data, texts = recipe.data, not recipe.uses_teacher  # a teacher needs none
    train = [(_read(part, cache_dir, texts), part.share) for part in data.train]
    dev = {name: _read(part, cache_dir) for name, part in name_sources(data.dev, "dev").items()}
    test = {name: _read(part, cache_dir) for name, part in name_sources(data.test, "test").items()}
    if not dev:
        train, dev = _held_out(train, data, recipe.optimizer.seed)
    said = _build_vocabulary(recipe, vocabulary, [example.text for examples, _ in train for example in examples])
    replay = {name: _read(part, cache_dir) for name, part in name_sources(data.replay, "replay").items()}
    if replay and recipe.vocabulary == "new":
        raise RecipeError(
            "data: replay: a head with a new vocabulary cannot be asked what the old one knew; leave it out"
        )
    rules = filter.FilterConfig(data.min_duration_s, data.max_duration_s, data.oov, data.char_map)
    notes: list[str] = []

    def sifted(name: str, examples: Sequence[Example]) -> list[Example]:
        wordless = [
            e for e in examples if not (texts or e.text) and data.min_duration_s <= e.duration_s <= data.max_duration_s
        ]
        spoken = [e for e in examples if texts or e.text]
        result = filter.filter_examples(spoken, rules, characters=said.tokens, num_frames=num_frames)
        notes.append(f"{name}\n{result.summary()}" + (f"\nwithout a text {len(wordless)}" if wordless else ""))
        if not (result.kept or wordless):
            raise DataError(f"{name}: none of the {len(examples)} recordings can be learnt from\n{result.summary()}")
        return [*result.kept, *wordless]

    learnt = [(sifted(part.path, examples), share) for part, (examples, share) in zip(data.train, train, strict=True)]
    watched = {
        name: subsample(sifted(name, examples), data.max_eval_samples) for name, examples in (dev | replay).items()
    }
    measured = {name: sifted(name, examples) for name, examples in test.items()}
    everything = [example for examples, _ in learnt for example in examples]
    unseen = [example for name, examples in (watched | measured).items() for example in examples]
    return CTCSplits(learnt, watched, measured, said, tuple(notes), filter.measure_overlap(everything, unseen))


def _read(part: DataSource, cache: Path, texts: bool = True) -> list[Example]:
    return list(sources.read_examples(part.path, part.split, cache_dir=cache, require_text=texts))


def name_sources(sources: Sequence[DataSource], kind: str) -> dict[str, DataSource]:
    """One part is called by its kind, several by their files' names too."""
    if len(sources) == 1:
        return {kind: sources[0]}
    names: dict[str, DataSource] = {}
    for part in sources:
        name = f"{kind}-{part.split or Path(part.path).stem}"
        while name in names:
            name += "+"
        names[name] = part
    return names


def _held_out(
    train: list[tuple[list[Example], float]], data: CTCData, seed: int
) -> tuple[list[tuple[list[Example], float]], dict[str, list[Example]]]:
    kept, taken = [], list[Example]()
    for examples, share in train:
        learnt, measured = filter.split_held_out(examples, data.hold_out, seed)
        kept.append((list(learnt), share))
        taken.extend(measured)
    if not taken:
        raise DataError("no recordings to measure on: give data.dev, or hold out more (data.hold_out)")
    return kept, {"dev": taken}


def _build_vocabulary(plan: CTCRecipe, words: Vocabulary | None, texts: Sequence[str]) -> Vocabulary:
    """The vocabulary of the head to be: the checkpoint's, one of the texts' letters, or both."""
    if plan.vocabulary == "keep":
        if words is None:
            raise RecipeError(f"{plan.model} has no head yet, so there is none to keep: vocabulary: new")
        return words
    letters = filter.build_alphabet(texts, char_map=plan.data.char_map)
    if not letters:
        raise DataError("the training texts have no letters to make a vocabulary of")
    if plan.vocabulary == "new" or words is None:
        return build_vocabulary(letters)
    known = {token.casefold() for token in words.tokens}
    return replace(words, tokens=(*words.tokens, *(letter for letter in letters if letter.casefold() not in known)))


def subsample(items: list[Item], max_samples: int) -> list[Item]:
    """The same `most` of them every time."""
    if not max_samples or len(items) <= max_samples:
        return items
    chosen = np.random.default_rng(0).permutation(len(items))[:max_samples]
    return [items[index] for index in sorted(chosen)]
