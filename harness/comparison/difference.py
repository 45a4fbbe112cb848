"""How far one tensor is from another, and what that means for allclose.

In: two tensors with different digests: both with their values, or one known by its sketch alone.
Out: a `Difference` with one of four verdicts. Nothing is guessed: what cannot be proved from what
is there is *undecided*.

Where both values are known, `allclose` decides; else the bounds of `fingerprints.sketch` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Literal

import numpy as np

from harness.checkpoint.dtypes import Array, DType, decode
from harness.comparison.allclose import sum_up_chunk, sum_up_nonfinite
from harness.comparison.chunk_result import MAX_STRIP, ChunkResult, Values, add_results, run_numel
from harness.comparison.policy import Tolerance
from harness.fingerprints.arithmetic import total_squares
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.fingerprints.stats import Stats
from harness.streaming.chunks import chunks

Verdict = Literal["identical", "close", "different", "undecided"]


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
    the rtol in force. `about` is the likely size of `max_abs` where it is known well. `rms` is of
    actual - expected, estimated unless `is_exact`. `num_differing`
    and `num_beyond` (the tolerance) are known only where the values are. `where` names the range
    of the first axis that changed. `strip` shows where: the rms of actual - expected over up to
    `MAX_STRIP` equal ranges of the tensor in logical order, 0.0 where nothing changed, empty where
    it is not known. `stats` are those of both sides, where they are known. `chance` bounds the
    probability that a proved verdict is wrong.
    """

    verdict: Verdict
    why: str
    is_exact: bool
    tolerance: Tolerance
    numel: int
    max_abs: tuple[float, float]
    min_atol: tuple[float, float]
    rms: float
    about: float | None = None
    num_differing: int | None = None
    num_beyond: int | None = None
    elements: tuple[Element, ...] = ()
    where: str | None = None
    strip: tuple[float, ...] = ()
    num_nonfinite: tuple[int, int] = (0, 0)
    stats: tuple[Stats | None, Stats | None] = (None, None)
    chance: float = 0.0

    def __repr__(self) -> str:
        low, high = self.max_abs
        ends = f"{low:.3g}" if low == high else f"{low:.2g} to {high:.2g}"
        return f"<Difference {self.verdict}: {self.why[:110]}; max {ends}>"


def round_outward(ends: tuple[float, float]) -> tuple[float, float]:
    """Round bounds to the two digits that a person reads, so that they still hold.

    Equal ends are no bounds, but a number: it stays.
    """
    low, high = ends
    if low == high:
        return ends
    return _rounded(low, 2, ROUND_FLOOR), _rounded(high, 2, ROUND_CEILING)


def sufficient_atol(min_atol: tuple[float, float]) -> tuple[float, float]:
    """Round a least tolerance as `round_outward` does, and to three digits up where it is known."""
    low, high = min_atol
    return round_outward(min_atol) if low != high else (_rounded(high, 3, ROUND_CEILING),) * 2


def _rounded(value: float, digits: int, rounding: str) -> float:
    if not math.isfinite(value):
        return value
    return float(Context(prec=digits, rounding=rounding).create_decimal_from_float(value))


def conclude(
    expected: Values, actual: Values, results: Sequence[ChunkResult | None], tolerance: Tolerance
) -> Difference:
    """Join the results of all chunks into the exact difference of two tensors.

    Chunks that are the same are read once more where others are not: they may hold NaN or infinity.
    """
    if any(result is not None for result in results):
        results = [
            sum_up_nonfinite(actual, chunk, tolerance) if result is None else result
            for chunk, result in zip(chunks(expected.nbytes), results, strict=True)
        ]
    total = add_results([result for result in results if result is not None])
    numel = expected.numel
    if total.num_differing == 0:
        verdict: Verdict = "identical" if expected.dtype == actual.dtype else "close"
        # Bytes may differ where values do not: -0.0 and 0.0, or two dtypes.
        verdict = "close" if any(result is not None for result in results) else verdict
        why = "every element is equal"
    elif total.num_beyond == 0:
        verdict, why = "close", f"all {numel:,} elements are within the tolerance"
    else:
        unit = (
            "differ"
            if tolerance.exact or not expected.dtype.is_floating
            else "are beyond the tolerance"
        )
        verdict, why = "different", f"{total.num_beyond:,} of {numel:,} elements {unit}"
    return Difference(
        verdict=verdict,
        why=why,
        is_exact=True,
        tolerance=tolerance,
        numel=numel,
        max_abs=(total.max_abs, total.max_abs),
        min_atol=(total.min_atol, total.min_atol),
        rms=math.sqrt(total_squares(total.squares) / numel) if numel else 0.0,
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
        where=place_of(expected.shape, [(total.first, total.last + 1)])
        if total.num_differing
        else None,
        strip=_exact_strip(expected, results) if total.num_differing else (),
        num_nonfinite=total.num_nonfinite,
    )


def _exact_strip(tensor: Values, results: Sequence[ChunkResult | None]) -> tuple[float, ...]:
    run = run_numel(tensor.numel)
    squares: list[float] = []
    for chunk, result in zip(chunks(tensor.nbytes), results, strict=True):
        num_runs = -(-chunk.nbytes // tensor.dtype.itemsize // run)
        squares += [0.0] * num_runs if result is None else result.squares
    return profile_of(squares, run, tensor.numel)


def profile_of(squares: Sequence[float], run: int, numel: int) -> tuple[float, ...]:
    """The rms over at most MAX_STRIP ranges, from sums of squares over runs of elements."""
    per_range = -(-len(squares) // MAX_STRIP)
    if len(squares) < 2:
        return ()
    found = []
    for first in range(0, len(squares), per_range):
        count = min((first + per_range) * run, numel) - first * run
        found.append(math.sqrt(total_squares(squares[first : first + per_range]) / count))
    return tuple(found)


def unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of the element at a place in logical (C) order."""
    indices = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        indices.append(rest)
    return tuple(reversed(indices))


def place_of(shape: tuple[int, ...], ranges: Sequence[tuple[int, int]]) -> str | None:
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


def exact_difference(expected: Values, actual: Values, tolerance: Tolerance) -> Difference:
    """Compare two tensors whose values can be read, on this thread."""
    results = [sum_up_chunk(expected, actual, c, tolerance) for c in chunks(expected.nbytes)]
    return conclude(expected, actual, results, tolerance)


Measure = Callable[
    [Sequence[tuple[TensorFingerprint, TensorFingerprint, Tolerance]]], Sequence[Difference]
]
"""Measures pairs (expected, actual, tolerance) of tensors that have the same shape."""


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
