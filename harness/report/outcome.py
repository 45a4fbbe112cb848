"""What a run of `verify`, `diff` or `roundtrip` came to: the one value that every report shows.

In: comparisons by stage, or the error that stands in their place. Out: frozen `Outcome`s, one per
golden, and a `Result` of them all with the process's exit code. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.comparison.comparison import Comparison
from harness.errors import HarnessError

Command = Literal["verify", "diff", "roundtrip"]
_WORST_FIRST = (2, 1, 3, 0)


def worst(codes: Iterable[int]) -> int:
    """The exit code that stands for several: could not be checked, differs, undecided, passes."""
    return min(codes, key=_WORST_FIRST.index, default=0)


def worst_stage(stages: Sequence[Comparison]) -> Comparison | None:
    """The first of the stages whose exit code is the worst."""
    code = worst(stage.exit_code for stage in stages)
    return next((stage for stage in stages if stage.exit_code == code), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one golden, or one pair of checkpoints, came to.

    `expected` and `actual` name the two sides (`actual` is None where it was never found out);
    `stages` are in the order in which they ran; `error` is what ended them early; `updated` is
    None unless an update was asked for, else whether the golden's file changed; `next_steps` are
    lines that a person can follow.
    """

    expected: str | None
    actual: str | None
    stages: tuple[Comparison, ...] = ()
    error: HarnessError | None = None
    updated: bool | None = None
    next_steps: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        if self.error is not None:
            return 2
        return worst(stage.exit_code for stage in self.stages if not self.accepts(stage))

    def accepts(self, stage: Comparison) -> bool:
        """Whether an update made what a stage found the new golden.

        It holds the file and the outputs, but not what the code makes of the file.
        """
        return self.updated is not None and stage.can_be_recorded


@dataclass(frozen=True, kw_only=True)
class Result:
    """All outcomes of one command."""

    command: Command
    outcomes: tuple[Outcome, ...]

    def title(self, outcome: Outcome) -> str:
        """The name of an outcome: the same in every run of the same command."""
        if self.command == "diff":
            return f"{outcome.expected} and {outcome.actual}"
        return outcome.expected or outcome.actual or "no golden"

    @property
    def exit_code(self) -> int:
        return worst(outcome.exit_code for outcome in self.outcomes)
