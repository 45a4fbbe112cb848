"""How far one tensor is from another, and what that means for allclose.

In: two tensors with different digests: both with their values, or one known by its sketch alone.
Out: a `Difference` with one of four verdicts. Nothing is guessed: what cannot be proved from what
is there is *undecided*.

The promise is `torch.allclose(actual, expected, rtol, atol)`, element by element
|actual - expected| <= atol + rtol * |expected| in the arithmetic of the dtype, and never where
a NaN is. Integer, bool and packed tensors must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from blake3 import blake3

from harness.checkpoint.tensors import DType, decode, numpy_dtype
from harness.fingerprint import (
    Stats,
    TensorPrint,
    block_numel,
    digest_of,
    widen,
)
from harness.sketch import CHANCE, Gap, block_ranges, compare_sketches, recover
from harness.streaming import Chunk, buffers, chunks

Array = np.ndarray[Any, np.dtype[Any]]
Verdict = Literal["identical", "close", "different", "undecided"]
VERDICTS: tuple[Verdict, ...] = ("identical", "close", "undecided", "different")

MAX_ELEMENTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What allclose allows; `exact` allows nothing."""

    atol: float = 1e-5
    rtol: float = 1e-5
    exact: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One element that differs: its index in the tensor, and its value on both sides."""

    index: tuple[int, ...]
    expected: float | complex | int | bool
    actual: float | complex | int | bool


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor differs.

    `max_abs` and `min_atol` are intervals (lower, upper), equal ends where they are known:
    the greatest |actual - expected|, and the least atol under which the tensor would pass with
    the rtol in force. `rms` is of actual - expected, estimated unless `is_exact`. `num_differing`
    and `num_beyond` (the tolerance) are known only where the values are. `where` names the range
    of the first axis that changed. `chance` bounds the probability that a proved verdict is wrong.
    """

    verdict: Verdict
    why: str
    is_exact: bool
    tolerance: Tolerance
    numel: int
    max_abs: tuple[float, float]
    min_atol: tuple[float, float]
    rms: float
    num_differing: int | None = None
    num_beyond: int | None = None
    elements: tuple[Element, ...] = ()
    where: str | None = None
    num_nonfinite: tuple[int, int] = (0, 0)
    chance: float = 0.0


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


# Both sides at hand: element by element.


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
    if same_type and np.array_equal(ours.view(_WORD[ours.size % 8]), theirs.view(_WORD[ours.size % 8])):
        return None
    first = chunk.start // expected.dtype.itemsize
    kernel = _Kernel(expected.dtype, actual.dtype, tolerance)
    tallies = []
    for start in range(0, ours.size // expected.dtype.itemsize, _PASS_NUMEL):
        stop = start + _PASS_NUMEL
        a = theirs[start * actual.dtype.itemsize : stop * actual.dtype.itemsize]
        e = ours[start * expected.dtype.itemsize : stop * expected.dtype.itemsize]
        tallies.append(kernel.tally(e, a, first + start))
    return _add(tallies)


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
        self.slack = 4 * float(_eps(expected)) if narrow else 0.0

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
            min_atol=top,
            sum_squares=float(error @ error),
            first=first + int(differing[0]) if differing.size else -1,
            last=first + int(differing[-1]) if differing.size else -1,
            worst=tuple(
                sorted(
                    ((float(size), first + int(i)) for size, i in zip(error[:4096], differing, strict=False)),
                    key=lambda item: (-item[0], item[1]),
                )[:MAX_ELEMENTS]
            ),
        )


def _eps(dtype: DType) -> float:
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


def _add(tallies: Sequence[Tally]) -> Tally:
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


