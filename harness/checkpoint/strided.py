"""Views whose elements are no run of bytes: gathered by reads, in C order.

In: a source, and a view of it (a place, a shape, strides). Out: any range of its elements. Nothing
is mapped. What is read beside the elements is at most as much as costs no more than another read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.checkpoint.sources.source import Source

Index = tuple[int, ...]

_MAX_NBYTES = 4 << 20  # of one read
# To read so much takes no longer than to ask once more.
_FREE_NBYTES = 16 << 10
_LEAST_DENSITY = 8


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StridedView:
    """Elements of type `raw` from byte `place` on; strides count elements, none is negative."""

    source: Source
    place: int
    raw: np.dtype[Any]
    shape: Index
    strides: Index

    def read_into(self, start: int, out: Array) -> None:
        """Fill `out`, of one dimension, with the elements from `start` on in C order.

        Memory: 4 MiB. Raises CheckpointError.
        """
        for offset, shape in _boxes(self.shape, self.strides, start, len(out)):
            numel = math.prod(shape)
            strides = self.strides[len(self.shape) - len(shape) :]
            self._read_box(offset, shape, strides, out[:numel].reshape(shape))
            out = out[numel:]

    def _read_box(self, offset: int, shape: Index, strides: Index, out: Array) -> None:
        """Read the elements of one box: at once, or cut along the dimension of longest stride."""
        itemsize = self.raw.itemsize
        extents = [
            (n, stride) for n, stride in zip(shape, strides, strict=True) if n > 1 and stride
        ]
        span = 1 + sum((n - 1) * stride for n, stride in extents)
        numel = math.prod(n for n, _ in extents)
        if span * itemsize <= _FREE_NBYTES or (
            span <= _LEAST_DENSITY * numel and span * itemsize <= _MAX_NBYTES
        ):
            data = np.empty(span, self.raw)
            self.source.read_into(self.place + offset * itemsize, data.view("|u1").data)
            out[...] = np.ndarray(shape, self.raw, data, 0, [itemsize * s for s in strides])
            return
        n, longest = max(extents, key=lambda extent: extent[1])
        dim = next(d for d in range(len(shape)) if (shape[d], strides[d]) == (n, longest))
        inner = span - (n - 1) * longest
        most = _MAX_NBYTES if longest <= _LEAST_DENSITY * numel // n else _FREE_NBYTES
        step = min(n - 1, max(1, (most // itemsize - inner) // longest + 1))
        for first in range(0, n, step):
            part = out[(slice(None),) * dim + (slice(first, first + step),)]
            self._read_box(offset + first * longest, part.shape, strides, part)


def _boxes(shape: Index, strides: Index, start: int, numel: int) -> Iterator[tuple[int, Index]]:
    """Cut a range of elements into boxes, each whole in all dimensions but its first.

    A box is the offset of its first element, and its shape: that of the last dimensions.
    """
    row = math.prod(shape[1:])
    index, skipped = divmod(start, row)
    if skipped:
        count = min(row - skipped, numel)
        for offset, box in _boxes(shape[1:], strides[1:], skipped, count):
            yield index * strides[0] + offset, box
        index, numel = index + 1, numel - count
    rows, rest = divmod(numel, row)
    if rows:
        yield index * strides[0], (rows, *shape[1:])
    if rest:
        for offset, box in _boxes(shape[1:], strides[1:], 0, rest):
            yield (index + rows) * strides[0] + offset, box
