"""Statistics of values: of each part by itself, and joined into those of a tensor.

In: finite values, and sums over runs of them. Out: `Moments` of a part, and `Stats` of all parts;
neither depends on how many threads or ranks have looked at them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.fingerprints.arithmetic import Runs, moments_of_runs, total_squares
from harness.streaming.chunks import buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """float64 statistics over the finite elements (both components of complex ones), and counts.

    int64 beyond 2**53 is rounded; packed types count their bytes.
    """

    min: float
    max: float
    mean: float
    std: float
    l2: float
    num_zero: int
    num_nan: int
    num_posinf: int
    num_neginf: int

    @property
    def num_nonfinite(self) -> int:
        return self.num_nan + self.num_posinf + self.num_neginf

    @property
    def absmax(self) -> float:
        """The greatest magnitude among the finite elements."""
        return max(abs(self.min), abs(self.max))

    def rms(self, numel: int) -> float:
        """The root of the mean square of `numel` elements; 0 of none."""
        return min(self.l2 / math.sqrt(numel), self.absmax) if numel else 0.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Statistics of a part, to be joined (Chan, Golub & LeVeque 1979)."""

    count: int
    min: float
    max: float
    mean: float
    m2: float
    sum_squares: float
    num_zero: int
    num_nan: int
    num_posinf: int
    num_neginf: int


class NonFinite(NamedTuple):
    """How much of a part is not a number, by kind."""

    num_nan: int = 0
    num_posinf: int = 0
    num_neginf: int = 0


def take_out_nonfinite(values: Array) -> tuple[Array, NonFinite]:
    """Set what is not finite to 0 in place, as sketches want it; return the others and a count."""
    where = ~np.isfinite(values)
    num_nan = int(np.count_nonzero(np.isnan(values)))
    num_posinf = int(np.count_nonzero(values == np.inf))
    num_neginf = int(np.count_nonzero(values == -np.inf))
    values[where] = 0.0
    return values[~where], NonFinite(num_nan, num_posinf, num_neginf)


class Extremes(NamedTuple):
    """The least and the greatest of some numbers; either is not finite where any number is not."""

    min: float = 0.0
    max: float = 0.0
    has_zero: bool = False

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.min) and math.isfinite(self.max)


def extremes_of(numbers: Array) -> Extremes:
    """Find the extremes of IEEE numbers by their bits, as integers, which are compared faster.

    Numbers of one sign are ordered as their bits are, NaN beyond infinity. Negative ones are the
    greatest of all as unsigned integers, and as signed ones they are below 0, -0.0 least of all.
    """
    if not numbers.size:
        return Extremes()
    unsigned, signed = (numbers.view(f"<{kind}{numbers.itemsize}") for kind in "ui")
    low, high, lowest, highest = unsigned.min(), unsigned.max(), signed.min(), signed.max()
    bits = [high if lowest < 0 else low, highest if highest >= 0 else low]
    with np.errstate(invalid="ignore"):  # signalling NaN
        ends = np.array(bits, unsigned.dtype).view(numbers.dtype).astype("<f8") + 0.0  # no -0.0
    has_zero = bool(low == 0 or lowest == np.iinfo(signed.dtype).min)
    return Extremes(float(ends[0]), float(ends[1]), has_zero)


def moments_of(values: Array, runs: Runs, extremes: Extremes, nonfinite: NonFinite) -> Moments:
    """Statistics of finite values; `runs` are sums of all of theirs."""
    count = values.size
    if count == 0:
        return Moments(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, *nonfinite)
    num_zero = 0
    if extremes.has_zero:
        # Several times as fast as counting the non-zero numbers themselves.
        is_zero = np.equal(values, 0.0, out=buffers.get("is zero", count, "?"))
        num_zero = int(np.count_nonzero(is_zero))
    with np.errstate(invalid="ignore", over="ignore"):
        mean, squares = float(runs.sums.sum()) / count, float(runs.squares.sum())
        m2 = squares - count * mean * mean
        if not m2 >= squares / 2:  # the mean is no small part of the values: digits cancel
            wide = buffers.get("centred", count, "<f8")
            centred = np.subtract(values, mean, out=wide, dtype="<f8")
            m2 = float(moments_of_runs(centred, 4096).squares.sum())
    return Moments(count, extremes.min, extremes.max, mean, m2, squares, num_zero, *nonfinite)


def stats_of(parts: Sequence[Moments]) -> Stats:
    finite = [part for part in parts if part.count]
    count, mean, m2 = 0, 0.0, 0.0
    for part in finite:
        total = count + part.count
        delta = part.mean - mean
        mean += delta * part.count / total
        m2 += part.m2 + delta * delta * count * part.count / total
        count = total
    return Stats(
        min=min([part.min for part in finite], default=0.0),
        max=max([part.max for part in finite], default=0.0),
        mean=mean,
        std=math.sqrt(m2 / count) if count else 0.0,
        l2=math.sqrt(total_squares(part.sum_squares for part in finite)),
        num_zero=sum([part.num_zero for part in parts]),
        num_nan=sum([part.num_nan for part in parts]),
        num_posinf=sum([part.num_posinf for part in parts]),
        num_neginf=sum([part.num_neginf for part in parts]),
    )
