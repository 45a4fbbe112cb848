"""Ranks of torch.distributed that do what rank 0 asks for; `torchrun … -m harness verify …`.

In: torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), by whatever set them; or a
process group on CPU tensors. Out: on rank 0 a `Group` for `Workers`; every other rank runs the
worker loop until shutdown. Refused (TeamError, UsageError): ranks that do not come, that run
another command, or have died: their connections are closed then, and the next collective fails,
within a round of reading. Memory: a rank keeps the results of one round (a few MB of sketches).
"""

from __future__ import annotations

import gc
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch.distributed as dist

from harness.checkpoint.sources.urls import redacted
from harness.errors import HarnessError, TeamError, UsageError
from harness.streaming.threads import Result
from harness.streaming.workers import Task, Workers
from harness.version import __version__

# All ranks must come within the first; they may then wait as long as rank 0 works alone, on the
# live stages.
ARRIVAL, TIMEOUT = timedelta(minutes=5), timedelta(hours=24)
# Of a round, which ends with a collective: what a rank reads, and what is sent to all.
_ROUND_NBYTES, _ROUND_TASKS, _MAX_SENT_NBYTES = 128 << 20, 1024, 32 << 20
_SEE_OTHERS = "see what the other ranks printed last"


class Ranks:
    """A process group, as one rank has it: rank 0 leads, the others run the worker loop."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()
        self.names = dist.get_process_group_ranks(group)  # among all ranks
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
            into = values if self.rank == 0 else None
            dist.gather_object(value, into, group=self._group, group_dst=0)
        for rank, error in zip(self.names, values, strict=True):
            if isinstance(error, HarnessError):
                raise type(error)(f"rank {rank}: {error}", hint=error.hint) from error
        return values

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
                f"rank {dist.get_rank()} of {dist.get_world_size()} lost another rank: {said:.200}",
                hint=f"{_SEE_OTHERS}, and whether one ran out of memory",
            ) from error

    def work(self, do: Callable[[Any], object]) -> Any:
        """Do what rank 0 asks for until it shuts down; returns, or raises, what it gave."""
        while (asked := self.broadcast())[0] == "do":
            do(asked[1])
        return raised(asked[1])

    def shutdown(self, value: Any = None) -> None:
        """End the worker loops of the other ranks, which return or raise this."""
        if not self.is_broken:
            self.broadcast(("end", value))

    def map(
        self, function: Callable[[Any], Result], tasks: Sequence[Task], workers: Workers
    ) -> list[Result]:
        """See `harness.streaming.workers.Group`."""
        results: list[Result] = []
        while tasks:
            sums = accumulate(task.nbytes for task in tasks[: self.size * _ROUND_TASKS])
            count = max(1, sum(1 for nbytes in sums if nbytes <= self.size * _ROUND_NBYTES))
            results += self._round(function, tasks[:count], workers)
            tasks = tasks[count:]
        return results

    def _round(
        self, function: Callable[[Any], Result], tasks: Sequence[Task], workers: Workers
    ) -> list[Result]:
        owners, nbytes = _owners(tasks, self.size), 0
        shares: list[list[bytes]] = [[] for _ in range(self.size)]
        for index, owner in enumerate(owners):
            owners[index] = 0
            if owner and nbytes < _MAX_SENT_NBYTES:
                # What is of this process alone, as memory and inflated data, stays here.
                with suppress(TypeError, AttributeError, pickle.PicklingError):
                    shares[owner].append(pickle.dumps(tasks[index]))
                    owners[index] = owner
                    nbytes += len(shares[owner][-1])
        self.broadcast(("do", (function, shares, workers.jobs)))
        own = [task for task, owner in zip(tasks, owners, strict=True) if owner == 0]
        try:
            mine = replace(workers, group=None).map(function, own)
        finally:  # the others must get rid of their results
            _, *others = self.gather()
        workers.advance(sum(t.nbytes for t, owner in zip(tasks, owners, strict=True) if owner))
        in_order = [iter(some) for some in (mine, *others)]
        return [next(in_order[owner]) for owner in owners]

    def do_share(self, asked: tuple[Callable[[Any], Any], list[list[bytes]], int | None]) -> None:
        """What a rank does in the worker loop for `map` on rank 0."""
        function, shares, jobs = asked
        run = Workers(jobs=jobs).map
        self.gather(attempt(lambda: run(function, [*map(pickle.loads, shares[self.rank])])))


def attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or the error that it raises, as other ranks can have it."""
    try:
        return function()
    except HarnessError as error:
        return error
    except Exception as error:  # which may not be picklable
        found = TeamError(
            f"{type(error).__name__}: {error}", hint="run with one rank for a traceback"
        )
        found.__cause__ = error
        return found


def raised(value: Any) -> Any:
    """Return a value, or raise it where it is an error."""
    if isinstance(value, HarnessError):
        raise value
    return value


def _owners(tasks: Sequence[Task], size: int) -> list[int]:
    """The rank of each task: runs of about equal bytes."""
    sizes = [task.nbytes + 1 for task in tasks]
    ends = [*accumulate(sizes)]
    return [(2 * end - n) * size // (2 * ends[-1]) for end, n in zip(ends, sizes, strict=True)]


def run_on_ranks(command: Callable[[Ranks], int], arguments: Sequence[str]) -> int:
    """Run a command on rank 0, with the help of all others; returns this rank's exit code.

    That is 0 on the others, and 2 when a rank has died.
    """
    ranks, started = _meet(), (__version__, *arguments)
    gc.freeze()  # else each search for cycles looks through all that torch brought, for 0.1 s
    try:
        if ranks.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when it ends
            ranks.gather(started)
            ranks.work(ranks.do_share)
            return 0
        _end_by_sigterm(ranks)
        try:
            _check_same_command(ranks.gather(started))
            return command(ranks)
        finally:
            ranks.shutdown()
    finally:
        dist.destroy_process_group()


def _meet() -> Ranks:
    """Wait for all ranks; raises TeamError."""
    try:
        dist.init_process_group("gloo", timeout=ARRIVAL)
        return Ranks(dist.new_group(backend="gloo", timeout=TIMEOUT))
    except (RuntimeError, ValueError) as error:  # not all came; the environment makes no sense
        size, *address = map(os.environ.get, ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        why = str(error).partition("\n")[0]
        raise TeamError(
            f"the {size} ranks cannot connect at {':'.join(map(str, address))}: {why:.200}",
            hint="start all of them, with the same MASTER_ADDR and MASTER_PORT; "
            "unset WORLD_SIZE to run alone",
        ) from error


def _check_same_command(started: Sequence[Any]) -> None:
    """All arguments but rank 0's would be ignored: that another command was meant is an error."""
    said = [f"`harness {redacted(' '.join(words))}` of version {v}" for v, *words in started]
    for rank, other in enumerate(started):
        if other != started[0]:
            raise UsageError(
                f"rank {rank} runs {said[rank]}, rank 0 {said[0]}",
                hint="start all ranks with the same command",
            )


def _end_by_sigterm(ranks: Ranks) -> None:
    """torchrun ends all ranks by SIGTERM when one has failed: say so, in place of dying."""

    def end(*_: object) -> None:
        if not ranks.is_broken:  # else that is being said
            ranks.is_broken = True
            raise TeamError(
                "ended by SIGTERM, which torchrun sends when another rank has failed",
                hint=_SEE_OTHERS,
            )

    signal.signal(signal.SIGTERM, end)
