"""Several processes on one run: what they must be able to do for the work to be shared.

In: a `Team` (that of torch.distributed is in `harness.model.team`). Out: which of them shares the
work at the moment. All ranks run the same code on the same tensors; only the chunks are split
(`harness.streaming`), and only the first rank writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from harness.errors import HarnessError

_Result = TypeVar("_Result")


class Team(Protocol):
    """Processes that run the same code on the same tensors, and split the chunks."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def exchange(self, compute: Callable[[], _Result]) -> list[_Result]:
        """Call `compute` on every rank; return the results of all, by rank, on all.

        Where it raises on one rank, all of them raise that.
        """

    def agree(self, error: HarnessError) -> HarnessError:
        """Tell the others of an error, unless it came by `exchange`; they are in one, too."""


_team: Team | None = None


def current_team() -> Team | None:
    """The team that shares the work at the moment; None where this process is alone."""
    return _team


@contextmanager
def working_as(team: Team) -> Iterator[None]:
    """Share the work inside among the team, all ranks calling alike."""
    global _team
    before, _team = _team, team
    try:
        yield
    finally:
        _team = before


def agreed(error: HarnessError) -> HarnessError:
    """The error that all ranks see where this one, or another, has met `error`."""
    return error if _team is None else _team.agree(error)


def by_leader(function: Callable[[], _Result]) -> _Result | None:
    """Call a function that writes, on the first rank only; all ranks raise what it raises."""
    team = _team
    if team is None:
        return function()
    return team.exchange(lambda: function() if team.rank == 0 else None)[0]
