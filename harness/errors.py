"""The errors of the harness: every one says what, where, both sides, and the one next step.

    HarnessError
    ├── CheckpointError    a checkpoint cannot be read, or is not what it claims to be
    │   └── NoSection      it has not the part that is asked for
    ├── GoldenError        a golden is missing, exists already, or cannot be read
    ├── ModelError         the code under test cannot be built, loaded or run
    │   ├── NotRecorded    the golden does not hold what a stage compares with
    │   └── NotInstalled   what it takes is not installed (also an ImportError)
    ├── UsageError         options that do not fit together or fit no tensor
    ├── TeamError          another process of the same run has died, or failed unexpectedly
    └── GoldenMismatch     a comparison failed (also an AssertionError); only raised on request

`str(error)` is the message; `error.hint` is the next step, one command or sentence, which a
traceback shows below the message.
"""

from __future__ import annotations

from typing import Any


class HarnessError(Exception):
    """Base of all errors that the harness raises on purpose."""

    kind = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"next: {hint}")


class CheckpointError(HarnessError):
    """A checkpoint cannot be read, or is not what it claims to be."""

    kind = "checkpoint"


class NoSection(CheckpointError):  # noqa: N818 - reads as what is the case
    """A checkpoint has not the part that is asked for, or none that is its state dict.

    `sections` are those of its parts that may be meant.
    """

    sections: tuple[str, ...] = ()


class GoldenError(HarnessError):
    """A golden is missing, exists already, or cannot be read."""

    kind = "golden"


class ModelError(HarnessError):
    """The code under test cannot be built, loaded or run."""

    kind = "model"


class NotRecorded(ModelError):  # noqa: N818 - reads as what is the case
    """The golden does not hold what a stage compares with; an update records it."""


class NotInstalled(ModelError, ImportError):  # noqa: N818 - reads as what is the case
    """A package that only the live side takes is not installed."""


class UsageError(HarnessError):
    """Options that do not fit together, or that fit no tensor."""

    kind = "usage"


class TeamError(HarnessError):
    """Another process of the same run has died, or failed in an unexpected way."""

    kind = "team"


class GoldenMismatch(HarnessError, AssertionError):  # noqa: N818 - reads as what happened
    """A comparison found differences, or could not decide; `str()` is the text report.

    `comparison` is the `Comparison`; None on a rank that has only heard of it.
    """

    kind = "mismatch"

    def __init__(
        self, message: str, *, hint: str | None = None, comparison: Any | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.comparison = comparison
