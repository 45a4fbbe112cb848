"""The hypothesis that values have nothing to do with the golden's: never loaded, or made anew.

In: what is known of both sides of tensors without another cause. Out: their correlations, and one
`Cause` for tensors of which none is related and which together are not.

Where both sides' values can be had, the correlation is that of the ranks of a sample, which a few
great elements do not move; its standard error is 1/sqrt(n). Otherwise it is the mean, over blocks,
of the cosine of 16 products: 1/sqrt(16 blocks), whatever the sizes of the blocks are. A tensor
most of whose norm is in a few elements hides the others from its sketch: nothing is said of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import is_constant
from harness.comparison.causes.linear import are_comparable, vector_of
from harness.comparison.causes.views import View, sample, wide_of
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.sketch import NUM_PROJECTIONS, projection
from harness.fingerprints.stats import Stats

_MIN_NUMEL = 16
# What is printed as ± is two standard errors. Three are how far chance takes a group, of which a
# model has some; four and a half how far it takes one tensor. What may be correlated by 0.6, by
# what is printed, is not unrelated.
_SHOWN, _CHANCE, _ALONE = 2.0, 3.0, 4.5
_RELATED = math.atanh(0.6)
# Of a sketch: the greatest square of an element, in mean squares, and as a share of all.
_MAX_PEAK, _MAX_SHARE = 64.0, 0.5
_SAMPLES, _SAMPLE_NUMEL, _BLOCKS = 8, 1024, 8


@dataclass(frozen=True)
class Correlation:
    """How two tensors correlate, and the standard error of that if they do not."""

    value: float
    error: float

    @property
    def weight(self) -> float:
        return 1 / self.error**2

    @property
    def is_related(self) -> bool:
        """Whether chance does not explain it, in a group of many."""
        return _distance(self.value) > _ALONE * self.error


def _distance(value: float) -> float:
    return math.atanh(min(abs(value), 1 - 1e-12))


def sampled(expected: View, actual: View) -> Correlation | None:
    """Correlate the ranks of values that can be read on both sides, in up to 8 places."""
    numel = expected.nbytes // expected.dtype.itemsize
    if numel < _MIN_NUMEL or {expected.dtype.kind, actual.dtype.kind} != {"float"}:
        return None
    one, other = (
        _ranks(sample(view, _SAMPLES * _SAMPLE_NUMEL, runs=_SAMPLES)) for view in (expected, actual)
    )
    if not one.any() or not other.any():
        return None  # a constant
    product, *squares = (
        float((a * b).sum()) for a, b in ((one, other), (one, one), (other, other))
    )
    value = product / math.sqrt(squares[0] * squares[1])
    return Correlation(value, 1 / math.sqrt(one.size - 1))


def _ranks(values: Array) -> Array:
    """Ranks around 0; equal values have the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(ranks[places] - (values.size - 1) / 2)


@np.errstate(all="ignore")
def correlation(
    expected: TensorFingerprint, actual: TensorFingerprint, block_nbytes: int
) -> Correlation | None:
    """Correlate what is known of two tensors of one shape, each without its mean."""
    if expected.shape != actual.shape or expected.numel < _MIN_NUMEL:
        return None
    if is_constant(expected.stats) or is_constant(actual.stats):
        return None
    if expected.values is not None and actual.values is not None:
        return sampled(expected, actual)
    ours, theirs = vector_of(expected, block_nbytes), vector_of(actual, block_nbytes)
    if ours is None or theirs is None or not are_comparable(ours, theirs) or ours.is_exact:
        return None
    if _hides(expected.stats, expected.numel, math.inf) or _hides(
        actual.stats, actual.numel, _MAX_PEAK
    ):
        return None
    means = [0.0 if t.stats is None else t.stats.mean for t in (expected, actual)]
    e, a = ours.rows - means[0] * ours.ones, theirs.rows - means[1] * theirs.ones
    sizes = np.linalg.norm(e, axis=1) * np.linalg.norm(a, axis=1)
    known = sizes > 0
    if not known.any():
        return None
    cosines = (e * a).sum(axis=1)[known] / sizes[known]
    value = float(cosines.mean())
    if not math.isfinite(value):
        return None
    return Correlation(value, 1 / math.sqrt(NUM_PROJECTIONS * len(cosines)))


@np.errstate(all="ignore")
def correlation_of_blocks(
    expected: TensorFingerprint, view: View, block_nbytes: int
) -> Correlation | None:
    """Correlate a few blocks of a view's values with an expected tensor's sketch."""
    sketch, stats = expected.sketch, expected.stats
    if sketch is None or stats is None or _hides(stats, expected.numel, math.inf):
        return None
    block = block_numel(expected.dtype, block_nbytes)
    numbers, cosines = projection(block).numbers, []
    for place in {len(sketch.norms) * i // _BLOCKS for i in range(_BLOCKS)}:
        values = wide_of(view, place * block, block)
        by = numbers[: values.size]
        a = (values - values.mean()) @ by
        e = sketch.projections[place] - stats.mean * by.sum(axis=0)
        cosines.append(float(a @ e / (np.linalg.norm(a) * np.linalg.norm(e))))
    value = float(np.mean(cosines))
    error = 1 / math.sqrt(NUM_PROJECTIONS * len(cosines))
    return Correlation(value, error) if math.isfinite(value) else None


def joint(found: Sequence[Correlation]) -> Correlation | None:
    """One correlation of several: their mean, the surer ones first."""
    if not found:
        return None
    weight = sum(one.weight for one in found)
    return Correlation(sum(one.value * one.weight for one in found) / weight, 1 / math.sqrt(weight))


def _hides(stats: Stats | None, numel: int, peak: float) -> bool:
    """Whether a few elements are so much of a tensor's norm that its sketch shows no others."""
    if stats is None or not stats.l2:
        return False
    share = (max(abs(stats.min), abs(stats.max)) / stats.l2) ** 2
    return share > _MAX_SHARE or share * numel > peak


def unrelated(found: Sequence[Correlation]) -> Cause | None:
    """Say of tensors, none of which is related, that together they have nothing of the golden's."""
    of_all = joint(found)
    if of_all is None:
        return None
    value, error = of_all.value, of_all.error
    distance = _distance(value)
    if distance > _CHANCE * error or distance + _SHOWN * error > _RELATED:
        return None
    said = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
    text = (
        f"unrelated values (correlation {said} ± {max(0.01, _SHOWN * error):.2f}): never loaded, "
        "or initialised again"
    )
    bound = _SHOWN * error
    return Cause(kind="unrelated", text=text, proof="sketch", correlation=value, bound=bound)
