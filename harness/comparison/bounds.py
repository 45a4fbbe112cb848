"""What two sketches prove about a difference: bounds, and single elements that changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3

from harness.checkpoint.dtypes import DTYPES, numpy_dtype
from harness.checkpoint.tensors import Tensor
from harness.comparison.chunk_result import Values
from harness.comparison.difference import (
    Difference,
    Element,
    element,
    exact_difference,
    place_of,
    profile_of,
    round_outward,
    unravel,
)
from harness.comparison.policy import Tolerance
from harness.fingerprints.arithmetic import as_floats
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel, digest_of
from harness.fingerprints.residues import (
    BLOCK_NUMEL,
    Allowance,
    Checked,
    Residues,
    check,
    judge,
    roundings,
)
from harness.fingerprints.sketch import (
    CHANCE,
    MAX_RECOVERED,
    NUM_PROJECTIONS,
    Gap,
    block_ranges,
    compare_sketches,
    recover,
)
from harness.streaming.chunks import Chunk, buffers, chunks

# The expected side known by its fingerprint alone.


def difference_from_sketch(
    expected: TensorFingerprint,
    actual: TensorFingerprint,
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
    same_type = expected.dtype == actual.dtype
    if not expected.dtype.is_floating or expected.dtype.kind != actual.dtype.kind:
        if same_type:
            return replace(blank, why=f"{expected.dtype} must be equal, and its digest differs")
        return _across_types(blank, expected, actual)
    if ours is None or theirs is None or expected.sketch is None or actual.sketch is None:
        return replace(
            blank,
            verdict="different" if tolerance.exact and same_type else "undecided",
            why="the golden keeps neither its values nor a sketch",
        )
    if expected.sketch.projections.shape != actual.sketch.projections.shape:
        return replace(
            blank,
            verdict="different" if tolerance.exact and same_type else "undecided",
            why="the two goldens have sketches of different block sizes",
        )
    components = expected.numel * expected.dtype.num_components
    size = block_numel(expected.dtype, block_nbytes)
    gap = compare_sketches(expected.sketch, actual.sketch, size, components)
    bounded = _bounded(blank, gap, expected, actual, size)
    if values is not None and expected.dtype == actual.dtype and expected.dtype.kind == "float":
        return _recovered(bounded, gap, size, expected, values, thorough)
    return bounded


def _across_types(
    blank: Difference, expected: TensorFingerprint, actual: TensorFingerprint
) -> Difference:
    """Decide whether elements of two dtypes are equal: digests are of the dtype as well."""
    ours, theirs = expected.stats, actual.stats
    if (
        ours is not None
        and theirs is not None
        and {"int", "bool", "float"}
        >= {
            expected.dtype.kind,
            actual.dtype.kind,
        }
    ):
        if (ours.min, ours.max) != (theirs.min, theirs.max):
            return replace(blank, why="its minimum or maximum differs")
        if ours.num_zero != theirs.num_zero or any(blank.num_nonfinite):
            return replace(blank, why="it holds another number of zeros or of numbers at all")
    return replace(
        blank,
        verdict="undecided",
        why="the golden keeps no values of it, and digests of "
        f"{expected.dtype} and {actual.dtype} cannot be compared",
    )


def _bounded(
    blank: Difference, gap: Gap, expected: TensorFingerprint, actual: TensorFingerprint, size: int
) -> Difference:
    """Decide by the bounds of the sketches, and by the stats."""
    ours, theirs, sketch = expected.stats, actual.stats, expected.sketch
    assert ours is not None
    assert theirs is not None
    assert sketch is not None
    tolerance, factor = blank.tolerance, expected.dtype.num_components
    # An element is off by no more than its block is, and some element by no less than the mean.
    numels = gap.numels / factor
    span = max(theirs.max - ours.min, ours.max - theirs.min) * math.sqrt(factor)
    upper = min(float(gap.upper.max(initial=0.0)), span)
    # Where the expected side has its greatest element, the actual one has no greater than its own.
    # Infinities that moved may hide that element, but then no tolerance is enough.
    outer = max(abs(theirs.max - ours.max), abs(theirs.min - ours.min))
    lower = max(outer, float((gap.lower / np.sqrt(numels)).max(initial=0.0)))
    # Stats are of components, |expected| is at most so much; norms are rounded (where they
    # overflow, the bounds are infinite).
    greatest = ours.absmax * math.sqrt(factor)
    norms = np.minimum(sketch.norms, 1e300) * (1 + 1e-11)
    needed = max(
        outer - tolerance.rtol * greatest,
        float(((gap.lower - tolerance.rtol * norms) / np.sqrt(numels)).max(initial=0.0)),
    )
    ranges = [
        (first * size // factor, min(-(-last * size // factor), expected.numel))
        for first, last in block_ranges(gap.changed)
    ]
    found = replace(
        blank,
        max_abs=(lower, upper),
        min_atol=(max(0.0, needed), upper),
        rms=gap.rms * math.sqrt(factor),
        where=place_of(expected.shape, ranges),
        strip=profile_of((gap.squares * factor).tolist(), size, expected.numel * factor),
        chance=CHANCE * 2 * len(gap.upper),
    )
    if any(blank.num_nonfinite):
        # Not known to stand at the same places, where they would be equal.
        found = replace(found, max_abs=(lower, math.inf), min_atol=(max(0.0, needed), math.inf))
    endless = (math.inf, math.inf)
    beyond_any = replace(found, max_abs=endless, min_atol=endless, chance=0.0)
    num_nan = ours.num_nan + theirs.num_nan
    same_type = expected.dtype == actual.dtype
    if tolerance.exact and same_type:
        return replace(found, why="its bytes differ, and --exact allows nothing", chance=0.0)
    if num_nan:
        why = f"holds NaN ({ours.num_nan:,} expected, {theirs.num_nan:,} actual)"
        return replace(beyond_any, why=f"{why}, which never compares close")
    if (ours.num_posinf, ours.num_neginf) != (theirs.num_posinf, theirs.num_neginf):
        why = f"its infinities changed in number ({blank.num_nonfinite[0]:,} expected, "
        return replace(beyond_any, why=f"{why}{blank.num_nonfinite[1]:,} actual)")
    # What torch allows, rounding included: of two dtypes, what the narrower one would.
    relative, absolute = (
        max(both) for both in zip(roundings(expected.dtype), roundings(actual.dtype), strict=True)
    )
    allows = not tolerance.exact
    limit = allows * (tolerance.atol * (1 + relative) + absolute)
    share = allows * (tolerance.rtol * (1 + relative) + absolute)
    if outer > limit + share * greatest:
        why = "its minimum or maximum moved beyond the tolerance"
        return replace(found, why=why, chance=0.0)
    proofs = np.count_nonzero(gap.lower > np.sqrt(numels) * limit + share * norms)
    if proofs:
        return replace(found, why=f"proved by the sketch of {proofs:,} of {len(numels):,} blocks")
    # |expected| is at least so much where all of it has one sign.
    smallest = max(0.0, ours.min, -ours.max)
    more = max(0.0, (tolerance.rtol - absolute) * smallest - absolute)
    if not any(blank.num_nonfinite) and allows and upper * (1 + relative) <= tolerance.atol + more:
        why = f"no element is off by more than {round_outward((lower, upper))[1]:.1e}"
        return replace(found, verdict="close", why=why)
    return replace(
        found,
        verdict="undecided",
        why="the golden's sketch can prove neither close nor different",
        chance=0.0,
    )


@dataclass(frozen=True)
class Beside:
    """A tensor that can be read and what is kept of another, as work for `map_chunks`."""

    residues: Residues
    actual: Tensor | TensorFingerprint

    @property
    def nbytes(self) -> int:
        return self.actual.nbytes

    def part(self, chunk: Chunk) -> Beside:
        return Beside(self.residues, self.actual.part(chunk.start, chunk.nbytes))


def check_chunk(pair: Beside, chunk: Chunk) -> Checked:
    """Look at one chunk beside the residues of as many elements."""
    dtype = pair.actual.dtype
    data = buffers.get("chunk", chunk.nbytes)
    pair.actual.read_into(chunk.start, data.data)
    first, numel = chunk.start // dtype.itemsize, chunk.nbytes // dtype.itemsize
    return check(as_floats(data, dtype), pair.residues.part(first, numel))


def can_check(
    difference: Difference, expected: TensorFingerprint, actual: TensorFingerprint
) -> bool:
    """Whether residues may decide what sketches could not."""
    has_both = expected.residues is not None and actual.dtype.kind == "float"
    return has_both and difference.verdict == "undecided" and not difference.tolerance.exact


def by_residues(
    difference: Difference,
    expected: TensorFingerprint,
    actual: Values,
    checked: Sequence[Checked],
    *,
    option: str = "--atol",
) -> Difference:
    """Decide what sketches could not, from the chunks of the actual side beside the residues.

    `option` of `record` is what says their tolerance.
    """
    assert expected.residues is not None
    assert expected.stats is not None
    grid, tolerance, blocks = expected.residues.grid, difference.tolerance, Checked.joined(checked)
    # Of two dtypes the values are compared as they are, in float64.
    exact = DTYPES["float64"]
    relative, absolute = roundings(expected.dtype if expected.dtype == actual.dtype else exact)
    asked = Allowance(
        atol=tolerance.atol, rtol=tolerance.rtol, relative=relative, absolute=absolute
    )
    found = judge(blocks, grid, asked, expected.stats.absmax)
    low, high = difference.max_abs
    ends = max(low, found.max_abs[0]), min(high, found.max_abs[1])
    needed = (
        max(difference.min_atol[0], found.min_atol[0]),
        min(difference.min_atol[1], found.min_atol[1], ends[1]),
    )
    if found.verdict == "different" and tolerance.rtol <= grid.rtol:
        needed = max(needed[0], min(grid.atol, tolerance.atol)), needed[1]
    told = replace(
        difference,
        verdict=found.verdict,
        max_abs=ends,
        about=found.about if math.isfinite(ends[1]) else None,
        min_atol=needed,
        chance=2.0**-64 * len(blocks.fits),
    )
    if found.verdict == "close":
        return replace(told, why="every element is within the tolerance, by the golden's residues")
    if found.verdict == "different":
        many = f"{found.beyond:,} of {len(blocks.fits):,} blocks"
        one = "an element is" if len(blocks.fits) == 1 else f"an element in {many} is"
        elements = tuple(
            Element(
                index=unravel(index, expected.shape), expected=value, actual=element(actual, index)
            )
            for index, value in found.elements
        )
        # Another digest is no matter of chance; where it fits, 64 bits may collide.
        chance = told.chance if elements else 0.0
        why = f"{one} beyond the tolerance"
        return replace(told, why=why, elements=elements, chance=chance)
    if not found.is_measured:
        least = f"{tolerance.atol:g}"
        return replace(
            told,
            why=f"recorded for atol {grid.atol:g}, rtol {grid.rtol:g}: larger differences are not "
            f"measured; record with {option} {least}",
            chance=0.0,
        )
    low, high = round_outward(found.share)
    why = f"its greatest difference is {low:g} to {high:g} of the tolerance"
    return replace(told, why=why, chance=0.0)


def difference_from_values(
    expected: TensorFingerprint,
    actual: TensorFingerprint,
    tolerance: Tolerance,
    block_nbytes: int,
    values: Tensor,
    *,
    option: str,
) -> Difference:
    """Decide allclose by all that is kept of the expected side, on this thread.

    Elements are not recovered.
    """
    kept = values if expected.values is not None else None
    found = difference_from_sketch(expected, actual, tolerance, block_nbytes, kept)
    if expected.residues is not None and can_check(found, expected, actual):
        pair = Beside(expected.residues, values)
        checked = [check_chunk(pair, chunk) for chunk in chunks(values.nbytes)]
        found = by_residues(found, expected, values, checked, option=option)
    return replace(found, stats=(expected.stats, actual.stats))


def _recovered(
    bounded: Difference,
    gap: Gap,
    size: int,
    expected: TensorFingerprint,
    actual: Values,
    thorough: bool,
) -> Difference:
    """Find the few elements that changed, and prove it by rebuilding the expected digest.

    float64 has more digits than the sketch, so that the digest is seldom met: then the verdict
    stays what the bounds prove, and the elements are named with about the value they had.
    """
    block = BLOCK_NUMEL * (int(gap.changed[0]) * size // BLOCK_NUMEL) if len(gap.changed) else 0
    if expected.residues is not None and _moved(expected.residues, actual, block) > MAX_RECOVERED:
        return bounded
    changes = recover(gap, size, thorough=thorough)
    if changes is None or expected.digest is None:
        return bounded
    dtype = numpy_dtype(expected.dtype)
    # Too small to be told from 0, which weights often are.
    nothing = np.sqrt(NUM_PROJECTIONS) * gap.noise
    restored: dict[int, bytes] = {}
    for index, delta in changes:
        now = element(actual, index)
        assert isinstance(now, float)
        before = (now if math.isfinite(now) else 0.0) - delta
        before = 0.0 if abs(before) <= nothing[index // size] else before
        with np.errstate(over="ignore"):
            restored[index] = np.array([before], dtype="<f8").astype(dtype).tobytes()
    patched = _Patched(actual, restored)
    digests = []
    for chunk in chunks(patched.nbytes):
        data = buffers.get("chunk", chunk.nbytes)
        patched.read_into(chunk.start, data.data)
        digests.append(blake3(data.data).digest())
    found = exact_difference(patched, actual, bounded.tolerance)
    if digest_of(expected.dtype, expected.shape, digests) == expected.digest:
        why = f"{found.why}; recovered from the sketch, proved by the digest"
        return replace(found, why=why, num_nonfinite=bounded.num_nonfinite)
    if any(bounded.num_nonfinite):  # which count as 0 in a sketch: what was there is not known
        return bounded
    count = f"{len(changes)} element{'s' if len(changes) > 1 else ''}"
    why = f"{bounded.why}; its sketch is that of {count} changed, expected as about the values here"
    return replace(bounded, why=why, elements=found.elements)


def _moved(residues: Residues, actual: Values, first: int) -> int:
    """How many elements of a block, from `first` on, are surely not what they were."""
    itemsize = actual.dtype.itemsize
    numel = min(BLOCK_NUMEL, actual.numel - first)
    data = buffers.get("chunk", numel * itemsize)
    actual.read_into(first * itemsize, data.data)
    return int(check(as_floats(data, actual.dtype), residues.part(first, numel)).moved[0])


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
