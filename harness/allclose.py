"""allclose element by element, in the arithmetic that torch would use.

In: two tensors of one shape whose logical bytes can be read, chunk by chunk. Out: a `Tally` per
chunk: how many elements differ, by how much, which are worst. Memory: two chunks and the scratch of
one pass, per thread.

`torch.allclose(actual, expected, rtol, atol)` is |actual - expected| <= atol + rtol * |expected| in
the arithmetic of the dtype, and false where a NaN is. Integer, bool and packed tensors must be
equal; float8, which torch cannot compare, is compared in float32, and two dtypes in float64.
(complex128: torch itself is not of one mind, its vectors and its scalars may differ by an ulp.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from harness.checkpoint.tensors import DType, decode, numpy_dtype
from harness.fingerprint import widen
from harness.sketch import sums_of_squares
from harness.streaming import Chunk, buffers

Array = np.ndarray[Any, np.dtype[Any]]

MAX_ELEMENTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What allclose allows; `exact` allows nothing: not even -0.0 for 0.0, but the same NaN."""

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
    """What one chunk adds to an exact difference.

    `squares` are sums of squared differences over runs of `run_numel` elements.
    """

    num_differing: int = 0
    num_beyond: int = 0
    max_abs: float = 0.0
    min_atol: float = 0.0
    squares: tuple[float, ...] = ()
    first: int = -1
    last: int = -1
    worst: tuple[tuple[float, int], ...] = ()
    num_nonfinite: tuple[int, int] = (0, 0)

    @property
    def least_worst(self) -> float:
        """What an element must exceed to be among the worst of this and later tallies."""
        return self.worst[-1][0] if len(self.worst) == MAX_ELEMENTS else -math.inf


# Elements per pass of the kernel below: threads wait for each other between the steps of smaller
# ones, larger ones leave the cache (bfloat16 on two cores: 1.46 s at half as many elements, 1.37 s
# at twice as many, 1.25 s here).
_PASS_NUMEL = 262144
_MIN_RUN_NUMEL = 64
MAX_STRIP = 64
# A float32 sum of squares below this has lost terms to underflow.
_SAFE_SQUARES = 1e-25
# Below this share of a limit a rounded difference is below the limit itself.
_SURELY = 1 - 2.0**-20
# The worst elements are looked for in groups, of which only the greatest are looked at again.
_GROUP_NUMEL = 4096
# Differences beyond these may be infinite in the narrow type.
_HUGE = {"float16": 65504.0, "complex32": 65504.0, "bfloat16": 3.38e38}


def run_numel(numel: int) -> int:
    """Elements of a run: about `MAX_STRIP` runs make a tensor, none is longer than a pass."""
    run = _MIN_RUN_NUMEL
    while run < _PASS_NUMEL and run * MAX_STRIP < numel:
        run *= 2
    return run


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
    if expected.dtype == actual.dtype and _are_equal(ours, theirs):
        return None
    return _tally_values(expected, actual, chunk, tolerance, ours, theirs)


def tally_nan(tensor: Values, chunk: Chunk, tolerance: Tolerance) -> Tally | None:
    """Compare a chunk of two tensors that is the same in both; None unless it holds NaN.

    Of tensors that differ elsewhere NaN must be counted: to `torch.allclose` it is close to
    nothing, not even to itself.
    """
    if not tensor.dtype.is_floating:
        return None
    data = buffers.get("chunk", chunk.nbytes)
    tensor.read_into(chunk.start, data.data)
    with np.errstate(invalid="ignore"):  # signalling NaN
        if not np.isnan(data.view(numpy_dtype(tensor.dtype))).any():
            return None
    return _tally_values(tensor, tensor, chunk, tolerance, data, data)


