"""Everything that can go wrong and is the user's to mend. Each message says what happened and what to do.

    MowaError
    ├── AudioError       a recording that cannot be read, is empty, too short or damaged
    ├── ModelError       a model that cannot be found, read or used for the task
    │   ├── UnknownModel     no alias, hub id or folder answers to the name
    │   └── HubUnreachable   a hub id was named and the hub cannot be reached
    ├── DataError        a manifest, folder or text that cannot be used
    ├── RecipeError      a training recipe with a wrong key or value
    ├── TrainingStopped  a run that would only waste time was ended; what to try is said
    └── MissingPart      an optional package or program is not installed

The command line prints the message on one line and exits with 2; `--debug` shows the traceback.
"""

from __future__ import annotations


class MowaError(Exception):
    """The root: a message for people. Anything else that escapes is a bug of ours."""


class AudioError(MowaError):
    pass


class ModelError(MowaError):
    pass


class UnknownModel(ModelError):
    pass


class HubUnreachable(ModelError):
    pass


class DataError(MowaError):
    pass


class RecipeError(MowaError):
    pass


class TrainingStopped(MowaError):
    pass


class MissingDependency(MowaError):
    pass
