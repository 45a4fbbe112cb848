"""A process group whose other ranks do what rank 0 asks for, by torch.distributed's collectives.

In: a process group on CPU tensors (gloo). Out: on rank 0 a `Group` for `Workers`; every other rank
runs the worker loop until shutdown. Refused (TeamError): a rank that has died. Its connections are
closed then, and the next collective of every other rank fails, within a round of reading (a
second or two).

Memory: a rank keeps the results of `_MOST` tasks of about 4 MiB each (a few MB of sketches).
"""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from harness.errors import HarnessError, TeamError
from harness.streaming.threads import Result, num_cores
from harness.streaming.workers import Task, Workers

# A round of reading ends with a collective, where a rank is missed: tasks for each rank, and the
# time from which on they become fewer.
_LEAST, _MOST, _SECONDS = 16, 256, 1.0
_MAX_SENT_NBYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class _Shutdown:
    value: Any


class Ranks:
    """A process group, as one rank has it: rank 0 leads, the others run the worker loop."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()
        self.is_broken = False

    def broadcast(self, value: Any = None) -> Any:
        """Return on every rank what rank 0 gives; raises TeamError."""
        values = [value]
        with self.collective():
            dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def gather(self, value: Any = None) -> list[Any]:
        """Return the values of all ranks, on rank 0; raises TeamError, and an error among them."""
        values: list[Any] = [None] * self.size
        with self.collective():
            dist.gather_object(
                value, values if self.rank == 0 else None, group=self._group, group_dst=0
            )
        for rank, error in enumerate(values):
            if isinstance(error, HarnessError):
                raise type(error)(f"rank {self.name_of(rank)}: {error}", hint=error.hint) from error
        return values

    def name_of(self, rank: int) -> int:
        """What a rank of the group is to a person: its number among all."""
        return dist.get_process_group_ranks(self._group)[rank]

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Whatever ends a collective early leaves the ranks where no other can follow."""
        try:
            yield
        except BaseException as error:
            self.is_broken = True
            if not isinstance(error, RuntimeError):
                raise
            said = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]  # gloo adds a page
            raise TeamError(
                f"rank {dist.get_rank()} of {dist.get_world_size()} lost another rank: "
                f"{said[:200]}",
                hint="see what the other ranks printed last, and whether one ran out of memory",
            ) from error

    def work(self, do: Callable[[Any], object]) -> Any:
        """The worker loop: do what rank 0 asks for until it shuts down; returns, or raises, why."""
        while not isinstance(asked := self.broadcast(), _Shutdown):
            do(asked)
        if isinstance(asked.value, HarnessError):
            raise asked.value
        return asked.value

    def shutdown(self, value: Any = None) -> None:
        """End the worker loops of the other ranks, which return or raise this."""
        if not self.is_broken:
            self.broadcast(_Shutdown(value))

    def map(
        self, function: Callable[[Any], Result], tasks: Sequence[Task], workers: Workers
    ) -> list[Result]:
        """See `harness.streaming.workers.Group`."""
        results: list[Result] = []
        each = _LEAST
        while len(results) < len(tasks):
            started, done = time.monotonic(), len(results)
            results += self._round(function, tasks[done : done + each * self.size], workers)
            if time.monotonic() - started < _SECONDS:
                each = min(_MOST, 2 * each)
            else:
                each = max(1, each // 2)
        return results

    def _round(
        self, function: Callable[[Any], Result], tasks: Sequence[Task], workers: Workers
    ) -> list[Result]:
        owners = _owners(tasks, self.size)
        shares: list[list[bytes]] = [[] for _ in range(self.size)]
        nbytes = 0
        for index, owner in enumerate(owners):
            try:
                if owner and nbytes > _MAX_SENT_NBYTES:  # kept values of a golden
                    owners[index] = 0
                elif owner:
                    shares[owner].append(pickle.dumps(tasks[index]))
                    nbytes += len(shares[owner][-1])
            except (TypeError, AttributeError, pickle.PicklingError):
                owners[index] = 0  # it is of this process alone: memory, inflated data
        self.broadcast((function, shares, workers.jobs))
        own, failure = [task for task, owner in zip(tasks, owners, strict=True) if owner == 0], None
        results: list[Any] = []
        try:
            results = replace(workers, jobs=_jobs(workers.jobs), group=None).map(function, own)
        except BaseException as error:  # the others must get rid of their results before
            failure = error
        _, *others = self.gather()
        if failure is not None:
            raise failure
        workers.advance(sum(t.nbytes for t, owner in zip(tasks, owners, strict=True) if owner))
        in_order = [iter(some) for some in (results, *others)]
        return [next(in_order[owner]) for owner in owners]

    def do_share(self, asked: tuple[Callable[[Any], Any], list[list[bytes]], int | None]) -> None:
        """What a rank does in the worker loop for `map` on rank 0."""
        function, shares, jobs = asked

        def results() -> list[Any]:
            tasks = [pickle.loads(task) for task in shares[self.rank]]
            return Workers(jobs=_jobs(jobs)).map(function, tasks)

        self.gather(attempt(results))


def attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or the HarnessError that it raises; others may not be picklable."""
    try:
        return function()
    except HarnessError as error:
        return error
    except Exception as error:
        return unexpected(error)


def unexpected(error: BaseException) -> TeamError:
    """Any other exception, for other ranks."""
    return TeamError(f"{type(error).__name__}: {error}", hint="run with one rank for a traceback")


def _owners(tasks: Sequence[Task], size: int) -> list[int]:
    """The rank of each task: runs of about equal bytes."""
    sizes = [task.nbytes + 1 for task in tasks]
    total, before, owners = sum(sizes), 0, []
    for nbytes in sizes:
        owners.append((2 * before + nbytes) * size // (2 * total))
        before += nbytes
    return owners


def _jobs(jobs: int | None) -> int:
    """Threads of a rank: by default the ranks on one machine share its cores."""
    return jobs or max(1, num_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
