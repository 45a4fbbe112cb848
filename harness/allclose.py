"""allclose element by element, in the arithmetic that torch would use.

In: two tensors of one shape whose logical bytes can be read, chunk by chunk. Out: a `Tally` per
chunk: how many elements differ, by how much, which are worst. Memory: two chunks and the scratch of
one pass, per thread.

`torch.allclose(actual, expected, rtol, atol)` is |actual - expected| <= atol + rtol * |expected| in
the arithmetic of the dtype, and false where a NaN is. Integer, bool and packed tensors must be
equal; float8, which torch cannot compare, is compared in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from harness.checkpoint.tensors import DType, decode, numpy_dtype
from harness.fingerprint import widen
from harness.streaming import Chunk, buffers

Array = np.ndarray[Any, np.dtype[Any]]

MAX_ELEMENTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What allclose allows; `exact` allows nothing."""

    atol: float = 1e-5
    rtol: float = 1e-5
    exact: bool = False


class Values(Protocol):
    """A tensor whose logical bytes can be read: a `Tensor`, or a `TensorPrint` with values."""

    @property
    def key(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def numel(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def read_into(self, start: int, buffer: memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class Tally:
    """What one chunk adds to an exact difference."""

    num_differing: int = 0
    num_beyond: int = 0
    max_abs: float = 0.0
    min_atol: float = 0.0
    sum_squares: float = 0.0
    first: int = -1
    last: int = -1
    worst: tuple[tuple[float, int], ...] = ()
    num_nonfinite: tuple[int, int] = (0, 0)


# Elements per pass of the kernel below: its temporaries stay in the second-level cache.
_PASS_NUMEL = 32768


def tally_chunk(
    expected: Values, actual: Values, chunk: Chunk, tolerance: Tolerance
) -> Tally | None:
    """Compare one chunk of two tensors of one shape; None where their bytes are the same.

    `chunk` counts the bytes of `expected`. Memory: two chunks and the scratch of one pass.
    """
    ratio = actual.dtype.itemsize / expected.dtype.itemsize
    ours = buffers.get("chunk", chunk.nbytes)
    expected.read_into(chunk.start, ours.data)
    theirs = buffers.get("other chunk", int(chunk.nbytes * ratio))
    actual.read_into(int(chunk.start * ratio), theirs.data)
    same_type = expected.dtype == actual.dtype
    if same_type and np.array_equal(
        ours.view(_WORD[ours.size % 8]), theirs.view(_WORD[ours.size % 8])
    ):
        return None
    first = chunk.start // expected.dtype.itemsize
    kernel = _Kernel(expected.dtype, actual.dtype, tolerance)
    tallies = []
    for start in range(0, ours.size // expected.dtype.itemsize, _PASS_NUMEL):
        stop = start + _PASS_NUMEL
        a = theirs[start * actual.dtype.itemsize : stop * actual.dtype.itemsize]
        e = ours[start * expected.dtype.itemsize : stop * expected.dtype.itemsize]
        tallies.append(kernel.tally(e, a, first + start))
    return add_tallies(tallies)


_WORD = {0: "<u8", **dict.fromkeys(range(1, 8), "|u1")}


class _Kernel:
    """allclose over one pass, in the arithmetic that torch would use."""

    def __init__(self, expected: DType, actual: DType, tolerance: Tolerance) -> None:
        self.expected, self.actual, self.tolerance = expected, actual, tolerance
        same = expected == actual
        self.floating = expected.is_floating and actual.is_floating
        if not same:
            self.work = np.dtype("<c16" if "complex" in (expected.kind, actual.kind) else "<f8")
        elif expected.kind == "complex":
            self.work = np.dtype("<c16" if expected.name == "complex128" else "<c8")
        else:
            self.work = np.dtype("<f8" if expected.name == "float64" else "<f4")
        # torch rounds to the stored type after each step; below 4 bytes we widen, and only what
        # lies close to the limit is decided again in the narrow type.
        narrow = same and expected.kind == "float" and expected.itemsize == 2
        self.narrow = numpy_dtype(expected) if narrow else None
        self.slack = 4 * float(eps(expected)) if narrow else 0.0

    def tally(self, expected: Array, actual: Array, first: int) -> Tally:
        if not self.floating:
            return self._tally_exact(expected, actual, first)
        e, a = self._values(expected, self.expected), self._values(actual, self.actual)
        scalar = self.work.type(0).real.dtype.type
        atol, rtol = scalar(self.tolerance.atol), scalar(self.tolerance.rtol)
        with np.errstate(all="ignore"):
            error = np.abs(a - e)
            allowed = np.abs(e)
            allowed *= rtol
            needed = error - allowed
            allowed += atol
            total = float(np.dot(error, error))
            beyond = ~(error <= allowed)
            nonfinite = (0, 0)
            if not math.isfinite(total) or not math.isfinite(float(allowed.sum())):
                nonfinite = (
                    e.size - int(np.count_nonzero(np.isfinite(e))),
                    a.size - int(np.count_nonzero(np.isfinite(a))),
                )
                same = a == e  # infinities of one sign are close, as in torch
                beyond = ~same & (beyond | ~np.isfinite(error))
                error = np.where(same, 0, error)
                needed = np.where(same, 0, needed)
                measured = np.where(np.isfinite(error), error, 0).astype("<f8")
                total = float(measured @ measured)
            if self.narrow is not None:
                beyond = self._decide_again(e, a, error, allowed, beyond)
            if self.tolerance.exact:
                beyond = error != 0
            differing = np.flatnonzero(error)
            num_beyond = int(np.count_nonzero(beyond))
            return Tally(
                num_differing=differing.size,
                num_beyond=num_beyond,
                max_abs=_top(error),
                min_atol=max(0.0, _top(needed)),
                sum_squares=total,
                first=first + int(differing[0]) if differing.size else -1,
                last=first + int(differing[-1]) if differing.size else -1,
                worst=_worst(error, beyond if num_beyond else error != 0, first),
                num_nonfinite=nonfinite,
            )

    def _decide_again(
        self, e: Array, a: Array, error: Array, allowed: Array, beyond: Array
    ) -> Array:
        """Round as torch does, where the wide arithmetic is too near the limit to know."""
        assert self.narrow is not None
        near = np.flatnonzero(np.abs(error - allowed) <= self.slack * allowed + 1e-7)
        if near.size:
            narrow = self.narrow
            difference = np.abs((a[near] - e[near]).astype(narrow).astype("<f4"))
            scaled = (np.abs(e[near]) * np.float32(self.tolerance.rtol)).astype(narrow)
            limit = (scaled.astype("<f4") + np.float32(self.tolerance.atol)).astype(narrow)
            beyond[near] = ~(difference <= limit.astype("<f4")) & (a[near] != e[near])
        return beyond

    def _values(self, data: Array, dtype: DType) -> Array:
        if dtype.kind == "complex":
            parts = data.view(numpy_dtype(dtype)).astype(self.work.type(0).real.dtype)
            return parts.view(self.work)
        if dtype.name == "bfloat16":
            wide = (data.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
        elif dtype.name.startswith("float8"):
            wide = widen(data, dtype)
        else:
            wide = data.view(numpy_dtype(dtype))
        return wide.astype(self.work, copy=False)

    def _tally_exact(self, expected: Array, actual: Array, first: int) -> Tally:
        e, a = decode(expected, self.expected), decode(actual, self.actual)
        if self.expected.kind == "complex" or self.actual.kind == "complex":
            e, a = (x.astype("<c16") if x.dtype.kind != "V" else x for x in (e, a))
        unequal = e != a
        differing = np.flatnonzero(unequal)
        with np.errstate(all="ignore"):
            error = np.abs(a[differing].astype("<f8") - e[differing].astype("<f8"))
        # Neighbours beyond 2**53 are equal as float64, but they are not equal.
        error = np.maximum(error, 1.0) if self.expected.kind != "float" else error
        top = float(error.max()) if differing.size else 0.0
        return Tally(
            num_differing=differing.size,
            num_beyond=differing.size,
            max_abs=top,
            min_atol=math.inf if differing.size else 0.0,  # no tolerance makes these equal
            sum_squares=float(error @ error),
            first=first + int(differing[0]) if differing.size else -1,
            last=first + int(differing[-1]) if differing.size else -1,
            worst=tuple(
                sorted(
                    (
                        (float(size), first + int(i))
                        for size, i in zip(error[:4096], differing, strict=False)
                    ),
                    key=lambda item: (-item[0], item[1]),
                )[:MAX_ELEMENTS]
            ),
        )


def eps(dtype: DType) -> float:
    """Relative rounding of the two-byte types."""
    return 2.0**-8 if dtype.name == "bfloat16" else 2.0**-11


def _top(values: Array) -> float:
    """The greatest value, infinity where one is not a number."""
    top = float(values.max()) if values.size else 0.0
    return math.inf if math.isnan(top) else top


def _worst(error: Array, candidates: Array, first: int) -> tuple[tuple[float, int], ...]:
    """The few elements that are farthest off, NaN before all others."""
    if not candidates.any():
        return ()
    ranked = np.where(np.isnan(error), np.inf, error)
    count = min(MAX_ELEMENTS, int(np.count_nonzero(candidates)))
    if candidates.sum() > MAX_ELEMENTS:
        chosen = np.argpartition(np.where(candidates, ranked, -1.0), -count)[-count:]
    else:
        chosen = np.flatnonzero(candidates)
    found = [(float(ranked[i]), first + int(i)) for i in chosen]
    return tuple(sorted(found, key=lambda item: (-item[0], item[1])))


def add_tallies(tallies: Sequence[Tally]) -> Tally:
    """Join the tallies of several chunks."""
    changed = [tally for tally in tallies if tally.num_differing]
    worst = sorted((w for t in changed for w in t.worst), key=lambda item: (-item[0], item[1]))
    return Tally(
        num_differing=sum(t.num_differing for t in tallies),
        num_beyond=sum(t.num_beyond for t in tallies),
        max_abs=max((t.max_abs for t in tallies), default=0.0),
        min_atol=max((t.min_atol for t in tallies), default=0.0),
        sum_squares=math.fsum(t.sum_squares for t in tallies),
        first=min((t.first for t in changed), default=-1),
        last=max((t.last for t in changed), default=-1),
        worst=tuple(worst[:MAX_ELEMENTS]),
        num_nonfinite=(
            sum(t.num_nonfinite[0] for t in tallies),
            sum(t.num_nonfinite[1] for t in tallies),
        ),
    )


def element(values: Values, index: int) -> float | complex | int | bool:
    """Read one element, by its place in logical order."""
    itemsize = values.dtype.itemsize
    data = bytearray(itemsize)
    values.read_into(index * itemsize, memoryview(data))
    return _number(np.frombuffer(data, dtype="|u1"), values.dtype)


def _number(data: Array, dtype: DType) -> float | complex | int | bool:
    if dtype.name == "complex32":
        real, imaginary = data.view("<f2").astype("<f8")
        return complex(float(real), float(imaginary))
    value = decode(data, dtype)[0]
    if dtype.kind == "float":
        return float(value)
    if dtype.kind == "complex":
        return complex(value)
    return bool(value) if dtype.name == "bool" else int(value)
