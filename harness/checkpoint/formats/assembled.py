"""A tensor stored in pieces: boxes that tile it, read as one run of logical bytes.

In: pieces, each a tensor of its own at an offset of the whole. Out: a `Tensor` over a source that
gathers what is asked for: no byte is read that is not wanted, and no more than `_BLOCK_NBYTES` a
thread is held beside the caller's buffer. Refused: pieces that reach outside, share an element, or
leave one out; the check costs a time near linear in the number of pieces.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, TypeGuard

import numpy as np

from harness.checkpoint.dtypes import DType
from harness.checkpoint.sources.source import Source, check_range
from harness.checkpoint.tensors import Storage, Tensor
from harness.errors import CheckpointError

# What is gathered at a time: enough that a read of a chunk is worth its call, even of many chunks.
_BLOCK_NBYTES = 2 << 20
_MAX_CORNERS = 1 << 18  # 50 MB while they are compared
_MAX_DIMENSIONS = 64

Index = tuple[int, ...]


def is_index(value: object) -> TypeGuard[Index]:
    """Whether something from a file is a shape, or a place in one."""
    return (
        isinstance(value, tuple)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and item >= 0 for item in value)
    )


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Piece:
    """A box of a tensor, from `start` on; `where` names its file and place for an error."""

    start: Index
    tensor: Tensor
    where: str

    def __str__(self) -> str:
        return f"the chunk at {list(self.start)} of shape {list(self.tensor.shape)} in {self.where}"


def assemble(
    name: str, key: str, dtype: DType, shape: Index, pieces: Sequence[Piece], *, hint: str
) -> Tensor:
    """Join the pieces of one tensor; raises CheckpointError, with `hint`, unless they tile it."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{name}: tensor {key!r} (shape {list(shape)[:8]}) {why}", hint=hint)

    for piece in pieces:
        box = zip(piece.start, piece.tensor.shape, shape, strict=True)
        if any(start < 0 or start + extent > size for start, extent, size in box):
            raise refuse(f"does not hold {piece}")
    pieces = [piece for piece in pieces if piece.tensor.numel]
    grid = _Grid(shape, pieces)
    corners = len(pieces) << len(grid.shape)
    if corners > _MAX_CORNERS:
        raise refuse(f"is cut into {len(pieces)} chunks along {len(grid.shape)} dimensions")
    mistake = grid.first_mistake()
    if mistake is not None:
        held = [
            piece
            for piece in pieces
            if all(
                0 <= at - start < extent
                for at, start, extent in zip(mistake, piece.start, piece.tensor.shape, strict=True)
            )
        ]
        if held:
            raise refuse(f"has its element {list(mistake)} twice: in {held[0]}, and in {held[1]}")
        raise refuse(f"lacks its element {list(mistake)}: no chunk holds it")
    if len(pieces) == 1:
        return replace(pieces[0].tensor, key=key)
    source = Assembled(f"{name}: tensor {key!r}", dtype, grid.shape, grid.boxes)
    storage = Storage(source=source, nbytes=source.nbytes)
    return Tensor(key=key, dtype=dtype, shape=shape, storage=storage)


def stored_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold its bytes in their files: its pieces, or it alone."""
    source = tensor.storage.source
    if not isinstance(source, Assembled):
        yield tensor
        return
    for box, _ in source.boxes:
        yield from stored_parts(box.tensor)


def stored_runs(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The stored parts that are each a run of its logical bytes, in order, and where each starts.

    These are all where a tensor is cut along its first dimension, as FSDP does, and none where it
    is cut along another.
    """
    source = tensor.storage.source
    if not isinstance(source, Assembled):
        yield 0, tensor
    elif len(source.shape) == 1 and tensor.nbytes == source.nbytes and tensor.is_contiguous:
        for box, _ in source.boxes:
            for start, part in stored_runs(box.tensor):
                yield box.start[0] * tensor.dtype.itemsize + start, part


@dataclass(frozen=True, slots=True)
class _Box:
    start: Index
    extent: Index
    tensor: Tensor


class _Grid:
    """The boxes in as few dimensions as their cuts need.

    A dimension that no cut crosses is one with the dimension before it: pieces of a tensor cut
    along its first dimension are runs of one dimension.
    """

    def __init__(self, shape: Index, pieces: Sequence[Piece]) -> None:
        heads = [
            dim
            for dim, size in enumerate(shape)
            if dim == 0 or any(piece.tensor.shape[dim] != size for piece in pieces)
        ]
        groups = [range(first, end) for first, end in pairwise([*heads, len(shape)])]

        def extent(sizes: Index) -> Index:
            return tuple(math.prod(sizes[dim] for dim in group) for group in groups) or (1,)

        def start(offsets: Index) -> Index:
            return tuple(
                offsets[group[0]] * math.prod(shape[dim] for dim in group[1:]) for group in groups
            ) or (0,)

        self.full_shape = shape
        self.shape = extent(shape)
        self.boxes = sorted(
            (_Box(start(p.start), extent(p.tensor.shape), p.tensor) for p in pieces),
            key=lambda box: box.start,
        )

    def first_mistake(self) -> Index | None:
        """Find the first element, in C order, that no box holds or that several do.

        The boxes tile the shape if and only if the corners of all boxes, signed as in a mixed
        difference, cancel to those of the shape; what is left at the first corner that does not
        cancel is how many boxes too many hold that element.
        """
        corners: list[tuple[Index, int]] = []
        for sign, start, extent in [
            (-1, (0,) * len(self.shape), self.shape),
            *((1, box.start, box.extent) for box in self.boxes),
        ]:
            found: list[tuple[Index, int]] = [((), sign)]
            for first, size in zip(start, extent, strict=True):
                found = [
                    corner
                    for at, weight in found
                    for corner in (((*at, first), weight), ((*at, first + size), -weight))
                ]
            corners += found
        corners.sort()
        sums = groupby(corners, key=itemgetter(0))
        mistake = next((at for at, group in sums if sum(weight for _, weight in group)), None)
        if mistake is None:
            return None
        place = sum(a * b for a, b in zip(mistake, strides_of(self.shape), strict=True))
        index = []
        for stride in strides_of(self.full_shape):
            step, place = divmod(place, stride)
            index.append(step)
        return tuple(index)


