"""Tensors seen in another way: other dims, ranges and orders, and several as one.

In: tensors that can be read. Out: views that read what the other way of seeing makes of them, and
their digests. Nothing is copied; memory: a chunk a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from blake3 import blake3

from harness.checkpoint.dtypes import Array, DType
from harness.checkpoint.tensors import Tensor
from harness.fingerprints.arithmetic import as_floats
from harness.fingerprints.fingerprint import digest_of
from harness.streaming.chunks import Chunk, buffers, chunks
from harness.streaming.threads import parallel
from harness.streaming.workers import ALL_CORES, Workers

_MAX_HELD_NBYTES = 64 << 20
# Of a transpose so many columns are copied at a time, a cache line of float32: three to six times
# as fast as all at once.
_COLUMNS = 16


class View(Protocol):
    """Logical bytes of a dtype that can be read from any place."""

    @property
    def dtype(self) -> DType: ...
    @property
    def nbytes(self) -> int: ...
    def read_into(self, start: int, buffer: memoryview) -> None: ...


def digest_as(
    view: View, dtype: DType, shape: tuple[int, ...], workers: Workers = ALL_CORES
) -> bytes:
    """The digest of the view's bytes as a tensor of this dtype and shape."""

    def of_chunk(chunk: Chunk) -> bytes:
        data = buffers.get("chunk", chunk.nbytes)
        view.read_into(chunk.start, data.data)
        return blake3(data.data).digest()

    return digest_of(dtype, shape, parallel(of_chunk, [*chunks(view.nbytes)], jobs=workers.jobs))


@dataclass(frozen=True)
class Held:
    """A tensor with its dims in any order, of a storage whose bytes are in memory."""

    words: Array
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.words.size * self.dtype.itemsize

    def read_into(self, start: int, buffer: memoryview) -> None:
        width = self.nbytes // self.words.shape[0]
        first, last = start // width, -(-(start + len(buffer)) // width)
        words = self.words[first:last]
        found = buffers.get("rows", words.size, words.dtype.str).reshape(words.shape)
        step = _COLUMNS if words.strides[-1] > words.itemsize else words.shape[-1]
        for column in range(0, words.shape[-1], step):
            found[..., column : column + step] = words[..., column : column + step]
        begin = start - first * width
        buffer[:] = found.reshape(-1).view("|u1")[begin : begin + len(buffer)].data


class Memory:
    """The range of a storage that was read last: views of it that are not contiguous follow."""

    def __init__(self) -> None:
        self._range: tuple[object, int, int] = None, 0, 0
        self._data = np.empty(0, "|u1")

    def at_hand(self, view: View) -> View:
        """The same view, of bytes in memory where it is no run of them: element by element a file
        takes longer."""
        if not isinstance(view, Tensor) or view.is_contiguous or view.conjugate or view.negative:
            return view
        itemsize, strides = view.dtype.itemsize, strides_of(view)
        reach = 1 + sum((n - 1) * s for n, s in zip(view.shape, strides, strict=True))
        if itemsize not in (1, 2, 4, 8) or min(strides) < 0 or reach * itemsize > _MAX_HELD_NBYTES:
            return view
        where = view.storage, view.offset, reach
        if where != self._range:
            self._range = None, 0, 0
            if self._data.size < reach * itemsize:
                self._data = np.empty(reach * itemsize, "|u1")
            data = self._data[: reach * itemsize]
            replace(view, shape=(reach,), strides=None).read_into(0, data.data)
            self._range = where
        words = self._data[: reach * itemsize].view(f"<u{itemsize}")
        steps = [stride * itemsize for stride in strides]
        seen = np.lib.stride_tricks.as_strided(words, view.shape, steps, writeable=False)
        return Held(seen, view.dtype)


def are_same(one: View, other: View) -> bool:
    """Whether two views of as many bytes have the same, read as far as they agree."""
    start, step = 0, 1 << 14
    while start < one.nbytes:
        count = min(step, one.nbytes - start)
        sides = buffers.get("one", count), buffers.get("other", count)
        for view, data in zip((one, other), sides, strict=True):
            view.read_into(start, data.data)
        if not np.array_equal(*sides):
            return False
        start, step = start + count, 1 << 20
    return True


