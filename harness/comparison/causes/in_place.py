"""Hypotheses about every value in its place: its sign, zero, bounds, bytes, or its row's factor.

In: both sides of a tensor of one shape and dtype. Out: a `Cause`: tried on a sample, then proved by
all values; by the golden alone where its digest, its sketch or exact statistics prove it. Memory: a
megabyte a thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, Roundoff, begins_as
from harness.comparison.causes.linear import ceiling
from harness.comparison.causes.views import View, are_same, narrowed, reshaped, sample, wide_of
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.stats import Stats

_SAMPLED, _RUNS = 512, 4
_PASS_NUMEL, _MIN_WIDTH, _FIRST_ROWS = 1 << 17, 8, 16
_RANK_ROWS, _MAX_PEAK = 64, 0.25
_PROBE_NUMEL, _MAX_SHIFT = 16, 1 << 18

# How many values a hypothesis says to be changed; None: it does not hold.
_Test = Callable[[Array, Array], int | None]


@np.errstate(all="ignore")
def in_place(
    evidence: Evidence, known: View, expected: TensorFingerprint, actual: Tensor
) -> Cause | None:
    """Find what was done to each value, where both sides can be read."""
    if expected.dtype.kind != "float" or expected.numel < 2 * _MIN_WIDTH:
        return None
    e, a = (sample(view, _SAMPLED, runs=_RUNS) for view in (known, actual))
    if not np.isfinite(e).all() or not np.isfinite(a).all() or not np.ptp(np.abs(e)):
        return None
    for axis in (0, 1):
        cause = _factors(evidence, known, actual, expected.shape, axis)
        if cause is not None:
            return cause
    if (cause := _of_low_rank(evidence, known, actual, expected)) is not None:
        return cause
    for test, text in _tests(e, a):
        if test(e, a) is None:
            continue
        changed = _throughout(evidence, known, actual, test)
        if changed:
            said = text.format(f"{changed:,} of {expected.numel:,} values")
            return Cause(kind="scaled", text=said, proof="values")
    return None


def _tests(e: Array, a: Array) -> Iterator[tuple[_Test, str]]:
    yield _signs, "the golden with {} negated"
    yield _zeros, "the golden with {} set to zero"
    yield _cut, "the golden with {} cut to bfloat16, toward zero"
    low, high = float(a.min()), float(a.max())
    if low > e.min() or high < e.max():
        # What a sample has at its ends most often bounds all.
        yield (
            lambda e, a: _count(np.array_equal(np.clip(e, low, high), a), e != a),
            f"the golden, clamped to {low:.6g} and {high:.6g}: {{}} changed",
        )


def _count(holds: bool, changed: Array) -> int | None:
    return int(changed.sum()) if holds else None


def _signs(e: Array, a: Array) -> int | None:
    return _count(np.array_equal(np.abs(e), np.abs(a)), e != a)


def _zeros(e: Array, a: Array) -> int | None:
    return _count(bool(((a == e) | (a == 0)).all()), e != a)


def _cut(e: Array, a: Array) -> int | None:
    bits = e.astype("<f4").view("<u4") & np.uint32(0xFFFF0000)
    return _count(np.array_equal(bits.view("<f4"), a.astype("<f4")), e != a)


def _throughout(evidence: Evidence, known: View, actual: View, test: _Test) -> int | None:
    """How many of all values are changed as a hypothesis says; None where it does not hold."""

    def of_chunk(first: int) -> int | None:
        return test(*(wide_of(view, first, _PASS_NUMEL) for view in (known, actual)))

    numel = known.nbytes // known.dtype.itemsize
    found = evidence.passes(of_chunk, range(0, numel, _PASS_NUMEL))
    return None if found is None else sum(found)


def _factors(
    evidence: Evidence, known: View, actual: View, shape: tuple[int, ...], axis: int
) -> Cause | None:
    """Find whether each row, or each column, of the golden was multiplied by a number."""
    count, width = shape[0], math.prod(shape[1:])
    if len(shape) < 2 or (axis and len(shape) > 2) or min(count, width) < _MIN_WIDTH:
        return None
    roundoff = Roundoff.of(known.dtype, actual.dtype)
    if roundoff.is_coarse:
        return None
    across = 1 - axis

    e, a = _rows((known, actual), 0, _FIRST_ROWS, width)
    fixed = _fit(e, a, across) if axis else None
    found, away, total, first = [], 0.0, 0.0, 0
    while first < count:
        evidence.check_time()
        if first:
            step = max(_FIRST_ROWS, _PASS_NUMEL // width)
            e, a = _rows((known, actual), first, step, width)
        first += len(e)
        factors = _fit(e, a, across) if fixed is None else fixed
        rest = np.abs(a - factors * e)
        if not np.all(rest <= 2 * roundoff.relative * np.abs(a) + 4 * roundoff.absolute):
            return None
        found.append(factors.ravel())
        away, total = away + float(np.square(rest).sum()), total + float(np.square(a).sum())
    numbers = np.concatenate(found) if fixed is None else fixed.ravel()
    if np.ptp(numbers) <= 16 * roundoff.relative * np.abs(numbers).max():
        return None  # one factor for all, or none
    name = ("row", "column")[axis]
    bound = math.sqrt(away / total) if total else 0.0
    negated = int((numbers < 0).sum())
    if np.all(np.abs(np.abs(numbers) - 1) <= 2 * roundoff.relative):
        text = f"the golden with {negated:,} of its {numbers.size:,} {name}s negated"
    else:
        low, high = float(numbers.min()), float(numbers.max())
        text = f"each {name} of the golden × a factor of its own, {low:.3g} to {high:.3g}"
    return Cause(kind="scaled", text=text, proof="values", axis=axis, bound=bound)


def _of_low_rank(
    evidence: Evidence, known: View, actual: View, expected: TensorFingerprint
) -> Cause | None:
    """Find whether the golden and a matrix of few dimensions were added up, as a LoRA is merged.

    The first rows of the difference say which dimensions; to within rounding all rows lie in them.
    """
    shape, roundoff = expected.shape, Roundoff.of(known.dtype, actual.dtype)
    if len(shape) != 2 or min(shape) < 4 * _MIN_WIDTH or roundoff.is_coarse:
        return None
    width, first = shape[1], 0
    basis: Array | None = None
    away, total, effect = 0.0, 0.0, 0.0
    while first < shape[0]:
        evidence.check_time()
        step = max(_RANK_ROWS, _PASS_NUMEL // width) if first else _RANK_ROWS
        e, a = _rows((known, actual), first, step, width)
        first += len(e)
        added, size = a - e, float(np.linalg.norm(a))
        if basis is None:
            noise = roundoff.relative * size
            sizes, turned = np.linalg.eigh(added @ added.T)
            counted = sizes > (4 * noise) ** 2
            if not 1 <= counted.sum() <= min(len(e), width) // 4:
                return None
            basis = (turned[:, counted] / np.sqrt(sizes[counted])).T @ added
            own = np.linalg.eigvalsh(e @ e.T) > (4 * noise) ** 2
            if own.sum() <= 2 * len(basis) or np.power(basis, 4).sum(axis=1).max() > _MAX_PEAK:
                return None  # of few dimensions itself, or of few columns
        rest = float(np.linalg.norm(added - (added @ basis.T) @ basis))
        if not rest <= 2 * roundoff.relative * size + roundoff.absolute * math.sqrt(a.size):
            return None
        away, total = math.hypot(away, rest), math.hypot(total, size)
        effect = math.hypot(effect, float(np.linalg.norm(added)))
    if basis is None or effect <= 16 * away:
        return None
    text = (
        f"the golden + a matrix of rank {len(basis)}, as of a LoRA that was merged (to within "
        f"{ceiling(away / total):.0e} of its norm; --adapter FILE says whether it is that one's)"
    )
    return Cause(kind="sum", text=text, proof="values", of=(expected.key,), bound=away / total)


def _rows(sides: Sequence[View], first: int, count: int, width: int) -> list[Array]:
    return [wide_of(side, first * width, count * width).reshape(-1, width) for side in sides]


def _fit(e: Array, a: Array, across: int) -> Array:
    """The factors by least squares; 0 of what is all zero."""
    squares = np.square(e).sum(axis=across, keepdims=True)
    sums = (a * e).sum(axis=across, keepdims=True)
    return np.asarray(np.divide(sums, squares, out=np.zeros_like(sums), where=squares > 0))


def other_bytes(evidence: Evidence, expected: TensorFingerprint, actual: Tensor) -> Cause | None:
    """Find whether the bytes are the golden's in the other order, or some places further on."""
    if expected.dtype != actual.dtype or expected.shape != actual.shape or expected.numel < 2:
        return None
    if expected.dtype.itemsize > 1 and actual.dtype.kind == "float":
        storage = replace(actual.storage, big_endian=not actual.storage.big_endian)
        if evidence.are_bytes_of(replace(actual, storage=storage), expected):
            text = "the golden's bytes in the other byte order (endianness)"
            return Cause(kind="reordered", text=text, proof="digest")
    return _further_on(evidence, expected, actual)