def conclude(
    expected: Values, actual: Values, tallies: Sequence[Tally | None], tolerance: Tolerance
) -> Difference:
    """Join the tallies of all chunks into the exact difference of two tensors."""
    total = _add([tally for tally in tallies if tally is not None])
    numel = expected.numel
    if total.num_differing == 0:
        verdict: Verdict = "identical" if expected.dtype == actual.dtype else "close"
        # Bytes may differ where values do not: -0.0 and 0.0, or two dtypes.
        verdict = "close" if any(tally is not None for tally in tallies) else verdict
        why = "every element is equal"
    elif total.num_beyond == 0:
        verdict, why = "close", f"all {numel:,} elements are within the tolerance"
    else:
        unit = "differ" if tolerance.exact or not expected.dtype.is_floating else "are beyond it"
        verdict, why = "different", f"{total.num_beyond:,} of {numel:,} elements {unit}"
    return Difference(
        verdict=verdict,
        why=why,
        is_exact=True,
        tolerance=tolerance,
        numel=numel,
        max_abs=(total.max_abs, total.max_abs),
        min_atol=(total.min_atol, total.min_atol),
        rms=math.sqrt(total.sum_squares / numel) if numel else 0.0,
        num_differing=total.num_differing,
        num_beyond=total.num_beyond,
        elements=tuple(
            Element(
                index=unravel(index, expected.shape),
                expected=element(expected, index),
                actual=element(actual, index),
            )
            for _, index in total.worst
        ),
        where=_where(expected.shape, [(total.first, total.last + 1)]) if total.num_differing else None,
        num_nonfinite=total.num_nonfinite,
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


def unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of the element at a place in logical (C) order."""
    indices = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        indices.append(rest)
    return tuple(reversed(indices))


def _where(shape: tuple[int, ...], ranges: Sequence[tuple[int, int]]) -> str | None:
    """Name ranges of elements by the rows (indices of the first axis) that they touch."""
    if len(shape) < 2 or not ranges:
        return None
    row = math.prod(shape[1:])
    rows: list[list[int]] = []
    for start, stop in ranges:
        first, last = start // row, (stop - 1) // row
        if rows and first <= rows[-1][1] + 1:
            rows[-1][1] = max(rows[-1][1], last)
        else:
            rows.append([first, last])
    if rows == [[0, shape[0] - 1]]:
        return None
    named = [f"{a}" if a == b else f"{a}-{b}" for a, b in rows[:4]]
    more = f" and {len(rows) - 4} more ranges" if len(rows) > 4 else ""
    return f"row{'s' if len(rows) > 1 or rows[0][0] != rows[0][1] else ''} {', '.join(named)}{more}"


# The expected side known by its fingerprint alone.


def difference_from_sketch(
    expected: TensorPrint,
    actual: TensorPrint,
    tolerance: Tolerance,
    block_nbytes: int,
    values: Values | None,
    *,
    thorough: bool = True,
) -> Difference:
    """Decide allclose from two fingerprints, and `values` of the actual side if they can be read.

    `actual` must carry stats and, for large floating tensors, a sketch in the blocks of the
    golden. With `values`, few changed elements are recovered, and proved by the golden's digest; `thorough` searches
    among more candidates.
    """
    if expected.values is not None and actual.values is not None and values is None:
        values = actual
    if expected.values is not None and values is not None:
        return exact_difference(expected, values, tolerance)
    ours, theirs = expected.stats, actual.stats
    nonfinite = (ours.num_nonfinite if ours else 0, theirs.num_nonfinite if theirs else 0)
    blank = Difference(
        verdict="different",
        why="its digest differs",
        is_exact=False,
        tolerance=tolerance,
        numel=expected.numel,
        max_abs=(0.0, math.inf),
        min_atol=(0.0, math.inf),
        rms=math.nan,
        num_nonfinite=nonfinite,
    )
    if not expected.dtype.is_floating or not actual.dtype.is_floating:
        return replace(blank, why=f"{expected.dtype} must be equal, and its digest differs")
    if ours is None or theirs is None or expected.sketch is None or actual.sketch is None:
        return replace(
            blank,
            verdict="different" if tolerance.exact else "undecided",
            why="the golden keeps neither its values nor a sketch",
        )
    if expected.sketch.projections.shape != actual.sketch.projections.shape:
        return replace(
            blank,
            verdict="different" if tolerance.exact else "undecided",
            why="the two goldens have sketches of different block sizes",
        )
    components = expected.numel * (2 if expected.dtype.kind == "complex" else 1)
    size = block_numel(expected.dtype, block_nbytes)
    gap = compare_sketches(expected.sketch, actual.sketch, size, components)
    bounded = _bounded(blank, gap, ours, theirs, expected, size)
    if values is not None and expected.dtype == actual.dtype and expected.digest is not None:
        recovered = _recovered(bounded, gap, size, expected, values, thorough)
        if recovered is not None:
            return recovered
    return bounded


def exact_difference(expected: Values, actual: Values, tolerance: Tolerance) -> Difference:
    """Compare two tensors whose values can be read, on this thread."""
    tallies = [tally_chunk(expected, actual, c, tolerance) for c in chunks(expected.nbytes)]
    return conclude(expected, actual, tallies, tolerance)


def _bounded(
    blank: Difference, gap: Gap, ours: Stats, theirs: Stats, expected: TensorPrint, size: int
) -> Difference:
    tolerance = blank.tolerance
    assert expected.sketch is not None
    upper = float(gap.upper.max(initial=0.0))
    # Where the expected side has its greatest element, the actual one has no greater than its own.
    outer = max(abs(theirs.max - ours.max), abs(theirs.min - ours.min))
    if any(blank.num_nonfinite):
        outer = 0.0  # the extremes are over finite elements only, which may not be the same ones
    lower = max(outer, float((gap.lower / np.sqrt(gap.numels)).max(initial=0.0)))
    blocks = gap.changed
    complex_factor = 2 if expected.dtype.kind == "complex" else 1
    ranges = [
        (first * size // complex_factor, min(last * size // complex_factor, expected.numel))
        for first, last in block_ranges(blocks)
    ]
    found = replace(
        blank,
        max_abs=(lower, upper),
        min_atol=(max(0.0, lower - tolerance.rtol * ours.absmax), upper),
        rms=gap.rms,
        where=_where(expected.shape, ranges),
        chance=CHANCE * 2 * len(gap.upper),
    )
    num_nan = ours.num_nan + theirs.num_nan
    if tolerance.exact:
        return replace(found, why="its bytes differ, and --exact allows nothing", chance=0.0)
    if num_nan:
        return replace(
            found,
            why=f"holds NaN ({ours.num_nan:,} expected, {theirs.num_nan:,} actual), which is "
            "close to nothing",
            min_atol=(math.inf, math.inf),
            chance=0.0,
        )
    counts = (ours.num_posinf, ours.num_neginf), (theirs.num_posinf, theirs.num_neginf)
    if counts[0] != counts[1]:
        return replace(
            found,
            why=f"its infinities changed in number ({blank.num_nonfinite[0]:,} expected, "
            f"{blank.num_nonfinite[1]:,} actual)",
            min_atol=(math.inf, math.inf),
            chance=0.0,
        )
    limit = tolerance.atol * (1 + _slack(expected.dtype)) + _subnormal(expected.dtype)
    share = tolerance.rtol * (1 + _slack(expected.dtype))
    allowed = np.sqrt(gap.numels) * limit + share * expected.sketch.norms
    if outer > limit + share * ours.absmax:
        return replace(found, why="its least or greatest element moved beyond the tolerance")
    if np.any(gap.lower > allowed):
        count = int(np.count_nonzero(gap.lower > allowed))
        return replace(found, why=f"proved by the sketch of {count:,} of {len(gap.lower):,} blocks")
    if blank.num_nonfinite == (0, 0) and upper <= tolerance.atol:
        return replace(found, verdict="close", why=f"no element is off by more than {upper:.1e}")
    return replace(
        found,
        verdict="undecided",
        why="the golden's sketch can prove neither close nor different",
        chance=0.0,
    )


def _slack(dtype: DType) -> float:
    """Relative rounding of torch's own test in this dtype, generously."""
    if dtype.itemsize <= 2:
        return 4 * _eps(dtype)
    return 1e-15 if dtype.name in ("float64", "complex128") else 1e-6


def _subnormal(dtype: DType) -> float:
    """Absolute rounding of torch's own test in this dtype: float16 has coarse subnormals."""
    return 2.0**-22 if dtype.name in ("float16", "complex32") else 0.0


def _recovered(
    bounded: Difference,
    gap: Gap,
    size: int,
    expected: TensorPrint,
    actual: Values,
    thorough: bool,
) -> Difference | None:
    """Find the few elements that changed, and prove it by rebuilding the expected digest."""
    changes = recover(gap, size, thorough=thorough)
    if changes is None or expected.dtype.kind != "float" or expected.dtype.name == "float8_e8m0fnu":
        return None
    dtype = numpy_dtype(expected.dtype)
    restored: dict[int, bytes] = {}
    for index, delta in changes:
        now = element(actual, index)
        assert isinstance(now, float)
        before = (now if math.isfinite(now) else 0.0) - delta
        restored[index] = np.array([before], dtype="<f8").astype(dtype).tobytes()
    patched = _Patched(actual, restored)
    digests = []
    for chunk in chunks(patched.nbytes):
        data = buffers.get("chunk", chunk.nbytes)
        patched.read_into(chunk.start, data.data)
        digests.append(blake3(data.data).digest())
    if digest_of(expected.dtype, expected.shape, digests) != expected.digest:
        return None
    found = exact_difference(patched, actual, bounded.tolerance)
    return replace(
        found,
        why=f"{found.why}; recovered from the sketch, proved by the digest",
        num_nonfinite=bounded.num_nonfinite,
    )


class _Patched:
    """A tensor with a few elements replaced."""

    def __init__(self, base: Values, elements: dict[int, bytes]) -> None:
        self.key, self.dtype, self.shape = base.key, base.dtype, base.shape
        self.numel, self.nbytes = base.numel, base.nbytes
        self._base, self._elements = base, elements

    def read_into(self, start: int, buffer: memoryview) -> None:
        self._base.read_into(start, buffer)
        itemsize = self.dtype.itemsize
        for index, value in self._elements.items():
            offset = index * itemsize - start
            if 0 <= offset < len(buffer):
                buffer[offset : offset + itemsize] = value


Measure = Callable[
    [Sequence[tuple[TensorPrint, TensorPrint, Tolerance]]], Sequence[Difference]
]
"""Measures pairs (expected, actual, tolerance) of tensors that have the same shape."""