def _tally_values(
    expected: Values, actual: Values, chunk: Chunk, tolerance: Tolerance, ours: Array, theirs: Array
) -> Tally:
    first = chunk.start // expected.dtype.itemsize
    kernel = _Kernel(expected.dtype, actual.dtype, tolerance, run_numel(expected.numel))
    tallies: list[Tally] = []
    least = -math.inf
    for start in range(0, ours.size // expected.dtype.itemsize, _PASS_NUMEL):
        stop = start + _PASS_NUMEL
        a = theirs[start * actual.dtype.itemsize : stop * actual.dtype.itemsize]
        e = ours[start * expected.dtype.itemsize : stop * expected.dtype.itemsize]
        tallies.append(kernel.tally(e, a, first + start, least))
        least = max(least, tallies[-1].least_worst)
    return add_tallies(tallies)


def _are_equal(one: Array, other: Array) -> bool:
    """Whether bytes are the same; where all differ, the first ones tell."""
    word = "|u1" if one.size % 8 else "<u8"
    one, other = one.view(word), other.view(word)
    return np.array_equal(one[:4096], other[:4096]) and np.array_equal(one, other)


class _Kernel:
    """allclose over one pass, in the arithmetic that torch would use."""

    def __init__(self, expected: DType, actual: DType, tolerance: Tolerance, run: int) -> None:
        self.expected, self.actual, self.tolerance = expected, actual, tolerance
        self.run = run
        self.same_type = expected == actual
        self.floating = expected.is_floating and actual.is_floating
        self.is_complex = "complex" in (expected.kind, actual.kind)
        double = not self.same_type or expected.name in ("float64", "complex128")
        self.work = np.dtype("<f8" if double else "<f4")
        # torch rounds to the stored type after each step; below 4 bytes we widen, and only what
        # lies close to the limit is decided again in the narrow type.
        narrow = self.same_type and expected.name in ("float16", "bfloat16", "complex32")
        self.narrow = numpy_dtype(expected) if narrow else None

    def tally(self, expected: Array, actual: Array, first: int, least: float) -> Tally:
        """Tally one pass; of its worst elements only those that are worse than `least`."""
        if not self.floating:
            return self._tally_exact(expected, actual, first, least)
        e = self._values(expected, self.expected, "expected")
        a = self._values(actual, self.actual, "actual")
        with np.errstate(all="ignore"):
            atol, rtol = np.array([self.tolerance.atol, self.tolerance.rtol]).astype(self.work)
            error = self._magnitude(np.subtract(a, e, out=self._scratch("error", e)))
            scaled = self._magnitude(np.multiply(e, rtol, out=self._scratch("scaled", e)))
            needed = np.subtract(error, scaled, out=self._scratch("needed", error))
            min_atol = _top(needed)
            squares = self._squares(error)
            total = float(squares.sum())
            nonfinite = (0, 0)
            if not math.isfinite(total):
                nonfinite = (_num_nonfinite(e), _num_nonfinite(a))
                # Infinities of one sign are close, as in torch.
                same = _by_element(a == e, error.size)
                error[same] = needed[same] = 0
                min_atol = _top(needed)
            if not _SAFE_SQUARES < total < math.inf:
                measured = np.where(np.isfinite(error), error, 0).astype("<f8")
                squares = self._squares(measured)
            beyond = buffers.get("beyond", error.size, "?")
            if self.narrow is not None:
                self._decide_narrowly(e, a, error, scaled, beyond)
            elif math.isfinite(total) and min_atol <= atol * _SURELY:
                beyond.fill(False)  # the sum below is rounded to no less than what it exceeds
            else:
                np.greater(error, np.add(scaled, atol, out=scaled), out=beyond)
                if not math.isfinite(total):
                    beyond |= ~np.isfinite(error)
            differing = np.not_equal(error, 0, out=buffers.get("differing", error.size, "?"))
            if self.tolerance.exact:
                if self.same_type:
                    differing = ~_by_element(expected == actual, error.size)
                    error = np.where(differing, error, 0)
                beyond = differing
            min_atol = max(0.0, min_atol)
            return _tally(error, differing, beyond, min_atol, squares, first, least, nonfinite)

    def _scratch(self, name: str, like: Array) -> Array:
        return buffers.get(name, like.size, self.work.str).reshape(like.shape)

    def _squares(self, error: Array) -> Array:
        """Sums of squares, run by run; of float32 in float32."""
        whole = error.size // self.run * self.run
        squares = sums_of_squares(error[:whole].reshape(-1, self.run))
        if whole < error.size:
            squares = np.append(squares, sums_of_squares(error[None, whole:]))
        return squares

    def _values(self, data: Array, dtype: DType, side: str) -> Array:
        """Values in the working type: (n,), or components (n, 2) if either side is complex."""
        if dtype.name.startswith("float8"):
            wide = widen(data, dtype).copy()  # out of scratch that the other side may use, too
        else:
            wide = data.view(numpy_dtype(dtype))
        if wide.dtype != self.work:
            values = buffers.get(side, wide.size, self.work.str)
            np.copyto(values, wide, casting="unsafe")
            wide = values
        if dtype.kind == "complex":
            return wide.reshape(-1, 2)
        return np.stack([wide, np.zeros_like(wide)], axis=1) if self.is_complex else wide

    def _magnitude(self, values: Array) -> Array:
        """The absolute values, in place where they are real."""
        if self.is_complex:  # hypot, as torch: numpy's abs of complex numbers may be two ulps off
            return np.hypot(values[:, 0], values[:, 1])
        return np.abs(values, out=values)

    def _decide_narrowly(
        self, e: Array, a: Array, error: Array, scaled: Array, beyond: Array
    ) -> None:
        """Round as torch does, where the wide arithmetic is too near the limit to know."""
        assert self.narrow is not None
        relative, absolute = roundings(self.expected)
        limit, near = self._scratch("needed", error), buffers.get("near", error.size, "?")
        for factor, sign, flags in ((1 - relative, -1, near), (1 + relative, 1, beyond)):
            np.multiply(scaled, self.work.type(factor), out=limit)
            limit += self.work.type(self.tolerance.atol * factor + sign * absolute)
            np.greater(error, limit, out=flags)
        near ^= beyond
        # Of complex32 torch rounds rtol, too, which may be off by any factor.
        if self.is_complex or not error.max() <= _HUGE[self.expected.name]:
            near.fill(True)
        where = np.flatnonzero(near)
        where = where[~_by_element(a[where] == e[where], where.size)]
        if where.size:
            # The scalar atol is rounded to the dtype before it is added.
            atol, rtol = np.float32(self.tolerance.atol), np.float32(self.tolerance.rtol)
            atol, rtol = self._round(atol), self._round(rtol) if self.is_complex else rtol
            difference = self._round(self._magnitude(self._round(a[where] - e[where])))
            scaled = self._round(self._magnitude(self._round(e[where] * rtol)))
            close = (difference <= self._round(scaled + atol)) & np.isfinite(difference)
            beyond[where] = ~close

    def _round(self, values: Any) -> Any:
        return values.astype(self.narrow).astype("<f4")

    def _tally_exact(self, expected: Array, actual: Array, first: int, least: float) -> Tally:
        e, a = decode(expected, self.expected), decode(actual, self.actual)
        differing = e != a
        wide = "<c16" if self.is_complex else "<f8"
        error = np.zeros(e.size)
        with np.errstate(all="ignore"):
            error[differing] = np.abs(a[differing].astype(wide) - e[differing].astype(wide))
            if self.same_type:
                # Neighbours beyond 2**53 are equal as float64, but they are not equal.
                error[differing] = np.maximum(error[differing], 1.0)
            squares = self._squares(error)
        needed = math.inf if differing.any() else 0.0  # no tolerance makes these equal
        return _tally(error, differing, differing, needed, squares, first, least)


def roundings(dtype: DType) -> tuple[float, float]:
    """Relative and absolute rounding of torch's own test in this dtype, generously."""
    unit, least = {
        "float64": (2.0**-53, 2.0**-1074),
        "complex128": (2.0**-53, 2.0**-1074),
        "float16": (2.0**-11, 2.0**-24),
        "complex32": (2.0**-11, 2.0**-24),
        "bfloat16": (2.0**-8, 2.0**-133),
    }.get(dtype.name, (2.0**-24, 2.0**-149))
    return 8 * unit, 4 * least


def _tally(
    error: Array,
    differing: Array,
    beyond: Array,
    min_atol: float,
    squares: Array,
    first: int,
    least: float,
    num_nonfinite: tuple[int, int] = (0, 0),
) -> Tally:
    num_differing, num_beyond = int(np.count_nonzero(differing)), int(np.count_nonzero(beyond))
    max_abs = _top(error)
    candidates = beyond if num_beyond else differing
    flags = differing.tobytes()
    return Tally(
        num_differing=num_differing,
        num_beyond=num_beyond,
        max_abs=max_abs,
        min_atol=min_atol,
        squares=tuple(squares.tolist()),
        first=first + flags.find(1) if num_differing else -1,
        last=first + flags.rfind(1) if num_differing else -1,
        worst=_worst(error, candidates, first, least) if max_abs > least else (),
        num_nonfinite=num_nonfinite,
    )


def _num_nonfinite(values: Array) -> int:
    return int(np.count_nonzero(~_by_element(np.isfinite(values), len(values))))


def _by_element(flags: Array, numel: int) -> Array:
    """Whether all flags of an element are set, of one (n,) or several a element."""
    return flags if flags.size == numel else np.asarray(flags.reshape(numel, -1).all(axis=1))


def _top(values: Array) -> float:
    """The greatest value, infinity where one is not a number."""
    top = float(values.max()) if values.size else 0.0
    return math.inf if math.isnan(top) else top


def _worst(
    error: Array, candidates: Array, first: int, least: float
) -> tuple[tuple[float, int], ...]:
    """The few elements that are farthest off, and farther than `least`; NaN as infinity.

    `error` is spent: what was found is taken out of it.
    """
    ranked = error if candidates.all() else np.where(candidates, error, -np.inf)
    starts = np.arange(0, ranked.size, _GROUP_NUMEL)
    tops = np.maximum.reduceat(ranked, starts)
    if math.isnan(float(tops.max())):
        ranked[np.isnan(ranked)] = np.inf
        tops = np.maximum.reduceat(ranked, starts)
    found: list[tuple[float, int]] = []
    while len(found) < MAX_ELEMENTS:
        top = int(tops.argmax())  # the first of equal ones, here and below
        group = ranked[starts[top] : starts[top] + _GROUP_NUMEL]
        index = int(group.argmax())
        size = float(group[index])
        if not size > least:
            break
        found.append((size, first + int(starts[top]) + index))
        group[index] = -np.inf
        tops[top] = group.max()
    return tuple(found)


def add_tallies(tallies: Sequence[Tally]) -> Tally:
    """Join the tallies of several chunks."""
    changed = [tally for tally in tallies if tally.num_differing]
    worst = sorted((w for t in changed for w in t.worst), key=lambda item: (-item[0], item[1]))
    return Tally(
        num_differing=sum(t.num_differing for t in tallies),
        num_beyond=sum(t.num_beyond for t in tallies),
        max_abs=max((t.max_abs for t in tallies), default=0.0),
        min_atol=max((t.min_atol for t in tallies), default=0.0),
        squares=tuple(square for tally in tallies for square in tally.squares),
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
