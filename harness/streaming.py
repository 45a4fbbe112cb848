"""Run through tensors of any size in bounded memory, on as many threads as there are cores.

In: tensors, and a function from (tensor, chunk) to a small result. Out: the results per tensor, in
order, whatever the number of threads, and of ranks where a `Team` shares the work. Memory: one
buffer of `CHUNK_NBYTES` a side and thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from harness.ranks import current_team

CHUNK_NBYTES = 4 << 20
_Item = TypeVar("_Item", bound="Item")
_Result = TypeVar("_Result")


class Progress(Protocol):
    """Who watches bytes that are read, from any thread."""

    def expect(self, nbytes: int) -> None:
        """So many more will be read."""

    def advance(self, nbytes: int) -> None:
        """So many more were read."""


class Item(Protocol):
    """What is run through: a tensor, or several of one shape."""

    @property
    def nbytes(self) -> int: ...

    def part(self, chunk: Chunk) -> Self:
        """As much of it as another process needs for a chunk."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a tensor's logical bytes; `index` counts from 0."""

    index: int
    start: int
    nbytes: int


def chunks(nbytes: int) -> Iterator[Chunk]:
    """Cut logical bytes into chunks; an empty tensor has none."""
    for index, start in enumerate(range(0, nbytes, CHUNK_NBYTES)):
        yield Chunk(index, start, min(CHUNK_NBYTES, nbytes - start))


@dataclass(frozen=True, slots=True)
class _Part(Generic[_Item]):
    """A chunk of an item."""

    item: _Item
    chunk: Chunk

    def __reduce__(self) -> tuple[Any, ...]:
        return _Part, (self.item.part(self.chunk), self.chunk)


class Buffers(threading.local):
    """Scratch memory of the running thread, kept from chunk to chunk."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, str], np.ndarray[Any, np.dtype[Any]]] = {}

    def get(self, name: str, size: int, dtype: str = "|u1") -> np.ndarray[Any, np.dtype[Any]]:
        """Return an uninitialised array of `size` elements; the same memory for the same name."""
        array = self._arrays.get((name, dtype))
        if array is None or array.size < size:
            array = self._arrays[name, dtype] = np.empty(size, dtype)
        return array[:size]


buffers = Buffers()


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_chunks(
    items: Sequence[_Item],
    function: Callable[[_Item, Chunk], _Result],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> list[list[_Result]]:
    """Apply `function` to every chunk of every item; returns the results per item, in order.

    The first exception ends the run and is raised here. `jobs` defaults to the cores allowed.
    `progress` advances; what to expect is known to the caller, who may have more to read.
    Function and items must be such as can be pickled, to be shared with other ranks.
    """
    units = list(_units(items))
    tasks = [[_Part(items[index], chunk) for index, chunk in unit] for unit in units]

    def finished(task: Sequence[_Part[_Item]]) -> None:
        if progress is not None:
            progress.advance(sum(part.chunk.nbytes for part in task))

    results: list[list[_Result]] = [[] for _ in items]
    shared = share(partial(_apply, function), tasks, jobs=jobs, finished=finished)
    for unit, done in zip(units, shared, strict=True):
        for (index, _), result in zip(unit, done, strict=True):
            results[index].append(result)
    return results


def _apply(
    function: Callable[[_Item, Chunk], _Result], task: Sequence[_Part[_Item]]
) -> list[_Result]:
    return [function(part.item, part.chunk) for part in task]


def share(
    function: Callable[[Any], _Result],
    tasks: Sequence[Any],
    *,
    jobs: int | None = None,
    finished: Callable[[Any], None] | None = None,
) -> list[_Result]:
    """Map in order over tasks of about equal cost, on all threads of all ranks of the team.

    `finished` is called with each task that is done, from any thread.
    """
    team = current_team()
    if team is not None:
        return team.map(function, tasks, jobs=jobs, finished=finished)

    def run(task: Any) -> _Result:
        result = function(task)
        if finished is not None:
            finished(task)
        return result

    return parallel(run, tasks, jobs=jobs)


def parallel(
    function: Callable[[Any], _Result], tasks: Sequence[Any], *, jobs: int | None = None
) -> list[_Result]:
    """Map over threads in order; a single task, or a single job, runs on this one."""
    jobs = min(jobs or num_cores(), len(tasks))
    if jobs <= 1:
        return [function(task) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    left = deque(range(len(tasks)))

    def work() -> None:
        while (index := _pop(left)) is not None:
            results[index] = function(tasks[index])

    together([work] * jobs, stop=left.clear)
    return results


def _pop(left: deque[int]) -> int | None:
    try:
        return left.popleft()
    except IndexError:
        return None


def together(workers: Sequence[Callable[[], None]], *, stop: Callable[[], None]) -> None:
    """Run each on a thread of its own, the first one on this; `stop` tells all to end soon.

    The first exception stops all, and is raised when they have ended. A pool of threads takes a
    tenth longer for the same: it wakes a waiting thread for each task.
    """
    failures: list[BaseException] = []

    def run(worker: Callable[[], None]) -> None:
        try:
            worker()
        except BaseException as error:
            failures.append(error)
            stop()

    threads: list[threading.Thread] = []
    try:
        for worker in workers[1:]:
            thread = threading.Thread(target=run, args=(worker,), name="harness")
            thread.start()
            threads.append(thread)
        run(workers[0])
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt while this thread waits, or no thread to be had
        stop()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]


def _units(items: Sequence[_Item]) -> Iterator[list[tuple[int, Chunk]]]:
    """Group the chunks into tasks of about a chunk's size, so that small tensors cost little."""
    unit: list[tuple[int, Chunk]] = []
    nbytes = 0
    for index, item in enumerate(items):
        for chunk in chunks(item.nbytes):
            unit.append((index, chunk))
            nbytes += chunk.nbytes + 4096  # what a tensor costs beyond its bytes
            if nbytes >= CHUNK_NBYTES // 2:
                yield unit
                unit, nbytes = [], 0
    if unit:
        yield unit