def _further_on(evidence: Evidence, expected: TensorFingerprint, actual: Tensor) -> Cause | None:
    numel, width = expected.numel, math.prod(expected.shape[1:])
    flat = reshaped(actual, (numel,))
    if flat is None:
        return None
    known = evidence.references.get(expected.key)
    other = None if known is None else reshaped(known, (numel,))
    by, proved = 0, numel
    if other is not None:
        by = _place_of(other, flat, 2 * width)
        first, last = max(0, by), numel + min(0, by)
        ours, theirs = narrowed(other, 0, first - by, last - by), narrowed(flat, 0, first, last)
        if not by or not are_same(ours, theirs):
            return None
    elif expected.values is None:
        by, proved = _place_by_sketch(evidence, expected, flat, (1, -1, width, -width))
    if not by or proved < numel // 2:
        return None
    whole, rest = divmod(abs(by), width) if len(expected.shape) > 1 else (0, 1)
    count, unit = (abs(by), "place") if rest else (whole, "row")
    where = "on" if by > 0 else "to the front"
    text = f"the golden's values moved {where} by {count:,} {unit}{'s' * (count > 1)}"
    if other is None:
        text += f" (proved of {proved:,} of {numel:,} values)"
    else:
        text += f": {abs(by):,} {'values are' if abs(by) > 1 else 'value is'} not the golden's"
    return Cause(
        kind="rows" if not rest else "reordered",
        text=text,
        proof="sketch" if other is None else "values",
        axis=None if rest else 0,
    )


