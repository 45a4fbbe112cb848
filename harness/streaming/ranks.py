"""Several processes on one run: the first of them leads, the others do what it asks them.

In: a `Team` (that of torch.distributed is in `harness.model.team`). Out: which team shares the work
at the moment. Only the first rank runs a command: it alone decides, writes and prints, and spreads
the reading over all (`harness.streaming.chunks.share`). On the others there is no team.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Team(Protocol):
    """The ranks that a leading process may ask for work."""

    def map(
        self,
        function: Callable[[Any], Result],
        tasks: Sequence[Any],
        *,
        jobs: int | None = None,
        finished: Callable[[Any], None] | None = None,
    ) -> list[Result]:
        """Call a function with every task, each on any rank; the results are in order, here.

        What cannot be pickled stays here. `finished` is called here with each task that is done,
        from any thread. The first exception of all ranks ends the run and is raised here;
        TeamError where a rank has died.
        """


_team: Team | None = None


def current_team() -> Team | None:
    """The team that this process leads; None where it works alone."""
    return _team


@contextmanager
def working_as(team: Team) -> Iterator[None]:
    """Share the work inside among the team, whose other ranks serve."""
    global _team
    before, _team = _team, team
    try:
        yield
    finally:
        _team = before
