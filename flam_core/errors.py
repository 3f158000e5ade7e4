"""The errors flam reports to people, each with the exit code its program ends with.

A message says what is wrong, where, why, and what to do about it, in one line. Exit codes: 0 ok, 2 settings,
3 environment, 4 data, 5 training failed, 6 refused by the gate, 75 stopped and resumable (``EX_TEMPFAIL``).
"""

import json


class FlamError(Exception):
    """An error with a cause a person can act on. Programs print it as one line and end with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        """`what` names the thing, the place and the cause; `fix` says what to do."""
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}. {self.fix}" if self.fix else self.what

    def __reduce__(self) -> tuple[object, ...]:
        # Ray carries errors between processes by pickling; keyword arguments would be lost by the default.
        return (_rebuild, (type(self), self.what, self.fix))


def _rebuild(cls: type[FlamError], what: str, fix: str) -> FlamError:
    return cls(what, fix=fix)


class SettingsError(FlamError):
    """A setting that cannot work: unknown recipe, sizes that do not fit, a resume with other settings."""

    exit_code = 2


class EnvironmentFault(FlamError):
    """Something outside flam is missing: no cluster, no bucket, no MLflow server, no credentials."""

    exit_code = 3


class DataError(FlamError):
    """Data that cannot be used: an empty folder, a broken shard, clips that are too short."""

    exit_code = 4


class TrainingFailed(FlamError):
    """Training ended without a model: workers died too often or the loss is not finite."""

    exit_code = 5


class Refused(FlamError):
    """A decision that went against what was asked for: a candidate that is not shown to be better."""

    exit_code = 6


class Stopped(FlamError):
    """Training was stopped on request and goes on with the same command."""

    exit_code = 75


def pack(error: FlamError) -> str:
    """The error as text, for where Ray or a bucket would make something else of it. `unpack` is the inverse."""
    return json.dumps([type(error).__name__, error.what, error.fix])


def unpack(text: str) -> FlamError:
    """The error that `pack` was given."""
    kind, what, fix = json.loads(text)
    kinds = {one.__name__: one for one in (SettingsError, EnvironmentFault, DataError, TrainingFailed, Stopped)}
    return kinds.get(kind, TrainingFailed)(what, fix=fix)