def _place_of(known: Tensor, flat: Tensor, most: int) -> int:
    """How much further on some values from the middle stand; 0 where they do not."""
    itemsize, middle = known.dtype.itemsize, known.numel // 2
    reach = min(max(most, 4096), _MAX_SHIFT)
    probe = bytearray(min(_PROBE_NUMEL, known.numel - middle) * itemsize)
    known.read_into(middle * itemsize, memoryview(probe))
    first = max(0, middle - reach)
    window = bytearray((min(known.numel, middle + reach) - first) * itemsize)
    flat.read_into(first * itemsize, memoryview(window))
    place = window.find(probe)
    if place < 0 or place % itemsize or len({*probe}) < 4:
        return 0
    return first + place // itemsize - middle


def _place_by_sketch(
    evidence: Evidence, expected: TensorFingerprint, flat: Tensor, places: tuple[int, ...]
) -> tuple[int, int]:
    """The same by the golden's sketch, and for how many values it proves that."""
    sketch = expected.sketch
    block = block_numel(expected.dtype, evidence.block_nbytes)
    if sketch is None or expected.dtype.kind != "float":
        return 0, 0
    for by in places:
        inner = [
            place
            for place in range(len(sketch.norms))
            if place * block + by >= 0 and min((place + 1) * block, flat.numel) + by <= flat.numel
        ]
        if inner and all(
            begins_as(
                wide_of(flat, place * block + by, min(block, flat.numel - place * block)),
                sketch,
                block,
                place,
            )
            for place in inner
        ):
            return by, sum(min(block, flat.numel - place * block) for place in inner)
    return 0, 0


def zeros(expected: Stats | None, actual: Stats | None, numel: int) -> Cause | None:
    """Say of how many values exact statistics prove that they are zero, and were not."""
    if expected is None or actual is None or actual.num_zero - expected.num_zero <= numel // 10:
        return None
    text = f"{actual.num_zero:,} of {numel:,} values are zero, {expected.num_zero:,} in the golden"
    return Cause(kind="constant", text=text, proof="stats", value=0.0)


def of_one_norm(expected: Stats | None, actual: Stats | None) -> Cause | None:
    """Say of values that do not correlate what exact statistics prove of their sizes."""
    if expected is None or actual is None or expected.num_nonfinite or actual.num_nonfinite:
        return None
    same = expected.absmax == actual.absmax and math.isclose(expected.l2, actual.l2, rel_tol=1e-9)
    if same and expected.num_zero == actual.num_zero and expected.l2:
        text = (
            "values as great as the golden's (the norm, the greatest and the zeros are the same): "
            "other signs, or another order"
        )
        return Cause(kind="reordered", text=text, proof="stats")
    return None


def are_of_one_size(expected: Stats | None, actual: Stats | None, itemsize: int) -> bool:
    """Whether statistics agree as those of unrelated values hardly do."""
    if expected is None or actual is None:
        return False
    ends = {abs(expected.min), abs(expected.max)} & {abs(actual.min), abs(actual.max)}
    are_ends = len(ends - {0.0}) >= (1 if itemsize >= 4 else 2)
    return are_ends or math.isclose(expected.l2, actual.l2, rel_tol=1e-6)
