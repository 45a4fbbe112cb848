"""How far one tensor is from another, and what that means for allclose.

In: two tensors with different digests: both with their values, or one known by its sketch alone.
Out: a `Difference` with one of four verdicts. Nothing is guessed: what cannot be proved from what
is there is *undecided*.

Where both values are known, `harness.allclose` decides; else the bounds of `harness.sketch` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from harness.allclose import Tally, Tolerance, Values, add_tallies, element, eps, tally_chunk
from harness.checkpoint.tensors import DType, numpy_dtype
from harness.fingerprint import Stats, TensorPrint, block_numel, digest_of
from harness.sketch import CHANCE, Gap, block_ranges, compare_sketches, recover
from harness.streaming import buffers, chunks

Array = np.ndarray[Any, np.dtype[Any]]
Verdict = Literal["identical", "close", "different", "undecided"]
VERDICTS: tuple[Verdict, ...] = ("identical", "close", "undecided", "different")


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


def conclude(
    expected: Values, actual: Values, tallies: Sequence[Tally | None], tolerance: Tolerance
) -> Difference:
    """Join the tallies of all chunks into the exact difference of two tensors."""
    total = add_tallies([tally for tally in tallies if tally is not None])
    numel = expected.numel
    if total.num_differing == 0:
        verdict: Verdict = "identical" if expected.dtype == actual.dtype else "close"
        # Bytes may differ where values do not: -0.0 and 0.0, or two dtypes.
        verdict = "close" if any(tally is not None for tally in tallies) else verdict
        why = "every element is equal"
    elif total.num_beyond == 0:
        verdict, why = "close", f"all {numel:,} elements are within the tolerance"
    else:
        unit = "differ" if tolerance.exact or not expected.dtype.is_floating else "are beyond the tolerance"
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
        where=_where(expected.shape, [(total.first, total.last + 1)])
        if total.num_differing
        else None,
        num_nonfinite=total.num_nonfinite,
    )


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
    golden. With `values`, few changed elements are recovered, and proved by the golden's digest;
    `thorough` searches among more candidates.
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
        return 4 * eps(dtype)
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


Measure = Callable[[Sequence[tuple[TensorPrint, TensorPrint, Tolerance]]], Sequence[Difference]]
"""Measures pairs (expected, actual, tolerance) of tensors that have the same shape."""
