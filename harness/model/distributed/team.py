"""A team over torch.distributed: the first rank leads, the others serve it until it is done.

In: a process group on CPU tensors (gloo). Out: a `Team` for the rank that leads. Each other rank is
stateless: it gets a function and tasks, opens the files that they name, and sends the results
back. Refused: a file that another rank sees otherwise (CheckpointError); a rank that dies ends the
run with a `TeamError`, at once, as its connections close.

Memory: the leader keeps all results, as it does alone; another rank those of `_MAX_BATCH` tasks
(of one chunk each, about 2 MB of sketches). Waiting costs no processor time.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from harness.checkpoint.sources.access import open_source
from harness.checkpoint.sources.blocks import RemoteSource
from harness.checkpoint.sources.files import FileSource
from harness.checkpoint.sources.paths import to_path
from harness.checkpoint.sources.source import RangeSource, Stat
from harness.errors import CheckpointError, HarnessError, TeamError
from harness.streaming.threads import num_cores, parallel, together

_Result = TypeVar("_Result")

# All ranks must come within this time; they may then wait for each other as long as it takes: that
# one has died is noticed by its connections, that its machine is gone by their silence.
ARRIVAL = timedelta(minutes=5)
PATIENCE = timedelta(days=30)
SILENCE_SECONDS = 60
_KEEPALIVE = {
    getattr(socket, name): value
    for name, value in {
        "TCP_KEEPIDLE": SILENCE_SECONDS // 2,
        "TCP_KEEPALIVE": SILENCE_SECONDS // 2,  # its name on macOS
        "TCP_KEEPINTVL": SILENCE_SECONDS // 12,
        "TCP_KEEPCNT": 6,
    }.items()
    if hasattr(socket, name)
}
_LAST_WORD = timedelta(seconds=10)
_MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Work:
    """Tasks for one rank, each pickled for itself."""

    function: Callable[[Any], Any]
    tasks: Sequence[bytes]
    jobs: int | None


@dataclass(frozen=True, slots=True)
class _Answer:
    results: Sequence[Any] = ()
    error: HarnessError | None = None


class TorchTeam:
    """The ranks of a process group; the one of rank 0 leads by `map` and `dismiss`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.has_lost_a_rank = False

    def map(
        self,
        function: Callable[[Any], _Result],
        tasks: Sequence[Any],
        *,
        jobs: int | None = None,
        finished: Callable[[Any], None] | None = None,
    ) -> list[_Result]:
        """See `harness.ranks.Team`."""
        run = _Run(function, tasks, self.size, jobs, finished)
        jobs = jobs or num_cores_of_rank()
        here = [run.work_here] * max(1, min(jobs, len(tasks)))
        there = [partial(run.work_there, self, rank) for rank in range(1, self.size)]
        together([*here, *there], stop=run.stop)
        parallel(run.work_on, run.unsent, jobs=jobs)
        return run.results

    def answer(self, rank: int) -> Sequence[Any]:
        """Wait for what a rank has made of its work; raises what it raises, under its name."""
        answer: _Answer = self.receive(rank)
        if answer.error is not None:
            error = answer.error
            name = name_of(self._group, rank)
            raise type(error)(f"rank {name}: {error}", hint=error.hint) from error
        return answer.results

    def serve(self) -> Any:
        """Do what the leader asks until it dismisses this rank; returns, or raises, its word."""
        while isinstance(message := self.receive(0), _Work):
            self.send(0, _answer(message))
        if isinstance(message, HarnessError):
            raise message
        return message

    def dismiss(self, word: Any = None) -> None:
        """Tell the other ranks that there is no more work: their `serve` returns, or raises, this.

        Those that are dead, or do not listen, are passed over.
        """
        for rank in range(1, self.size):
            with suppress(TeamError):
                self.send(rank, word, patience=_LAST_WORD)

    def send(self, rank: int, value: Any, patience: timedelta = PATIENCE) -> None:
        self.begin_to_send(rank, value)(patience)

    def begin_to_send(self, rank: int, value: Any) -> Callable[[timedelta], None]:
        """Send what the rank may receive later; call what this returns to wait until it has."""
        data = _pickled(value)
        parts = torch.tensor([len(data)]), torch.frombuffer(data, dtype=torch.uint8)
        try:  # with the tensors, whose memory is read until then
            sending = [(part, self._group.send([part], rank, 0)) for part in parts]
        except RuntimeError as error:
            self._lose(rank, error)

        def wait(patience: timedelta) -> None:
            try:
                for _, sent in sending:
                    sent.wait(patience)
            except RuntimeError as error:
                self._lose(rank, error)

        return wait

    def receive(self, rank: int) -> Any:
        size = torch.empty(1, dtype=torch.int64)
        try:
            self._group.recv([size], rank, 0).wait(PATIENCE)
            data = bytearray(int(size))
            self._group.recv([torch.frombuffer(data, dtype=torch.uint8)], rank, 0).wait(PATIENCE)
        except RuntimeError as error:
            self._lose(rank, error)
        return pickle.loads(data)

    def _lose(self, rank: int, error: RuntimeError) -> NoReturn:
        """gloo raises RuntimeError for a connection that was closed or reset, and for a timeout."""
        self.has_lost_a_rank = True
        raise died(self._group, rank) from error


