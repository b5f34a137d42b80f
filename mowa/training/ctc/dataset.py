"""Read, filter and split the recordings of a CTC fine-tuning run, and build its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mowa.data.quality.filter import (
    FilterConfig,
    Overlap,
    filter_examples,
    measure_overlap,
    split_held_out,
)
from mowa.data.quality.unreadable import UnreadableRecordings, read_available
from mowa.data.text.alphabet import build_alphabet, find_missing_tokens
from mowa.decode.word_breaks import writes_spaces
from mowa.errors import DataError, RecipeError
from mowa.tasks.ctc import build_vocabulary
from mowa.training.config.ctc import CTCData, CTCRecipe
from mowa.training.config.shared import DataSource
from mowa.training.sources import name_sources, subsample
from mowa.types import Example, Vocabulary


@dataclass(frozen=True, slots=True)
class CTCSplits:
    """Filtered recordings; `dev` and `test` by name. Dev sets whose names begin with replay are for forgetting.

    `notes` say what was left out and why; `overlap` is what train shares with dev and test. `unreadable` has the
    recordings of each source of train, and of the dev and test sets by name, that are missing or have no valid header.
    """

    train: list[tuple[list[Example], float]]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    vocabulary: Vocabulary
    notes: tuple[str, ...]
    overlap: Overlap
    unreadable: Mapping[int | str, UnreadableRecordings] = field(default_factory=dict)


def load_splits(
    recipe: CTCRecipe, vocabulary: Vocabulary | None, num_frames: Callable[[float], int], cache_dir: Path
) -> CTCSplits:
    """Read the recordings that the recipe's `data` section names.

    Args:
        recipe: the recipe.
        vocabulary: vocabulary of the checkpoint's head; None: it has no head.
        num_frames: function from seconds to output frames.
        cache_dir: folder for audio extracted from archives.

    Raises:
        DataError: no recording is left to train or evaluate on, or too many are unreadable (`data.max_unreadable`).
        RecipeError: the recipe asks for a vocabulary or replay set that the checkpoint cannot have.
    """
    data, need_texts = recipe.data, not recipe.uses_teacher
    unreadable: dict[int | str, UnreadableRecordings] = {}

    def read(key: int | str, source: DataSource, require_text: bool = True) -> list[Example]:
        name = source.path if isinstance(key, int) else key
        examples, unreadable[key] = read_available(
            source.path, source.split, name=name, cache_dir=cache_dir, require_text=require_text
        )
        unreadable[key].require_few(data.max_unreadable, len(examples))
        return examples

    train = [(read(number, source, need_texts), source.share) for number, source in enumerate(data.train)]
    dev = {name: read(name, source) for name, source in name_sources(data.dev, "dev").items()}
    test = {name: read(name, source) for name, source in name_sources(data.test, "test").items()}
    if not dev:
        train, dev = _hold_out(train, data, recipe.optimizer.seed)
    texts = [example.text for examples, _ in train for example in examples]
    target_vocabulary = _resolve_vocabulary(recipe, vocabulary, texts)
    replay = {name: read(name, source) for name, source in name_sources(data.replay, "replay").items()}
    if replay and recipe.vocabulary == "new":
        raise RecipeError("data: replay: a head with vocabulary: new cannot be evaluated on old data; leave it out")
    notes: list[str] = []

    def keep_usable(name: str, examples: Sequence[Example]) -> list[Example]:
        kept, found = _keep_usable(name, examples, recipe, target_vocabulary, num_frames)
        notes.extend(found)
        return kept

    kept = [
        (keep_usable(source.path, examples), share) for source, (examples, share) in zip(data.train, train, strict=True)
    ]
    dev_sets = {
        name: subsample(keep_usable(name, examples), data.max_eval_samples) for name, examples in (dev | replay).items()
    }
    test_sets = {name: keep_usable(name, examples) for name, examples in test.items()}
    trained = [example for examples, _ in kept for example in examples]
    evaluated = [example for examples in (dev_sets | test_sets).values() for example in examples]
    overlap = measure_overlap(trained, evaluated)
    return CTCSplits(kept, dev_sets, test_sets, target_vocabulary, tuple(notes), overlap, unreadable)


def _keep_usable(
    name: str,
    examples: Sequence[Example],
    recipe: CTCRecipe,
    vocabulary: Vocabulary,
    num_frames: Callable[[float], int],
) -> tuple[list[Example], list[str]]:
    """Return the recordings of a data set that can be used, and notes. Raises DataError if there are none."""
    data, need_texts, phonemes = recipe.data, not recipe.uses_teacher, bool(vocabulary.separator)
    untranscribed = [
        example
        for example in examples
        if not (need_texts or example.text) and data.min_duration_s <= example.duration_s <= data.max_duration_s
    ]
    transcribed = [example for example in examples if need_texts or example.text]
    rules = FilterConfig(data.min_duration_s, data.max_duration_s, data.oov, data.char_map)
    result = filter_examples(transcribed, rules, vocabulary=vocabulary, num_frames=num_frames)
    without = f"\nwithout a text {len(untranscribed)}" if untranscribed else ""
    notes = [f"{name}\n{result.summary()}{without}"]
    if not (result.kept or untranscribed):
        hint = "\nthe model outputs phonemes: separate those of the texts by spaces" if phonemes else ""
        raise DataError(f"{name}: none of the {len(examples)} recordings is usable\n{result.summary()}{hint}")
    if not phonemes and not writes_spaces(vocabulary) and any(" " in one.text for one in result.kept):
        notes.append(f"{name}\nthe vocabulary has no word delimiter: texts are trained without their spaces")
    return [*result.kept, *untranscribed], notes


def _hold_out(
    train: list[tuple[list[Example], float]], data: CTCData, seed: int
) -> tuple[list[tuple[list[Example], float]], dict[str, list[Example]]]:
    """Take `data.hold_out` of every source as a dev set."""
    kept, held_out = [], list[Example]()
    for examples, share in train:
        rest, taken = split_held_out(examples, data.hold_out, seed)
        kept.append((list(rest), share))
        held_out.extend(taken)
    if not held_out:
        raise DataError("no recordings to evaluate on: set data.dev, or a larger data.hold_out")
    return kept, {"dev": held_out}


def _resolve_vocabulary(recipe: CTCRecipe, vocabulary: Vocabulary | None, texts: Sequence[str]) -> Vocabulary:
    """Return the vocabulary of the head to train: the checkpoint's, one of the texts' characters, or both."""
    if recipe.vocabulary == "keep":
        if vocabulary is None:
            raise RecipeError(f"{recipe.model} has no CTC head, so vocabulary: keep is impossible; use vocabulary: new")
        return vocabulary
    if recipe.vocabulary == "new" or vocabulary is None:
        characters = build_alphabet(texts, char_map=recipe.data.char_map)
        if not characters:
            raise DataError("the training texts contain no characters to build a vocabulary from")
        return build_vocabulary(characters)
    added = find_missing_tokens(texts, vocabulary, recipe.data.char_map)
    return replace(vocabulary, tokens=(*vocabulary.tokens, *added))
