"""Exceptions that mowa raises for faults a user can correct; each message says what happened and what to do.

    MowaError
    ├── AudioError              a recording that cannot be read, is empty, too short or damaged
    ├── ModelError              a model that cannot be found, loaded or used for the task
    │   ├── UnknownModel            no alias, Hub id or folder has this name
    │   └── HubUnreachable          a Hub id was given and the Hub cannot be reached
    ├── DataError               a manifest, folder or text that cannot be used
    ├── RecipeError             a training recipe with a wrong key or value
    ├── TrainingStopped         training was stopped because it could not succeed
    └── MissingDependency       an optional package or program is not installed

The command line prints the message and exits with status 2; `--debug` shows the traceback.
"""

from __future__ import annotations


class MowaError(Exception):
    """Base class. Any other exception that reaches the user is a bug in mowa."""


class AudioError(MowaError):
    """A recording that cannot be read, is empty, too short or damaged."""


class ModelError(MowaError):
    """A model that cannot be found, loaded or used for the task."""


class UnknownModel(ModelError):
    """No alias, Hub id or folder has this name."""


class HubUnreachable(ModelError):
    """A Hub id was given, the Hub cannot be reached and no copy is cached."""


class DataError(MowaError):
    """A manifest, folder or text that cannot be used."""


class RecipeError(MowaError):
    """A training recipe with a wrong key or value."""


class TrainingStopped(MowaError):
    """Training was stopped because it could not succeed, such as a loss that is not a number."""


class MissingDependency(MowaError):
    """An optional package or program is not installed; the message names the pip extra."""