class Assembled(Source):
    """The logical bytes of a tensor whose boxes, in the order of their starts, tile it."""

    def __init__(self, name: str, dtype: DType, shape: Index, boxes: Sequence[_Box]) -> None:
        self.name = name
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._dtype = dtype
        self._itemsize = dtype.itemsize
        self._raw = np.dtype(dtype.raw)
        self.shape = shape
        self._strides = strides_of(shape)
        self.boxes = [(box, strides_of(box.extent)) for box in boxes]
        # A box holds a row only if it starts in it, or at most as far before as boxes are long.
        self._starts = [box.start[0] for box in boxes]
        self._reach = max((box.extent[0] for box in boxes), default=0)

    def __reduce__(self) -> tuple[Any, ...]:
        boxes = [box for box, _ in self.boxes]
        return Assembled, (self.name, self._dtype, self.shape, boxes)

    def part(self, offset: int, nbytes: int) -> Assembled:
        """The same bytes, without the boxes that hold none of these: only these can be read."""
        start = offset // self._itemsize
        crossed = {
            id(box): box
            for index, count, _ in self._runs(start, start + nbytes // self._itemsize)
            for box, *_ in self._crossed(index, count)
        }
        boxes = sorted(crossed.values(), key=lambda box: box.start)
        return Assembled(self.name, self._dtype, self.shape, boxes)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; both are multiples of the itemsize."""
        check_range(self, offset, len(buffer))
        itemsize = self._itemsize
        start = offset // itemsize
        for index, count, numel in self._runs(start, start + len(buffer) // itemsize):
            self._fill(index, count, buffer[: numel * itemsize])
            buffer = buffer[numel * itemsize :]

    def _runs(self, start: int, stop: int) -> Iterator[tuple[Index, int, int]]:
        """Cut a range of elements into runs along one dimension, whole in all that follow it.

        A run is where it starts (an index into that dimension and those before it), how far it
        goes along it, and its number of elements.
        """
        last = len(self.shape) - 1
        most = stop - start if last == 0 else max(1, _BLOCK_NBYTES // self._itemsize)
        while start < stop:
            left = min(stop - start, most)
            dim = next(
                dim
                for dim, stride in enumerate(self._strides)
                if dim == last or (start % stride == 0 and stride <= left)
            )
            stride, size = self._strides[dim], self.shape[dim]
            index = tuple(start // self._strides[d] % self.shape[d] for d in range(dim + 1))
            count = min(size - index[-1], left // stride)
            yield index, count, count * stride
            start += count * stride

    def _fill(self, index: Index, count: int, buffer: memoryview) -> None:
        """Gather one run from the boxes that it crosses, in each of which it is one run too."""
        dim, itemsize = len(index) - 1, self._itemsize
        first, inner = index[-1], self.shape[dim + 1 :]
        for box, strides, low, high in self._crossed(index, count):
            start, extent = box.start, box.extent
            place = sum((index[d] - start[d]) * strides[d] for d in range(dim))
            place += (low - start[dim]) * strides[dim]
            nbytes = (high - low) * strides[dim] * itemsize
            if extent[dim + 1 :] == inner:
                at = (low - first) * strides[dim] * itemsize
                box.tensor.read_into(place * itemsize, buffer[at : at + nbytes])
                continue
            gathered = np.empty(nbytes, "|u1")
            box.tensor.read_into(place * itemsize, gathered.data)
            target = np.frombuffer(buffer, self._raw).reshape(count, *inner)
            inside = (
                slice(a, a + n) for a, n in zip(start[dim + 1 :], extent[dim + 1 :], strict=True)
            )
            target[(slice(low - first, high - first), *inside)] = gathered.view(self._raw).reshape(
                high - low, *extent[dim + 1 :]
            )

    def _crossed(self, index: Index, count: int) -> Iterator[tuple[_Box, Index, int, int]]:
        """The boxes that a run crosses, with their strides, each from where to where along it."""
        dim, first = len(index) - 1, index[-1]
        rows = count if dim == 0 else 1
        candidates = slice(
            bisect_right(self._starts, index[0] - self._reach),
            bisect_left(self._starts, index[0] + rows),
        )
        for box, strides in self.boxes[candidates]:
            start, extent = box.start, box.extent
            if any(not 0 <= index[d] - start[d] < extent[d] for d in range(dim)):
                continue
            low, high = max(first, start[dim]), min(first + count, start[dim] + extent[dim])
            if low < high:
                yield box, strides, low, high


def strides_of(shape: Index) -> Index:
    """The strides of a shape in C order, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)]
