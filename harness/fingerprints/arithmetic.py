"""Numbers as floats, their sums and those of squares and of products with a matrix, in float64.

In: finite float32 or float64 values. Out: float64, each sum of n terms off by at most n 2**-53 of
the sum of their sizes. float32 is multiplied unconverted, and its products added up in float64, by
NumKong: in half the time of numpy, which would have to widen it first. The same float32 values give
the same bits, whatever stands beside them; those of float64 do, cut in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numkong
import numpy as np

from harness.checkpoint.dtypes import Array, DType, numpy_dtype
from harness.streaming.chunks import buffers

# numpy lets other threads on only over 500 dot products or more. OpenBLAS would spread much longer
# ones over its own threads, which changes the last bits.
_DOT_NUMEL = 512
# Of shorter rows, a call for each costs more than two for all.
_MIN_NUMEL = 2048
# Products of fewer multiplications than a million OpenBLAS computes in place: nearly twice as fast
# as with its copies, which a narrow matrix does not repay.
_MAX_PRODUCT = 1 << 19


def as_floats(data: Array, dtype: DType, scratch: str = "values") -> Array:
    """Logical bytes as float32 values, or as float64 where float32 cannot hold them all.

    Components of complex numbers are side by side. In scratch of this name, or the data itself.
    """
    stored = data.view(numpy_dtype(dtype))
    if stored.dtype in (np.float32, np.float64):
        return stored
    if not dtype.is_floating:
        values = buffers.get(scratch, stored.size, "<f8")
        np.copyto(values, stored, casting="unsafe")
        return values
    values = buffers.get(scratch, stored.size, "<f4")
    if dtype.name.startswith("float8"):
        # Without a check of the range, which no byte can leave: eight times as fast.
        np.take(_float8_values(dtype), data, out=values, mode="clip")
    else:
        numkong.astype(stored, "f32", out=values)
    return values


_FLOAT8: dict[str, Array] = {}


def _float8_values(dtype: DType) -> Array:
    table = _FLOAT8.get(dtype.name)
    if table is None:
        codes = np.arange(256, dtype="|u1").view(numpy_dtype(dtype))
        table = _FLOAT8[dtype.name] = codes.astype("<f4")
    return table


def total_squares(squares: Iterable[float]) -> float:
    """The exact sum of squares, rounded once; infinite where it has no float."""
    try:
        return math.fsum(squares)
    except OverflowError:
        return math.inf


class Runs(NamedTuple):
    """Sums, and sums of squares, over runs of as many values; float64 (number of runs,)."""

    sums: Array
    squares: Array


def moments_of_runs(values: Array, numel: int) -> Runs:
    """Both moments of values (n,) over runs of `numel` values, the last of which is the rest."""
    whole = values.size // numel * numel
    runs, rest = values[:whole].reshape(-1, numel), values[None, whole:]
    sums, squares = zip(_moments_of_rows(runs), _moments_of_rows(rest), strict=True)
    return Runs(np.concatenate(sums), np.concatenate(squares))


def _moments_of_rows(rows: Array) -> tuple[Array, Array]:
    if not rows.size:
        return np.zeros(0), np.zeros(0)
    if rows.dtype != np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            return rows.sum(axis=1), sums_of_squares(rows)
    if rows.shape[1] < _MIN_NUMEL:
        return np.asarray(numkong.sum(rows, axis=1)), sums_of_squares(rows)
    # Other threads wait for these short calls; those that let them on take twice as long.
    sums, squares = zip(*map(numkong.moments, rows), strict=True)
    return np.array(sums), np.array(squares)


def sums_of_squares(rows: Array) -> Array:
    """|x|**2 of each row of values (n, m); float64 (n,)."""
    count, numel = rows.shape
    if rows.dtype == np.float32 and rows.size:
        return np.asarray(numkong.dot(rows, rows)).reshape(count)
    width = min(numel, _DOT_NUMEL)
    if not rows.size or numel % width:
        return np.asarray(np.einsum("ij,ij->i", rows, rows, dtype="<f8"))
    parts = rows.reshape(count, -1, width)
    with np.errstate(over="ignore"):
        return np.asarray(np.vecdot(parts, parts).sum(axis=1))


class Matrix:
    """A matrix (m, k) of float32 numbers to multiply values with.

    Memory: twice its bytes where the values are float32, else one float64 copy.
    """

    def __init__(self, numbers: Array) -> None:
        self._numbers = numbers

    @cached_property
    def numbers(self) -> Array:
        """Its numbers as float64."""
        wide = self._numbers.astype("<f8", copy=False)
        wide.setflags(write=False)
        return wide

    @cached_property
    def _packed(self) -> Any:
        return numkong.dots_pack(np.ascontiguousarray(self._numbers.T))

    def product(self, rows: Array) -> Array:
        """The product of rows (n, m) and the matrix, float64 (n, k)."""
        if rows.dtype == np.float32 and rows.size:
            return np.asarray(numkong.dots_packed(rows, self._packed))
        return _wide_product(rows.astype("<f8", copy=False), self.numbers)


def _wide_product(rows: Array, matrix: Array) -> Array:
    """The product of float64 rows (n, m) and matrix (m, k), as a sum over slices of m."""
    count, numel = rows.shape
    with np.errstate(over="ignore", invalid="ignore"):
        if count <= 1:  # not by BLAS: its product of a vector depends on its threads
            return np.asarray(np.einsum("bi,ij->bj", rows, matrix))
        width = max(1, _MAX_PRODUCT // matrix.shape[1] // count)
        width = width if numel % width == 0 else numel
        slices = rows.reshape(count, -1, width).transpose(1, 0, 2)
        products: Array = slices @ matrix.reshape(-1, width, matrix.shape[1])
        return np.asarray(products.sum(axis=0))
