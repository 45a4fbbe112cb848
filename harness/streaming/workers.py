"""Who does the work, and who watches it: made once by a verb, handed down to what reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.streaming.threads import Result, parallel


class Progress(Protocol):
    """Who watches bytes that are read, from any thread."""

    def expect(self, nbytes: int) -> None:
        """So many more will be read."""

    def advance(self, nbytes: int) -> None:
        """So many more were read."""


class Task(Protocol):
    """Work that can be pickled, or stays in this process."""

    @property
    def nbytes(self) -> int:
        """Bytes that it reads."""


class Group(Protocol):
    """The ranks of a process group, as rank 0 has them."""

    def map(
        self, function: Callable[[Any], Result], tasks: Sequence[Task], workers: Workers
    ) -> list[Result]:
        """Map in order over tasks, each on any rank; raises the first error of all, TeamError too.

        `workers` do the share of rank 0, which includes what cannot be pickled.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """`jobs` threads, by default one for each core allowed, on all ranks of `group`.

    `progress` is advanced here, on rank 0, by what all of them have read.
    """

    jobs: int | None = None
    progress: Progress | None = None
    group: Group | None = None

    def map(self, function: Callable[[Any], Result], tasks: Sequence[Task]) -> list[Result]:
        """Map in order over tasks; the first exception ends the run, and is raised here."""
        if self.group is not None and len(tasks) > 1:
            return self.group.map(function, tasks, self)

        def run(task: Task) -> Result:
            result = function(task)
            self.advance(task.nbytes)
            return result

        return parallel(run, tasks, jobs=self.jobs)

    def expect(self, nbytes: int) -> None:
        """Announce bytes that will be read."""
        if self.progress is not None:
            self.progress.expect(nbytes)

    def advance(self, nbytes: int) -> None:
        """Report bytes that were read."""
        if self.progress is not None:
            self.progress.advance(nbytes)


ALL_CORES = Workers()
