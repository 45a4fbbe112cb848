"""`torchrun … -m harness verify …`: the command on the ranks that a launcher has started.

In: the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; LOCAL_WORLD_SIZE where
several ranks share a machine), which may also be set by hand, mpirun or srun. Out: the exit code of
this rank: that of the command on rank 0, which alone runs it; 0 on the others. Refused (TeamError,
UsageError): ranks that do not come, and ranks that were started with another command.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

import torch.distributed as dist

from harness.checkpoint.sources.urls import redacted
from harness.errors import TeamError, UsageError
from harness.model.distributed.team import ARRIVAL, TorchTeam, watched
from harness.streaming.ranks import working_as
from harness.version import __version__


def run_on_ranks(command: Callable[[], int], arguments: Sequence[str]) -> int:
    """Run a command on rank 0, with the help of all others; returns this rank's exit code."""
    with _joined() as team:
        gc.freeze()  # else each search for cycles looks through all that torch brought, for 0.1 s
        if team.rank > 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when it ends
            team.send(0, _started(arguments))
            # What is asked for, while rank 0 gets ready.
            import_module("harness.comparison.measuring")
            team.serve()
            return 0
        try:
            with _ended_by_sigterm(team):
                _refuse_others(team, arguments)
                with working_as(team):
                    return command()
        finally:
            team.dismiss()


@contextmanager
def _joined() -> Iterator[TorchTeam]:
    try:
        with watched():
            dist.init_process_group("gloo", timeout=ARRIVAL)
    except (RuntimeError, ValueError) as error:  # not all came; the environment makes no sense
        raise TeamError(
            f"the {os.environ['WORLD_SIZE']} ranks cannot meet at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).partition(chr(10))[0][:200]}",
            hint="start all of them, with the same MASTER_ADDR and MASTER_PORT; "
            "unset WORLD_SIZE to run alone",
        ) from error
    group = dist.group.WORLD
    assert group is not None
    try:
        yield TorchTeam(group)
    finally:
        dist.destroy_process_group()


def _started(arguments: Sequence[str]) -> tuple[str, ...]:
    return __version__, *arguments


def _refuse_others(team: TorchTeam, arguments: Sequence[str]) -> None:
    """All arguments but rank 0's would be ignored: that another command was meant is an error."""
    started = {rank: team.receive(rank) for rank in range(1, team.size)}
    for rank, theirs in started.items():
        if theirs != _started(arguments):
            there, here = (redacted(" ".join(words)) for words in (theirs[1:], arguments))
            raise UsageError(
                f"rank {rank} runs `harness {there}` of version {theirs[0]}, "
                f"rank 0 `harness {here}` of version {__version__}",
                hint="start all ranks with the same command",
            )


@contextmanager
def _ended_by_sigterm(team: TorchTeam) -> Iterator[None]:
    """torchrun ends all ranks by SIGTERM when one has failed: say so, in place of dying."""

    def end(*_: object) -> None:
        if not team.has_lost_a_rank:  # else that is being said
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise_ended()

    def raise_ended() -> NoReturn:
        raise TeamError(
            "ended by SIGTERM, which torchrun sends when another rank has failed",
            hint="see what the other ranks printed last",
        )

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
