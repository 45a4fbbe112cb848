"""The team of torch.distributed: `torchrun … -m harness verify …` splits the reading among ranks.

In: torchrun's environment, or a process group that is there already. Out: a `Team`, through which
every rank gets what every rank found. Refused: nothing; a rank that fails ends all of them with its
error, and one that dies with a `TeamError`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from harness.errors import HarnessError, TeamError
from harness.ranks import working_as

_Result = TypeVar("_Result")
# Ranks wait for the slowest, which may read terabytes; that one has died is noticed at once.
_TIMEOUT = timedelta(days=1)


class TorchTeam:
    """The ranks of a torch.distributed process group (the default one without `group`)."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._has_failed = False
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def exchange(self, compute: Callable[[], _Result]) -> list[_Result]:
        mine: tuple[_Result | None, Exception | None]
        try:
            mine = (compute(), None)
        except Exception as error:
            mine = (None, error if isinstance(error, HarnessError) else _described(error))
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, mine, group=self._group)
        except RuntimeError as error:  # what gloo and nccl raise for a lost connection
            self._has_failed = True
            raise TeamError(
                f"rank {self.rank} of {self.size}: another rank has died: "
                f"{str(error).partition(chr(10))[0][:200]}",
                hint="see what that rank printed last, or whether it ran out of memory",
            ) from error
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                self._has_failed = True
                if rank != self.rank:
                    failure.args = (f"rank {rank}: {failure}",)
                raise failure
        return [result for result, _ in found]

    def agree(self, error: HarnessError) -> HarnessError:
        def fail() -> NoReturn:
            raise error

        if not self._has_failed:
            try:
                self.exchange(fail)
            except HarnessError as first:
                error = first
        self._has_failed = False
        return error


def _described(error: Exception) -> TeamError:
    """Any other exception, which may not survive the way to another process."""
    return TeamError(f"{type(error).__name__}: {error}", hint="run with one rank for a traceback")


@contextmanager
def team_of_torchrun() -> Iterator[None]:
    """Join the ranks that torchrun started. Only rank 0 prints.

    All leave together, since torchrun ends the others as soon as one has left with an error.
    """
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    team = TorchTeam()
    if team.rank == 0:
        signal.signal(signal.SIGTERM, _terminated)
    else:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        with working_as(team):
            yield
    finally:
        sys.stdout.flush()
        with suppress(RuntimeError):  # the dead do not come
            dist.barrier()
        dist.destroy_process_group()


def _terminated(*_: object) -> NoReturn:
    print("error: ended by SIGTERM: another rank has failed or died", file=sys.stderr)  # noqa: T201
    print("  next: see what that rank printed last", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(2)
