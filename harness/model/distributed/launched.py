"""`torchrun … -m harness verify …`: the command on the ranks that a launcher has started.

In: the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; LOCAL_WORLD_SIZE where
several ranks share a machine), which may also be set by hand, mpirun or srun. Out: the exit code of
this rank: that of the command on rank 0, which alone runs it; 0 on the others, or 2 when one has
died. Refused (TeamError, UsageError): ranks that do not come, and ranks that were started with
another command.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch.distributed as dist

from harness.checkpoint.sources.urls import redacted
from harness.errors import TeamError, UsageError
from harness.model.distributed.group import Ranks
from harness.version import __version__

# All ranks must come within the first; they may then wait as long as rank 0 works alone, on the
# live stages. A rank that dies is noticed by its connections.
ARRIVAL = timedelta(minutes=5)
TIMEOUT = timedelta(hours=24)


def run_on_ranks(command: Callable[[Ranks], int], arguments: Sequence[str]) -> int:
    """Run a command on rank 0, with the help of all others; returns this rank's exit code."""
    ranks = _meet()
    gc.freeze()  # else each search for cycles looks through all that torch brought, for 0.1 s
    try:
        if ranks.rank == 0:
            return _lead(ranks, command, arguments)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when it ends
        ranks.gather((__version__, *arguments))
        import_module("harness.comparison.measuring")  # needed soon; rank 0 is getting ready
        ranks.work(ranks.do_share)
        return 0
    finally:
        dist.destroy_process_group()


def _lead(ranks: Ranks, command: Callable[[Ranks], int], arguments: Sequence[str]) -> int:
    try:
        with _ended_by_sigterm(ranks):
            _check_same_command(ranks.gather((__version__, *arguments)))
            return command(ranks)
    finally:
        ranks.shutdown()


def _meet() -> Ranks:
    """Wait for all ranks; raises TeamError."""
    try:
        dist.init_process_group("gloo", timeout=ARRIVAL)
        return Ranks(dist.new_group(backend="gloo", timeout=TIMEOUT))
    except (RuntimeError, ValueError) as error:  # not all came; the environment makes no sense
        raise TeamError(
            f"the {os.environ['WORLD_SIZE']} ranks cannot connect at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).partition(chr(10))[0][:200]}",
            hint="start all of them, with the same MASTER_ADDR and MASTER_PORT; "
            "unset WORLD_SIZE to run alone",
        ) from error


def _check_same_command(started: Sequence[Any]) -> None:
    """All arguments but rank 0's would be ignored: that another command was meant is an error."""
    expected, *others = started
    for rank, actual in enumerate(others, start=1):
        if actual != expected:
            there, here = (redacted(" ".join(words[1:])) for words in (actual, expected))
            raise UsageError(
                f"rank {rank} runs `harness {there}` of version {actual[0]}, "
                f"rank 0 `harness {here}` of version {expected[0]}",
                hint="start all ranks with the same command",
            )


@contextmanager
def _ended_by_sigterm(ranks: Ranks) -> Iterator[None]:
    """torchrun ends all ranks by SIGTERM when one has failed: say so, in place of dying."""

    def end(*_: object) -> None:
        if not ranks.is_broken:  # else that is being said
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ranks.is_broken = True
            raise TeamError(
                "ended by SIGTERM, which torchrun sends when another rank has failed",
                hint="see what the other ranks printed last",
            )

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
