"""allclose element by element, in the arithmetic that torch would use.

In: two tensors of one shape whose logical bytes can be read, chunk by chunk. Out: a `ChunkResult`
per chunk: how many elements differ, by how much, which are worst. Memory: two chunks and the
scratch of one pass, per thread.

`torch.allclose(actual, expected, rtol, atol)` is |actual - expected| <= atol + rtol * |expected| in
the arithmetic of the dtype, and false where a NaN is. Integer, bool and packed tensors must be
equal; float8, which torch cannot compare, is compared in float32, and two dtypes in float64.
(complex128: torch itself is not of one mind, its vectors and its scalars may differ by an ulp.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from harness.checkpoint.dtypes import Array, DType, decode, numpy_dtype
from harness.comparison.chunk_result import (
    MAX_ELEMENTS,
    ChunkResult,
    Values,
    add_results,
    run_numel,
)
from harness.comparison.policy import Tolerance
from harness.fingerprints.arithmetic import as_floats, sums_of_squares
from harness.fingerprints.residues import roundings
from harness.streaming.chunks import Chunk, buffers

Flags = Array | bool
"""Some elements of a pass: flags, or True for all of them and False for none."""
Least = Mapping[bool, float]
"""What is worse than the worst found so far: beyond the tolerance (True), or within it."""


# Elements per pass of the kernel below: threads wait for each other between the steps of smaller
# ones, larger ones leave the cache (bfloat16 on two cores, every element different: 1.1 s at half
# as many elements, 1.35 s at twice as many, 1.0 s here).
_PASS_NUMEL = 524288
# Below this share of a limit a rounded difference is below the limit itself.
_SURELY = 1 - 2.0**-20
# The worst elements are looked for in groups, of which only the greatest are looked at again.
_GROUP_NUMEL = 4096
# So few candidates are sorted as they are.
_FEW = 512
# Differences beyond these may be infinite in the narrow type.
_HUGE = {"float16": 65504.0, "bfloat16": 3.38e38}


def sum_up_chunk(
    expected: Values, actual: Values, chunk: Chunk, tolerance: Tolerance
) -> ChunkResult | None:
    """Compare one chunk of two tensors of one shape; None where their bytes are the same.

    `chunk` counts the bytes of `expected`. Memory: two chunks and the scratch of one pass.
    """
    passes = _passes(expected, actual, chunk)
    if expected.dtype == actual.dtype:
        differing = next((one for one in passes if not _are_equal(one.expected, one.actual)), None)
        if differing is None:
            return None
        at_once = differing.first == chunk.start // expected.dtype.itemsize
        passes = chain([differing], passes) if at_once else _passes(expected, actual, chunk)
    return _sum_up_passes(expected, actual, passes, tolerance)


class _Pass(NamedTuple):
    """Bytes of both sides, from the element `first` on."""

    first: int
    expected: Array
    actual: Array


def _passes(expected: Values, actual: Values, chunk: Chunk) -> Iterator[_Pass]:
    """Read a chunk of two tensors; each pass is good until the next."""
    sizes = expected.dtype.itemsize, actual.dtype.itemsize
    first, end = chunk.start // sizes[0], (chunk.start + chunk.nbytes) // sizes[0]
    for start in range(first, end, _PASS_NUMEL):
        numel = min(_PASS_NUMEL, end - start)
        ours = buffers.get("chunk", numel * sizes[0])
        expected.read_into(start * sizes[0], ours.data)
        theirs = buffers.get("other chunk", numel * sizes[1])
        actual.read_into(start * sizes[1], theirs.data)
        yield _Pass(start, ours, theirs)


def sum_up_nonfinite(tensor: Values, chunk: Chunk, tolerance: Tolerance) -> ChunkResult | None:
    """Compare a chunk of two tensors that is the same in both; None where all of it is finite.

    Of tensors that differ elsewhere NaN and infinities are counted: to `torch.allclose` NaN is
    never close, not even to itself.
    """
    if not tensor.dtype.is_floating:
        return None
    data = buffers.get("chunk", chunk.nbytes)
    tensor.read_into(chunk.start, data.data)
    with np.errstate(invalid="ignore"):  # signalling NaN
        if np.isfinite(data.view(numpy_dtype(tensor.dtype))).all():
            return None
    return _sum_up_passes(tensor, tensor, _passes(tensor, tensor, chunk), tolerance)


def _sum_up_passes(
    expected: Values, actual: Values, passes: Iterable[_Pass], tolerance: Tolerance
) -> ChunkResult:
    kernel = _Kernel(expected.dtype, actual.dtype, tolerance, run_numel(expected.numel))
    results: list[ChunkResult] = []
    least = {True: -math.inf, False: -math.inf}
    for one in passes:
        result = kernel.sum_up(one.expected, one.actual, one.first, least)
        results.append(result)
        is_beyond = result.num_beyond > 0
        least[is_beyond] = max(least[is_beyond], result.least_worst)
        if is_beyond:
            least[False] = math.inf  # none within the tolerance is among the worst any more
    return add_results(results)


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
        with np.errstate(over="ignore"):
            self.atol, self.rtol = np.array([tolerance.atol, tolerance.rtol]).astype(self.work)
        # torch rounds to the stored type after each step; below 4 bytes we widen, and only what
        # lies close to the limit is decided again in the narrow type.
        narrow = self.same_type and expected.name in ("float16", "bfloat16", "complex32")
        self.narrow = numpy_dtype(expected) if narrow else None

    def sum_up(self, expected: Array, actual: Array, first: int, least: Least) -> ChunkResult:
        """ChunkResult one pass; of its worst elements only those that are worse than `least`."""
        if not self.floating:
            return self._sum_up_exact(expected, actual, first, least)
        # Where values are widened, they are spent for what is made of them: less to cache.
        e = self._values(expected, self.expected, "scaled")
        a = self._values(actual, self.actual, "error")
        with np.errstate(all="ignore"):
            error = self._magnitude(np.subtract(a, e, out=self._scratch("error", e)))
            scaled = self._magnitude(np.multiply(e, self.rtol, out=self._scratch("scaled", e)))
            needed = np.subtract(error, scaled, out=self._scratch("needed", error))
            squares = self._squares(error)
            total = float(squares.sum())
            finite = math.isfinite(total)
            nonfinite = (0, 0)
            if not finite:
                e = self._values(expected, self.expected, "expected")
                a = self._values(actual, self.actual, "actual")
                nonfinite = (_num_nonfinite(e), _num_nonfinite(a))
                # Infinities of one sign are close, as in torch; NaN is off by more than anything.
                same = _by_element(a == e, error.size)
                error[same] = scaled[same] = needed[same] = 0
                error[np.isnan(error)] = np.inf
            if not finite:
                measured = np.where(np.isfinite(error), error, 0).astype("<f8")
                squares = self._squares(measured)
            min_atol = _top(needed)
            tops = _tops(error)
            if self.tolerance.exact and self.same_type:
                word = f"<u{min(self.expected.itemsize, 8)}"
                same = _by_element(expected.view(word) == actual.view(word), error.size)
                if not finite:
                    error[same] = 0  # the same NaN
                    tops = _tops(error)
                differing: Flags = ~same
                beyond = differing
            else:
                # Mostly all differ, or few do: the least tells before all are looked at one by one.
                differing = float(error.min()) > 0 or np.not_equal(
                    error, 0, out=buffers.get("differing", error.size, "?")
                )
                if self.tolerance.exact:
                    beyond = differing
                elif self.narrow is not None:
                    beyond = self._decide_narrowly(
                        expected, actual, error, scaled, needed, float(tops.max())
                    )
                elif finite and min_atol <= self.atol * _SURELY:
                    beyond = False  # the sum below is rounded to no less than what it exceeds
                else:
                    limit = np.add(scaled, self.atol, out=scaled)
                    beyond = np.greater(error, limit, out=buffers.get("beyond", error.size, "?"))
                    if not finite:
                        beyond |= ~np.isfinite(error)
            min_atol = max(0.0, min_atol)
            return _compare_chunk(
                error, tops, differing, beyond, min_atol, squares, first, least, nonfinite
            )

    def _scratch(self, name: str, like: Array) -> Array:
        return buffers.get(name, like.size, self.work.str).reshape(like.shape)

    def _squares(self, error: Array) -> Array:
        """Sums of squares, run by run."""
        whole = error.size // self.run * self.run
        squares = sums_of_squares(error[:whole].reshape(-1, self.run))
        if whole < error.size:
            squares = np.append(squares, sums_of_squares(error[None, whole:]))
        return squares

    def _values(self, data: Array, dtype: DType, side: str) -> Array:
        """Values in the working type: (n,), or components (n, 2) if either side is complex."""
        wide = as_floats(data, dtype, side)
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
        self,
        expected: Array,
        actual: Array,
        error: Array,
        scaled: Array,
        needed: Array,
        max_abs: float,
    ) -> Array:
        """Round as torch does, where the wide arithmetic is too near the limit to know."""
        beyond = buffers.get("beyond", error.size, "?")
        near: Any = slice(None)
        same: Flags = False
        if self.is_complex:
            # torch rounds components, and rtol, which may be off by any factor.
            e = self._values(expected, self.expected, "expected")
            a = self._values(actual, self.actual, "actual")
            same = _by_element(a == e, error.size)  # infinities, too
            error = self._magnitude(self._round(a - e))
            scaled = self._magnitude(self._round(e * self._round(self.rtol)))
        elif max_abs <= _HUGE[self.expected.name]:
            near = self._near_limit(scaled, needed, beyond)
        # The scalar atol is rounded to the dtype before it is added.
        difference, scaled = self._round(error[near]), self._round(scaled[near])
        close = difference <= self._round(scaled + self._round(self.atol))
        beyond[near] = ~(close & np.isfinite(difference) | same)
        return beyond

    def _near_limit(self, scaled: Array, needed: Array, beyond: Array) -> Array:
        """Flag what is surely beyond the limit; return the places where that is not sure."""
        relative, absolute = map(self.work.type, roundings(self.expected))
        near = buffers.get("near", needed.size, "?")
        # With one slack for all, which is the greatest; by one for each where that is too much.
        for share in (scaled.max(), scaled):
            slack = (share + self.atol) * relative + absolute
            np.greater(needed, self.atol + slack, out=beyond)
            # What rtol alone allows is allowed whatever is rounded: of equal elements none is near.
            np.greater(needed, np.maximum(self.atol - slack, 0), out=near)
            near ^= beyond
            if np.count_nonzero(near) <= needed.size // 64:
                break
        return np.flatnonzero(near)

    def _round(self, values: Any) -> Any:
        return values.astype(self.narrow).astype("<f4")

    def _sum_up_exact(
        self, expected: Array, actual: Array, first: int, least: Least
    ) -> ChunkResult:
        nonfinite = (0, 0)
        with np.errstate(all="ignore"):
            if self.expected.is_floating or self.actual.is_floating:
                e = self._values(expected, self.expected, "scaled")
                a = self._values(actual, self.actual, "error")
                nonfinite = (_num_nonfinite(e), _num_nonfinite(a))
                differing = ~_by_element(e == a, len(e))
                error = self._magnitude(a - e)
                error[np.isnan(error)] = np.inf
            else:
                e, a = decode(expected, self.expected), decode(actual, self.actual)
                differing = e != a
                error = np.zeros(e.size)
                error[differing] = _distance(e[differing], a[differing])
            squares = self._squares(np.where(np.isfinite(error), error, 0))
        needed = math.inf if differing.any() else 0.0  # no tolerance makes these equal
        tops = _tops(error)
        return _compare_chunk(
            error, tops, differing, differing, needed, squares, first, least, nonfinite
        )


def _distance(e: Array, a: Array) -> Array:
    """How far integers are apart, also those beyond 2**53, of which float64 loses the last bits."""
    apart = np.abs(a.astype("<f8") - e.astype("<f8"))
    ours, theirs = e.astype("<u8"), a.astype("<u8")  # modulo 2**64
    exact = np.where(a > e, theirs - ours, ours - theirs)
    return np.asarray(np.where(apart < 2.0**63, exact, apart))


def _compare_chunk(
    error: Array,
    tops: Array,
    differing: Flags,
    beyond: Flags,
    min_atol: float,
    squares: Array,
    first: int,
    least: Least,
    num_nonfinite: tuple[int, int] = (0, 0),
) -> ChunkResult:
    num_differing, num_beyond = _count(differing, error.size), _count(beyond, error.size)
    max_abs = float(tops.max())
    candidates = beyond if num_beyond else differing
    worst: tuple[tuple[float, int], ...] = ()
    if num_differing and max_abs > least[num_beyond > 0]:
        worst = _worst(error, tops, candidates, first, least[num_beyond > 0])
    # The ends of all are known, and to find others costs a copy.
    ends = b"\1" if num_differing == error.size else np.asarray(differing).tobytes()
    return ChunkResult(
        num_differing=num_differing,
        num_beyond=num_beyond,
        max_abs=max_abs,
        min_atol=min_atol,
        squares=tuple(squares.tolist()),
        first=first + ends.find(1) if num_differing else -1,
        last=first + error.size - len(ends) + ends.rfind(1) if num_differing else -1,
        worst=worst,
        num_nonfinite=num_nonfinite,
    )


def _count(flags: Flags, numel: int) -> int:
    return numel * flags if isinstance(flags, bool) else int(np.count_nonzero(flags))


def _num_nonfinite(values: Array) -> int:
    return int(np.count_nonzero(~_by_element(np.isfinite(values), len(values))))


def _by_element(flags: Array, numel: int) -> Array:
    """Whether all flags of an element are set, of one (n,) or several a element."""
    return flags if flags.size == numel else np.asarray(flags.reshape(numel, -1).all(axis=1))


def _top(values: Array) -> float:
    """The greatest value, infinity where one is not a number."""
    top = float(values.max()) if values.size else 0.0
    return math.inf if math.isnan(top) else top


def _tops(error: Array) -> Array:
    """The greatest of each group."""
    return np.maximum.reduceat(error, np.arange(0, error.size, _GROUP_NUMEL))


def _worst(
    error: Array, tops: Array, candidates: Flags, first: int, least: float
) -> tuple[tuple[float, int], ...]:
    """The few candidates that are farthest off, and farther than `least`.

    `error` and `tops` are spent: what was found is taken out of them.
    """
    if not isinstance(candidates, bool) and np.count_nonzero(candidates) <= _FEW:
        where = np.flatnonzero(candidates)
        order = where[np.argsort(-error[where], kind="stable")[:MAX_ELEMENTS]]
        return tuple((float(error[i]), first + int(i)) for i in order if float(error[i]) > least)
    found: list[tuple[float, int]] = []
    sifted = set()
    while len(found) < MAX_ELEMENTS:
        top = int(tops.argmax())  # the first of equal ones, here and below
        if not float(tops[top]) > least:
            break
        start = top * _GROUP_NUMEL
        group = error[start : start + _GROUP_NUMEL]
        if isinstance(candidates, bool) or top in sifted:
            index = int(group.argmax())
            found.append((float(group[index]), first + start + index))
            group[index] = -np.inf
        else:
            # The greatest of all bounds the greatest of the candidates: most groups stay unsifted.
            group[~candidates[start : start + _GROUP_NUMEL]] = -np.inf
            sifted.add(top)
        tops[top] = group.max()
    return tuple(found)
