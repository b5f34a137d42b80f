"""Leave unreadable recordings out of a CTC fine-tuning run before it starts, and report errors of its data loader.

The recordings that the run will read are decoded once; a short run does not read all of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mowa import hardware
from mowa.data.quality.unreadable import RecordingKey, UnreadableRecordings, find_unreadable, recording_key
from mowa.errors import MowaError, TrainingStopped
from mowa.io.atomic import atomic_write
from mowa.training.config.ctc import CTCRecipe
from mowa.training.ctc.batches import plan_batches
from mowa.training.ctc.dataset import CTCSplits
from mowa.training.run_dir import resume_hint
from mowa.training.trainer_args import plan_options
from mowa.types import Example

REPORT_FILE = "unreadable.jsonl"  # in the output folder: set, id, file and error of each recording that is left out
_KILLED = re.compile(r"DataLoader worker .*(?:is killed by signal: ([^.]+)|exited unexpectedly)")


def plan(recipe: CTCRecipe, train: Sequence[tuple[Sequence[Example], float]]) -> list[list[Example]]:
    """Return the batches of the whole run."""
    return plan_batches(train, max_seconds=recipe.batch.seconds, **plan_options(recipe))


def keep_readable(recipe: CTCRecipe, data: CTCSplits, rate_hz: int) -> CTCSplits:
    """Return `data` without the recordings that cannot be read to their end, with a note for each set that had some.

    Raises:
        DataError: none is left of a set, or more are unreadable than `data.max_unreadable` allows.
    """
    in_train = {number: examples for number, (examples, _) in enumerate(data.train)}
    sets: dict[Any, list[Example]] = {**in_train, **data.dev, **data.test}
    decoded, errors = set[RecordingKey](), dict[RecordingKey, str]()
    kept, fresh = sets, [example for name in data.dev | data.test for example in sets[name]]
    while True:
        decoded |= set(map(recording_key, fresh))
        errors |= _decode(fresh, rate_hz)
        kept = {key: [one for one in examples if recording_key(one) not in errors] for key, examples in sets.items()}
        reports = {}
        for key, examples in sets.items():
            seen = [example for example in examples if recording_key(example) in decoded]
            missing = data.unreadable.get(key) or UnreadableRecordings(str(key), 0)  # none for a held-out dev set
            reports[key] = missing.add(seen, errors)
            reports[key].require_few(recipe.data.max_unreadable, len(kept[key]))
        train = [(kept[number], share) for number, (_, share) in enumerate(data.train)]
        # without the unreadable recordings, the plan may have others
        planned = (example for batch in plan(recipe, train) for example in batch)
        if not (fresh := [example for example in planned if recording_key(example) not in decoded]):
            break
    return replace(
        data,
        train=train,
        dev={name: kept[name] for name in data.dev},
        test={name: kept[name] for name in data.test},
        notes=data.notes + tuple(f"{one.name}\n{one.summary()}" for one in reports.values() if one.errors),
        unreadable=reports,
    )


def write_report(data: CTCSplits, output_dir: Path) -> None:
    """Write a line for each recording that is left out to `output_dir`/unreadable.jsonl; delete an old report."""
    rows = [
        {"set": one.name, "id": id_, "file": file, "error": error}
        for one in data.unreadable.values()
        for id_, file, error in one.errors
    ]
    if rows:
        output_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(output_dir / REPORT_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        (output_dir / REPORT_FILE).unlink(missing_ok=True)


def _decode(examples: Sequence[Example], rate_hz: int) -> Mapping[RecordingKey, str]:
    """Return the errors of `find_unreadable`, with all cores and a progress bar in a terminal."""
    total_s = sum(example.duration_s for example in {recording_key(one): one for one in examples}.values())
    label = "checking recordings {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(total=total_s, disable=None, leave=False, bar_format=label, file=sys.stderr) as bar:
        return find_unreadable(examples, rate_hz, threads=hardware.cpu_count(), on_progress=bar.update)


@contextmanager
def one_line_errors(output_dir: Path) -> Iterator[None]:
    """Turn the error of a data loader's process, which has a traceback in its message, into one line.

    Raises:
        MowaError: of the same type, with its own message; TrainingStopped if the process was killed.
    """
    try:
        yield
    except MowaError as error:
        if "Original Traceback" not in str(error):
            raise
        message = str(error).strip().splitlines()[-1].partition(": ")[2]
        raise type(error)(f"{message.rstrip('.')}; {resume_hint(output_dir)}") from None
    except RuntimeError as error:
        if not (found := _KILLED.search(str(error))):
            raise
        reason = f" ({found[1]})" if found[1] else ""
        raise TrainingStopped(
            f"a process that loads recordings was killed{reason}, perhaps for lack of memory; {resume_hint(output_dir)}"
        ) from None