def name_of(group: dist.ProcessGroup, rank: int) -> int:
    """What a rank of a group is to a person: its number among all."""
    return dist.get_process_group_ranks(group)[rank]


def died(group: dist.ProcessGroup, rank: int) -> TeamError:
    name = name_of(group, rank)
    return TeamError(
        f"rank {name} of {dist.get_world_size()} has died",
        hint=f"see what rank {name} printed last, and whether it ran out of memory",
    )


@contextmanager
def watched() -> Iterator[None]:
    """Have the kernel end the connections made inside once the other machine is silent.

    A process that dies closes its own. A machine that loses power or its network does not, and
    gloo, which has no heartbeat, would wait for it. Ranks that are slow or stopped are not silent.
    """
    before = _sockets()
    yield
    for descriptor in _sockets() - before:
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _sockets() -> set[int]:
    """The descriptors of this process that are sockets; none where the system does not tell."""
    found = set()
    with suppress(OSError):
        for entry in Path("/dev/fd").iterdir():
            with suppress(OSError):  # that of the listing itself is closed by now
                if stat.S_ISSOCK(os.fstat(int(entry.name)).st_mode):
                    found.add(int(entry.name))
    return found


def num_cores_of_rank() -> int:
    """The cores that one of the ranks on this machine may use, shared evenly among them."""
    return max(1, num_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class _Run:
    """One `map` at work: which tasks are left, for all threads that take them."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        size: int,
        jobs: int | None,
        finished: Callable[[Any], None] | None,
    ) -> None:
        self.function, self.tasks, self.jobs = function, tasks, jobs
        self.finished = finished or (lambda task: None)
        self.results: list[Any] = [None] * len(tasks)
        self.unsent: list[int] = []
        self._size, self._next, self._lock = size, 0, threading.Lock()

    def work_here(self) -> None:
        while taken := self._take(1):
            self.work_on(taken[0])

    def work_on(self, index: int) -> None:
        self.results[index] = self.function(self.tasks[index])
        self.finished(self.tasks[index])

    def work_there(self, team: TorchTeam, rank: int) -> None:
        """Have another rank work on batches that shrink towards the end, so that all end alike.

        It has the next batch before it has answered: it need not wait while both sides pickle.
        """
        asked: deque[tuple[list[int], Callable[[timedelta], None]]] = deque()

        def keep_answer() -> None:
            indices, wait = asked.popleft()
            wait(PATIENCE)
            for index, result in zip(indices, team.answer(rank), strict=True):
                self.results[index] = result
                self.finished(self.tasks[index])

        try:
            while taken := self._take(_MAX_BATCH):
                if sent := self._pickled(taken):
                    work = _Work(self.function, [*sent.values()], self.jobs)
                    asked.append(([*sent], team.begin_to_send(rank, work)))
                if len(asked) > 1:
                    keep_answer()
        finally:  # whatever happens here, no rank is left in the middle
            while asked:
                keep_answer()

    def _pickled(self, indices: Iterable[int]) -> dict[int, bytes]:
        """The tasks that another process can take over; the others are kept for the end."""
        pickled = {}
        for index in indices:
            try:
                pickled[index] = _pickled(self.tasks[index]).tobytes()
            except (TypeError, AttributeError, pickle.PicklingError):
                self.unsent.append(index)  # it is of this process alone: memory, inflated data
        return pickled

    def stop(self) -> None:
        with self._lock:
            self._next = len(self.tasks)

    def _take(self, most: int) -> range:
        with self._lock:
            left = len(self.tasks) - self._next
            taken = range(self._next, self._next + min(most, -(-left // (2 * self._size))))
            self._next = taken.stop
        return taken


def _answer(work: _Work) -> _Answer:
    try:
        tasks = [pickle.loads(task) for task in work.tasks]
        jobs = work.jobs or num_cores_of_rank()
        return _Answer(results=parallel(work.function, tasks, jobs=jobs))
    except HarnessError as error:
        return _Answer(error=error)
    except Exception as error:
        return _Answer(error=unexpected(error))


def unexpected(error: BaseException) -> TeamError:
    """Any other exception, which may not survive the way to another process."""
    return TeamError(f"{type(error).__name__}: {error}", hint="run with one rank for a traceback")


class _Pickler(pickle.Pickler):
    """Pickles what refers to open files; another rank opens them by their names."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is FileSource or type(value) is RemoteSource:
            path = value.path
            return _opened, (str(path) if isinstance(path, Path) else path.url, value.stat)
        if type(value) is RangeSource:
            value.locate()  # how is known here alone
        return NotImplemented


def _pickled(value: Any) -> memoryview:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getbuffer()


@lru_cache(maxsize=4096)
def _opened(name: str, stat: Stat) -> FileSource | RemoteSource:
    """Open a file or URL as the leader has it; raises CheckpointError where it is another one."""
    path = to_path(name)
    source = open_source(path)
    if source.stat != stat:
        raise CheckpointError(
            f"{path}: was replaced, or is another file here: has {source.stat}, but rank 0 "
            f"sees {stat}",
            hint="all ranks must see the same files: wait until they are written and the shared "
            "storage agrees, then run again",
        )
    return source
