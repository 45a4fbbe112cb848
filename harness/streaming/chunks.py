"""Run through tensors of any size in bounded memory, on as many threads as there are cores.

In: tensors, and a function from (tensor, chunk) to a small result. Out: the results per tensor, in
order, whatever the number of threads and of ranks. Memory: one buffer of `CHUNK_NBYTES` a side and
thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from harness.streaming.threads import Result
from harness.streaming.workers import ALL_CORES, Workers

CHUNK_NBYTES = 4 << 20
_Item = TypeVar("_Item", bound="Item")


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


@dataclass(frozen=True, slots=True)
class _Task(Generic[_Item]):
    """Chunks of about a chunk's size together."""

    parts: Sequence[_Part[_Item]]

    @property
    def nbytes(self) -> int:
        return sum(part.chunk.nbytes for part in self.parts)


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


def map_chunks(
    items: Sequence[_Item], function: Callable[[_Item, Chunk], Result], workers: Workers = ALL_CORES
) -> list[list[Result]]:
    """Apply `function` to every chunk of every item; returns the results per item, in order.

    The first exception ends the run and is raised here. The workers' progress advances; what to
    expect is known to the caller, who may have more to read.
    Function and items must be such as can be pickled, to be shared with other ranks.
    """
    units = list(_units(items))
    tasks = [_Task([_Part(items[index], chunk) for index, chunk in unit]) for unit in units]
    results: list[list[Result]] = [[] for _ in items]
    done = workers.map(partial(_apply, function), tasks)
    for unit, unit_results in zip(units, done, strict=True):
        for (index, _), result in zip(unit, unit_results, strict=True):
            results[index].append(result)
    return results


def _apply(function: Callable[[_Item, Chunk], Result], task: _Task[_Item]) -> list[Result]:
    return [function(part.item, part.chunk) for part in task.parts]


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
