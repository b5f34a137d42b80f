"""Find the real recordings and files that some tests read; those tests are skipped without them.

The environment variable MOWA_TEST_DATA names the folder; the default is `../shared/data` beside the repository.
"""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("MOWA_TEST_DATA") or REPOSITORY.parent / "shared" / "data")


def shared_data(name: str) -> Path:
    """Return the path of a file or folder in the test data, or skip the test if it is absent."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no test data {path}: set MOWA_TEST_DATA to the folder that holds {name}")
    return path
