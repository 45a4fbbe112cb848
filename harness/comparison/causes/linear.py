"""Hypotheses about sums and scales: decided by all values, or by the sketch, which is linear.

In: the fingerprints of both sides, with values or sketches in the same blocks. Out: the `Cause`
that holds for every element to within the rounding of its dtype, or for every block within the
bound of the sketch (chance 1e-12 a block), or None.

For a = c·e + b·1, z_a - c z_e - b z_1 is the sketch of a - (c·e + b·1), so that the bounds by which
close is decided bound how far the hypothesis is from the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from harness.checkpoint.dtypes import Array, DType, numpy_dtype
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, Roundoff, is_constant
from harness.comparison.causes.views import View, floats_of, sample
from harness.fingerprints.arithmetic import as_floats, sums_of_squares
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.sketch import NUM_PROJECTIONS, Sketch, projection

# Fewer elements fit too many hypotheses; so do, for a factor or an offset alone, those that have
# fewer bits than these beyond their first.
_MIN_NUMEL, _MIN_BITS = 8, 40
# |d| is at most this times |z|, at a chance of 1e-12 a block: 1 / sqrt(0.241289).
UPPER = 2.0358
# A block's rounding errors, as a share of its norm, make a bound of at most so many of them.
ROUNDINGS = 12.0
_SAMPLED, _RUNS = 512, 4
_PASS_NUMEL = 1 << 17  # elements at a time: as float64 they stay in the cache


@dataclass(frozen=True, kw_only=True)
class Vector:
    """What is known of a tensor: all of its `values`, or else a sketch of its blocks.

    `rows` (n, k) are added up and compared, `norms` (n,) are of the blocks (of the elements).
    """

    rows: Array
    norms: Array
    is_exact: bool
    numel: int
    block: int = 1

    @property
    def ones(self) -> Array:
        """The rows of a tensor of ones."""
        if self.is_exact:
            return np.ones_like(self.rows)
        return _sketch_of_ones(self.numel, self.block)

    def as_ones(self) -> Vector:
        """A tensor of ones, of this size."""
        if self.is_exact:
            return replace(self, rows=self.ones, norms=np.ones_like(self.norms))
        numels = np.full(len(self.norms), float(self.block))
        numels[-1] = self.numel - self.block * (len(numels) - 1)
        return replace(self, rows=self.ones, norms=np.sqrt(numels))


@lru_cache(maxsize=32)
def _sketch_of_ones(numel: int, block: int) -> Array:
    numbers = projection(block).numbers
    whole, rest = divmod(numel, block)
    rows = [np.broadcast_to(numbers.sum(axis=0), (whole, NUM_PROJECTIONS))]
    if rest:
        rows.append(numbers[None, :rest].sum(axis=1))
    found = np.concatenate(rows)
    found.setflags(write=False)
    return found


def vector_of(tensor: TensorFingerprint, block_nbytes: int) -> Vector | None:
    """What is known of a tensor of finite real numbers; None where nothing, or where it is none."""
    stats = tensor.stats
    if tensor.dtype.kind != "float" or (stats is not None and stats.num_nonfinite):
        return None
    if tensor.values is not None:
        data = np.frombuffer(tensor.values, "|u1")
        values = as_floats(data, tensor.dtype).astype("<f8")
        return of_values(values) if np.isfinite(values).all() else None
    if tensor.sketch is None:
        return None
    return of_sketch(tensor.sketch, tensor.numel, block_numel(tensor.dtype, block_nbytes))


def of_values(values: Array) -> Vector:
    rows = values.reshape(-1, 1)
    return Vector(rows=rows, norms=np.abs(values), is_exact=True, numel=values.size)


def of_sketch(sketch: Sketch, numel: int, block: int) -> Vector:
    return Vector(
        rows=sketch.projections,
        norms=sketch.norms,
        is_exact=False,
        numel=numel,
        block=block,
    )


def are_comparable(one: Vector, other: Vector) -> bool:
    return (
        one.rows.shape == other.rows.shape
        and one.is_exact == other.is_exact
        and (one.is_exact or (one.block == other.block))
    )


def constant(expected: TensorFingerprint | None, actual: TensorFingerprint) -> Cause | None:
    """One value, or one value in the golden: proved by the least and the greatest element."""
    for tensor, was in ((actual, ""), (expected, "was ")):
        if tensor is None or tensor.stats is None or tensor.numel < 2:
            continue
        tail = " in the golden" if was else ""
        if tensor.stats.num_nan == tensor.numel:
            return Cause(kind="constant", text=f"{was}all NaN{tail}", proof="stats", value=math.nan)
        if is_constant(tensor.stats):
            value = tensor.stats.min
            text = "all zero" if value == 0 else f"all {value:.6g}"
            return Cause(kind="constant", text=f"{was}{text}{tail}", proof="stats", value=value)
    return None


@np.errstate(all="ignore")  # what overflows proves nothing
def linear(
    expected: TensorFingerprint, actual: TensorFingerprint, block_nbytes: int
) -> Cause | None:
    """Find c and b so that actual = c · expected + b, the simplest that hold."""
    if expected.shape != actual.shape or expected.numel < 2:
        return None
    if is_constant(expected.stats) or is_constant(actual.stats):
        return None
    ours, theirs = vector_of(expected, block_nbytes), vector_of(actual, block_nbytes)
    roundoff = Roundoff.of(expected.dtype, actual.dtype)
    if ours is None or theirs is None or not are_comparable(ours, theirs) or roundoff.is_coarse:
        return None
    if (expected.numel - 1) * -math.log2(roundoff.relative) < _MIN_BITS:
        return None
    for factor, offset, bound in _holding(ours, theirs, roundoff, actual.dtype):
        return _linear_cause(factor, offset, bound, is_exact=ours.is_exact)
    return None


@np.errstate(all="ignore")
def linear_in_values(evidence: Evidence, expected: View, actual: View) -> Cause | None:
    """The same of large tensors that can both be read: fitted to a sample, then of all values."""
    roundoff = Roundoff.of(expected.dtype, actual.dtype)
    if {expected.dtype.kind, actual.dtype.kind} != {"float"} or roundoff.is_coarse:
        return None
    ours, theirs = (of_values(sample(view, _SAMPLED, runs=_RUNS)) for view in (expected, actual))
    if not (np.ptp(ours.rows) > 0 and np.ptp(theirs.rows) > 0):  # or not finite
        return None
    for factor, offset, _ in _holding(ours, theirs, roundoff, actual.dtype):
        bound = _throughout(evidence, expected, actual, factor, offset, roundoff)
        if bound is not None:
            return _linear_cause(factor, offset, bound, is_exact=True)
    return None


def _throughout(
    evidence: Evidence,
    expected: View,
    actual: View,
    factor: float,
    offset: float,
    roundoff: Roundoff,
) -> float | None:
    """The bound within which all values are factor · expected + offset, as `is_sum` allows."""
    scaled, num_steps = abs(factor), 2 + bool(offset)
    sides = (("expected", expected), ("actual", actual))
    own = 2.0**-23 * scaled + roundoff.relative * (scaled != 1 and bool(offset)) * scaled
    least = (2.0**-23 + roundoff.relative) * abs(offset) + num_steps * roundoff.absolute

    @np.errstate(all="ignore")
    def of_chunk(first: int) -> tuple[float, float] | None:
        e, a = (floats_of(view, first, _PASS_NUMEL, name) for name, view in sides)
        # What was computed in the same way is the same, and known in a fraction of the time.
        product = e * e.dtype.type(factor)
        product = product if not offset else product + e.dtype.type(offset)
        if np.array_equal(product.astype(numpy_dtype(actual.dtype)).astype(a.dtype), a):
            return 0.0, 0.0
        e, a = e.astype("<f8"), a.astype("<f8")
        away = np.abs(a - (factor * e + offset))
        if not np.all(away <= 1.5 * roundoff.relative * np.abs(a) + own * np.abs(e) + least):
            return None
        return float(sums_of_squares(away[None])[0]), float(sums_of_squares(a[None])[0])

    numel = expected.nbytes // expected.dtype.itemsize
    found = evidence.passes(of_chunk, range(0, numel, _PASS_NUMEL))
    if found is None:
        return None
    away, total = (sum(column) for column in zip(*found, strict=True))
    return math.sqrt(away / total) if total else 0.0


def _holding(
    ours: Vector, theirs: Vector, roundoff: Roundoff, dtype: DType
) -> list[tuple[float, float, float]]:
    """Factors and offsets that hold, and the bounds within which they do.

    Those of which rounding makes just these values come first, then the simplest.
    """
    found = []
    for factor, offset in _fits(ours, theirs):
        # The best fit tells whether any number is near enough.
        coarse = Roundoff(4 * roundoff.relative, 4 * roundoff.absolute)
        if _holds(ours, theirs, factor, offset, coarse) is None:
            continue
        for one, other in _simple(factor, offset):
            bound = _holds(ours, theirs, one, other, roundoff)
            if bound is not None and ours.is_exact:
                rounded = (one * ours.rows + other).astype(numpy_dtype(dtype)).astype("<f8")
                bound *= not np.array_equal(rounded, theirs.rows)
            if bound is not None:
                found.append((one, other, bound))
    return sorted(found, key=lambda one: one[2] > 0)


def _fits(ours: Vector, theirs: Vector) -> Iterator[tuple[float, float]]:
    """The factor, the offset, then both, that by least squares explain `theirs`."""
    e, a, ones = ours.rows.ravel(), theirs.rows.ravel(), ours.ones.ravel()
    squares, sums = float(e @ e), float(ones @ ones)
    if not squares or not sums or not np.isfinite(squares + float(a @ a)):
        return
    yield float(e @ a) / squares, 0.0
    yield 1.0, float(ones @ (a - e)) / sums
    if e.size >= _MIN_NUMEL:
        both = np.linalg.lstsq(np.stack([e, ones], axis=1), a, rcond=None)[0]
        yield float(both[0]), float(both[1])


def _simple(factor: float, offset: float) -> Iterator[tuple[float, float]]:
    """The rounder numbers first; a factor of 1 and an offset of 0 are taken as they are."""
    factors = [1.0] if factor == 1.0 else [f for f in simple_numbers(factor) if f != 1.0]
    for one in factors:
        for other in [0.0] if offset == 0.0 else simple_numbers(offset):
            yield one, other


def simple_numbers(number: float) -> list[float]:
    """A number as a person would have chosen it: with few digits, as a fraction, then in full."""
    if not math.isfinite(number) or number == 0:
        return []
    found = [float(f"{number:.{digits}g}") for digits in (1, 2, 3, 4, 6)]
    # Embeddings and attention are scaled by roots: of the width, of the size of a head.
    square = number * number
    if 1e-9 < square < 1e9:
        whole = round(square) if square >= 1 else round(1 / square)
        root = math.sqrt(whole) if square >= 1 else 1 / math.sqrt(whole)
        found.append(math.copysign(root, number))
    return list(dict.fromkeys([*found, number]))


def _holds(
    ours: Vector, theirs: Vector, factor: float, offset: float, roundoff: Roundoff
) -> float | None:
    """The relative bound within which actual = factor · expected + offset, None where beyond."""
    terms = [(factor, ours)]
    if offset:
        terms.append((offset, ours.as_ones()))
    bound = is_sum(theirs, terms, roundoff)
    if bound is None:
        return None
    # A hypothesis that says less than its own bound says nothing.
    effect = np.linalg.norm((factor - 1) * ours.rows + offset * ours.ones)
    away = np.linalg.norm(theirs.rows - factor * ours.rows - offset * ours.ones)
    return bound if effect > 4 * UPPER * away else None


@np.errstate(all="ignore")
def is_sum(
    theirs: Vector, terms: Sequence[tuple[float, Vector]], roundoff: Roundoff
) -> float | None:
    """The relative bound within which a tensor is the sum of factors times others; None: beyond."""
    rest = theirs.rows - sum(factor * vector.rows for factor, vector in terms)
    size = theirs.norms + sum(abs(factor) * vector.norms for factor, vector in terms)
    away = np.linalg.norm(rest, axis=1)
    if theirs.is_exact:
        # What is rounded is each step, the product and the sum, and both numbers to float32.
        steps = [abs(factor) * vector.norms for factor, vector in terms]
        inexact = sum(s for s, (factor, _) in zip(steps, terms, strict=True) if abs(factor) != 1)
        several = (len(terms) > 1) * inexact + max(0, len(terms) - 2) * sum(steps)
        allowed = roundoff.relative * (1.5 * theirs.norms + several) + 2.0**-23 * sum(steps)
        allowed += (1 + len(terms)) * roundoff.absolute
        holds = bool(np.all(away <= allowed))
    else:
        numels = np.full(len(away), float(theirs.block))
        numels[-1] = theirs.numel - theirs.block * (len(away) - 1)
        # Products of the sketch were rounded, too: some 1e-9 of the norms at the most.
        noise = numels * 2.0**-53 * size * np.sqrt(numels * NUM_PROJECTIONS * 2)
        away = (away + noise) * UPPER
        allowed = ROUNDINGS * (roundoff.relative * size + roundoff.absolute * np.sqrt(numels))
        holds = bool(np.all(away <= allowed + 2 * UPPER * noise))
    total = float(np.linalg.norm(theirs.norms))
    return float(np.linalg.norm(away)) / total if holds and total else None


def ceiling(bound: float) -> float:
    """A bound as a power of ten, which many tensors have in common."""
    return 10.0 ** math.ceil(math.log10(bound)) if bound > 0 else 0.0


def _linear_cause(factor: float, offset: float, bound: float, *, is_exact: bool) -> Cause:
    by = "" if factor == 1 else "−" if factor == -1 else f"{factor:.8g} × ".replace("-", "−")
    plus = "" if not offset else f" {'+' if offset > 0 else '−'} {abs(offset):.8g}"
    text = f"{by}the golden{plus}"
    if bound:
        text += f" (to within {ceiling(bound):.0e} of its norm)"
    return Cause(
        kind="scaled" if factor != 1 else "shifted",
        text=text,
        proof="values" if is_exact else "sketch",
        factor=factor if factor != 1 else None,
        offset=offset or None,
        bound=bound,
    )