def sample(view: View, numel: int, *, runs: int) -> Array:
    """Read up to `numel` values in runs that are spread over all of a view, as float64."""
    there = view.nbytes // view.dtype.itemsize
    if there <= numel:
        return wide_of(view, 0, numel)
    starts = [(there - numel // runs) * place // (runs - 1) for place in range(runs)]
    return np.concatenate([wide_of(view, start, numel // runs) for start in starts])


def wide_of(view: View, first: int, numel: int) -> Array:
    """Read up to `numel` values from one on, as float64."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return floats_of(view, first, numel, "wide").astype("<f8")


def floats_of(view: View, first: int, numel: int, name: str) -> Array:
    """Read up to `numel` values from one on, as `as_floats`, in scratch of this name."""
    start = first * view.dtype.itemsize
    data = buffers.get(name, min(numel * view.dtype.itemsize, view.nbytes - start))
    view.read_into(start, data.data)
    return as_floats(data, view.dtype, f"{name} floats")


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """The strides in elements, also of a contiguous tensor."""
    if tensor.strides is not None:
        return tensor.strides
    return tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))


def permuted(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The tensor with its dims in another order, as `torch.permute`."""
    strides = strides_of(tensor)
    return replace(
        tensor,
        shape=tuple(tensor.shape[axis] for axis in axes),
        strides=tuple(strides[axis] for axis in axes),
    )


def narrowed(tensor: Tensor, axis: int, start: int, stop: int, step: int = 1) -> Tensor:
    """A range of one dim, as slicing."""
    strides = list(strides_of(tensor))
    offset = tensor.offset + start * strides[axis]
    shape = list(tensor.shape)
    shape[axis], strides[axis] = len(range(start, stop, step)), strides[axis] * step
    return replace(tensor, shape=tuple(shape), strides=tuple(strides), offset=offset)


def selected(tensor: Tensor, axis: int, index: int) -> Tensor:
    """One index of a dim, which is gone then."""
    strides = strides_of(tensor)
    return replace(
        tensor,
        shape=tensor.shape[:axis] + tensor.shape[axis + 1 :],
        strides=strides[:axis] + strides[axis + 1 :],
        offset=tensor.offset + index * strides[axis],
    )


def split(tensor: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """One dim as several, whose sizes have its size as their product."""
    strides = strides_of(tensor)
    inner = [strides[axis] * math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    return replace(
        tensor,
        shape=(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :]),
        strides=(*strides[:axis], *inner, *strides[axis + 1 :]),
    )


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The same logical bytes in another shape; None where that would take a copy."""
    if not tensor.is_contiguous:
        return None
    return replace(tensor, shape=shape, strides=None)


@dataclass(frozen=True)
class Chained:
    """Several views, one behind the other: joined along the first dim, or stacked."""

    parts: Sequence[View]

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def read_into(self, start: int, buffer: memoryview) -> None:
        done = 0
        for part in self.parts:
            if done == len(buffer):
                return
            if start >= part.nbytes:
                start -= part.nbytes
                continue
            count = min(part.nbytes - start, len(buffer) - done)
            part.read_into(start, buffer[done : done + count])
            done, start = done + count, 0


@dataclass(frozen=True)
class Joined(Chained):
    """Tensors joined along another dim than the first: their rows stand side by side."""

    parts: Sequence[Tensor]
    axis: int

    def read_into(self, start: int, buffer: memoryview) -> None:
        num_rows = math.prod(self.parts[0].shape[: self.axis])
        widths = [part.nbytes // num_rows for part in self.parts]
        width = sum(widths)
        first, last = start // width, -(-(start + len(buffer)) // width)
        rows = np.empty((last - first, width), "|u1")
        place = 0
        for part, its_width in zip(self.parts, widths, strict=True):
            data = np.empty((last - first, its_width), "|u1")
            part.read_into(first * its_width, data.reshape(-1).data)
            rows[:, place : place + its_width] = data
            place += its_width
        begin = start - first * width
        buffer[:] = rows.reshape(-1)[begin : begin + len(buffer)].data


@dataclass(frozen=True)
class Picked:
    """Some indices of a dim, the first or the second, in an order."""

    tensor: Tensor
    axis: int
    order: Sequence[int]

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes // self.tensor.shape[self.axis] * len(self.order)

    def read_into(self, start: int, buffer: memoryview) -> None:
        shape = list(self.tensor.shape)
        there = self.tensor.nbytes // shape[0]
        width = there // shape[1] * len(self.order) if self.axis else there
        first, last = start // width, -(-(start + len(buffer)) // width)
        data = np.empty((last - first, there), "|u1")
        if self.axis:
            self.tensor.read_into(first * there, data.reshape(-1).data)
            each = data.reshape(last - first, shape[1], -1)
            data = each[:, np.asarray(self.order)].reshape(last - first, width)
        else:
            for row, place in zip(data, self.order[first:last], strict=True):
                self.tensor.read_into(place * there, row.data)
        begin = start - first * width
        buffer[:] = data.reshape(-1)[begin : begin + len(buffer)].data
