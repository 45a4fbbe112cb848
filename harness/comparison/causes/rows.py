"""Hypotheses about rows: which changed, which were added or removed, and in what order they are.

In: the expected fingerprint, with values, residues, a sketch or a reference to read, and the actual
tensor. Out: a `Cause`. Each row has a 64-bit hash: of its bits where both sides' values are known,
of its residues from the golden alone, a few bits of each element, which leave open what is within
the tolerance; an order of rows is proved by the digest. A sketch shows in which blocks something
differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from harness.checkpoint.dtypes import Array, DType
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause, Proof
from harness.comparison.causes.evidence import Evidence, are_permutable, begins_as
from harness.comparison.causes.views import Picked, View, digest_as, wide_of
from harness.fingerprints.arithmetic import as_floats
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.hashes import unordered_sums
from harness.fingerprints.residues import Grid, encode

_MAX_NAMED, _MAX_RUNS = 4, 8
_SAMPLED_ROWS = 16
_MAX_SORTED_NBYTES = 64 << 20
_READ_NBYTES, _READ_NUMEL = 4 << 20, 1 << 19
_WORDS = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True, kw_only=True)
class _Words:
    """A number for each element, equal where the elements are: its bits, or its residue."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Array | None]

    @classmethod
    def of_bits(cls, view: View, dtype: DType, shape: tuple[int, ...]) -> _Words:
        def read(first: int, numel: int) -> Array | None:
            data = np.empty(numel * dtype.itemsize, "|u1")
            view.read_into(first * dtype.itemsize, data.data)
            return data.view(_WORDS[dtype.itemsize]) if dtype.itemsize in _WORDS else None

        return cls(shape=shape, read=read)

    @classmethod
    def of_residues(cls, actual: Tensor, grid: Grid) -> _Words:
        def read(first: int, numel: int) -> Array | None:
            data = np.empty(numel * actual.dtype.itemsize, "|u1")
            actual.read_into(first * actual.dtype.itemsize, data.data)
            found = encode(as_floats(data, actual.dtype).copy(), grid)
            return None if found is None else found.elements(0, numel)

        return cls(shape=actual.shape, read=read)


def rows_changed(
    evidence: Evidence, expected: TensorFingerprint, found: TensorFingerprint, actual: Tensor
) -> Cause | None:
    """Find which rows, or columns, are the golden's, and where they are now.

    `found` is what is known of the actual tensor.
    """
    shape = expected.shape
    if expected.dtype != actual.dtype or len(shape) != len(actual.shape):
        return None
    if len(shape) < 2 or not expected.numel or not actual.numel:
        return None
    differing = [a for a, (n, m) in enumerate(zip(shape, actual.shape, strict=True)) if n != m]
    known = evidence.values_of(expected)
    residues = expected.residues
    if known is not None:
        ours = _Words.of_bits(known, expected.dtype, shape)
        theirs = _Words.of_bits(actual, actual.dtype, actual.shape)
    elif residues is not None:
        ours = _Words(shape=shape, read=residues.elements)
        theirs = _Words.of_residues(actual, residues.grid)
    else:
        return _of_sketch(evidence, expected, found, actual) if set(differing) <= {0} else None
    axes = [0, 1]
    if not differing and not are_permutable(expected.stats, found.stats):
        axes = _axes_that_stay(ours, theirs)
    for axis in axes:
        # A residue may be four bits: so few would agree by chance.
        if set(differing) <= {axis} and (known or expected.numel >= 16 * shape[axis]):
            hashes = _hashes(evidence, ours, axis), _hashes(evidence, theirs, axis)
            if hashes[0] is None or hashes[1] is None:
                return None
            cause = _of_hashes(hashes[0], hashes[1], axis)
            if cause is not None and (known or _is_proved(evidence, cause, expected, actual)):
                return cause if known else replace(cause, proof="hash")
    return None


def _axes_that_stay(ours: _Words, theirs: _Words) -> list[int]:
    """The dims most of whose indices are the same in a sample of rows."""
    width = math.prod(ours.shape[1:])
    step = max(1, ours.shape[0] // _SAMPLED_ROWS)
    rows = []
    for row in range(0, ours.shape[0], step):
        read = ours.read(row * width, width), theirs.read(row * width, width)
        if read[0] is None or read[1] is None:
            return []
        rows.append(read[0] == read[1])
    same = np.stack(rows).reshape(len(rows), ours.shape[1], -1)
    shares = same.all(axis=(1, 2)).mean(), same.all(axis=(0, 2)).mean()
    return [axis for axis in (0, 1) if shares[axis] >= 0.5]


def _is_proved(
    evidence: Evidence, cause: Cause, expected: TensorFingerprint, actual: Tensor
) -> bool:
    """Whether rows of equal residues, each at its new place, are the golden's bytes."""
    if cause.order is None or cause.axis is None:
        return True
    view = Picked(actual, cause.axis, cause.order)
    evidence.check_time()
    return digest_as(view, expected.dtype, expected.shape, evidence.workers) == expected.digest


def _hashes(evidence: Evidence, words: _Words, axis: int) -> Array | None:
    """A 64-bit hash of each index of one dim: its words times odd numbers, modulo 2^64."""
    outer, width = words.shape[0], math.prod(words.shape[1:])
    step = max(1, _READ_NUMEL // max(1, width))
    across = words.shape[axis] if axis else outer
    found = np.zeros(across, "<u8")
    weights = _weights(0, width)
    for first in range(0, outer, step):
        evidence.check_time()
        count = min(step, outer - first)
        read = words.read(first * width, count * width)
        if read is None:
            return None
        data = read.reshape(count, width).astype("<u8") + np.uint64(1)
        if axis == 0:
            found[first : first + count] = (data * weights).sum(axis=1)
        else:
            # Rows and what lies behind the dim are one; columns have the same weights.
            inner = width // across
            of_place = _weights(first * inner, count * inner).reshape(count, 1, inner)
            found += (data.reshape(count, across, inner) * of_place).sum(axis=(0, 2))
    return found


def _weights(first: int, count: int) -> Array:
    """Odd 64-bit numbers without a pattern (splitmix64), the same for the same places."""
    x = (np.arange(first + 1, first + count + 1, dtype="<u8")) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((x ^ (x >> np.uint64(31))) | np.uint64(1))


def _of_hashes(ours: Array, theirs: Array, axis: int) -> Cause | None:
    name = ("row", "column")[axis]
    if len(ours) == len(theirs):
        changed = np.flatnonzero(ours != theirs)
        if len(changed) > 1 and np.array_equal(np.sort(ours), np.sort(theirs)):
            return _in_another_order(ours, theirs, changed, axis)
        return _changed_alone(changed, len(ours), axis, added=0, proof="values")
    if len(ours) < len(theirs):
        more = len(theirs) - len(ours)
        changed = np.flatnonzero(ours != theirs[: len(ours)])
        cause = _changed_alone(changed, len(ours), axis, added=more, proof="values")
        kept = None if cause is not None else _subsequence(theirs, ours)
        if kept is None:
            return cause
        new = sorted(set(range(len(theirs))) - set(kept))
        text = f"the golden's {name}s in their order, {more:,} added: {_named(new, name)}"
        return Cause(
            kind="rows",
            text=text,
            proof="values",
            accept=("rows",),
            axis=axis,
            rows=_ranges(new, len(theirs)),
            order=tuple(kept),
            num_added=more,
        )
    # Rows were removed: what is left is the golden's, in its order.
    kept = _subsequence(ours, theirs)
    if kept is None:
        return None
    gone = sorted(set(range(len(ours))) - set(kept))
    if kept == [*range(len(kept))]:
        text = f"{name}s 0 to {len(kept) - 1} are the golden's, {len(gone):,} removed"
    else:
        text = f"{_named(gone, name)} removed, the others are the golden's"
    rows = ((0, len(kept)),) if kept == [*range(len(kept))] else None
    return Cause(kind="rows", text=text, proof="values", axis=axis, rows=rows, num_added=-len(gone))


def _subsequence(all_of: Array, some: Array) -> list[int] | None:
    """Where some hashes are among others, in the same order; the first places that do."""
    places: list[int] = []
    rest = iter(enumerate(all_of.tolist()))
    for value in some.tolist():
        place = next((place for place, other in rest if other == value), None)
        if place is None:
            return None
        places.append(place)
    return places


def _in_another_order(ours: Array, theirs: Array, changed: Array, axis: int) -> Cause | None:
    name = ("row", "column")[axis]
    if len(np.unique(ours)) < 2:
        return None
    now = np.empty(len(ours), int)
    now[np.argsort(ours, kind="stable")] = np.argsort(theirs, kind="stable")
    first = int(next(place for place in range(len(now)) if now[place] != place))
    text = (
        f"its {name}s in another order: {len(changed):,} of {len(ours):,} moved, "
        f"{name} {first} is now {name} {int(now[first])}"
    )
    return Cause(
        kind="rows",
        text=text,
        proof="values",
        accept=("order",),
        axis=axis,
        order=tuple(map(int, now)),
    )


def _changed_alone(
    changed: Array, count: int, axis: int, *, added: int, proof: Proof
) -> Cause | None:
    """Some rows that differ, where most do not."""
    name = ("row", "column")[axis]
    if count < 4 or len(changed) > 3 * count // 4 or (not len(changed) and not added):
        return None
    if len(changed) > count // 4 and len(_runs(changed.tolist())) > _MAX_RUNS:
        return None  # here and there some agree
    more = f", {added:,} added" if added else ""
    if not len(changed):
        text = f"{name}s 0 to {count - 1} are the golden's{more}"
    else:
        differ = "differs" if len(changed) == 1 else "differ"
        text = (
            f"{_named(changed.tolist(), name)} {differ}, the other {count - len(changed):,} are "
            f"the golden's{more}"
        )
    return Cause(
        kind="rows",
        text=text,
        proof=proof,
        axis=axis,
        rows=_ranges(changed.tolist(), count),
        changed=tuple(map(int, changed)),
        num_added=added or None,
    )


def _named(places: Sequence[int], name: str) -> str:
    """Indices in words, neighbours as a range."""
    runs = _runs(places)
    said = [f"{a} to {b - 1}" if b - a > 2 else ", ".join(map(str, range(a, b))) for a, b in runs]
    rest = sum(b - a for a, b in runs[_MAX_NAMED:])
    more = f" and {rest:,} more" if rest else ""
    return f"{name}{'s' if len(places) > 1 else ''} {', '.join(said[:_MAX_NAMED])}{more}"


def _runs(places: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending indices as half-open ranges."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = found[-1][0], place + 1
        else:
            found.append((place, place + 1))
    return found


def _ranges(changed: Iterable[int], count: int) -> tuple[tuple[int, int], ...]:
    """The half-open ranges between changed places."""
    ends = [-1, *changed, count]
    return tuple((one + 1, other) for one, other in pairwise(ends) if one + 1 < other)


def _of_sketch(
    evidence: Evidence, expected: TensorFingerprint, found: TensorFingerprint, actual: Tensor
) -> Cause | None:
    """Which blocks of the sketch differ, as rows: where something is, and where nothing."""
    count, more = expected.shape[0], actual.shape[0] - expected.shape[0]
    sketch, width = expected.sketch, expected.numel // expected.shape[0]
    if sketch is None or expected.dtype.kind != "float":
        return None
    block = block_numel(expected.dtype, evidence.block_nbytes)
    known = expected.numel if more >= 0 else actual.numel // block * block
    if more < 0:  # of what is left the last block has values that are gone
        count = known // width
        if not count or count < actual.shape[0] // 2:
            return None
    places: Iterable[int] = range(-(-known // block))
    if not more and found.sketch is not None and len(found.sketch.norms) == len(sketch.norms):
        with np.errstate(all="ignore"):
            away = np.linalg.norm(found.sketch.projections - sketch.projections, axis=1)
            places = np.flatnonzero(~(away <= 1e-6 * sketch.norms)).tolist()
    rows: dict[int, None] = {}
    for place in places:
        evidence.check_time()
        first, last = place * block, min(expected.numel, (place + 1) * block)
        if more != 0 and begins_as(wide_of(actual, first, last - first), sketch, block, place):
            continue
        rows |= dict.fromkeys(range(first // width, (last - 1) // width + 1))
        if len(rows) > 3 * count // 4:
            return None
    changed = sorted(rows)
    if len(changed) > count // 4 and len(_runs(changed)) > _MAX_RUNS:
        return None
    if more >= 0 and (not changed or (len(changed) == 1 and not more)):
        return _changed_alone(np.array(changed, int), count, 0, added=more, proof="sketch")
    if more < 0 and changed:
        return None
    if more < 0:
        rest = actual.shape[0] - count
        text = f"rows 0 to {count - 1} are the golden's, {-more:,} removed"
        if rest:
            text += f" (it keeps too little to tell of the last {rest:,}: --reference would)"
        return Cause(
            kind="rows", text=text, proof="sketch", axis=0, rows=((0, count),), num_added=more
        )
    spans = _named(changed, "row").partition(" ")[2]
    added = f", {more:,} added" if more else ""
    return Cause(
        kind="rows",
        text=f"differs within rows {spans}; the other {count - len(changed):,} are the golden's"
        + added,
        proof="sketch",
        axis=0,
        rows=_ranges(changed, count),
        num_added=more or None,
    )


def reordered(
    evidence: Evidence, expected: TensorFingerprint, actual: TensorFingerprint, tensor: Tensor
) -> Cause | None:
    """Find whether the same elements are there in another order, whatever order that is."""
    if expected.dtype != actual.dtype or expected.numel != actual.numel or expected.numel < 2:
        return None
    word = _WORDS.get(expected.dtype.itemsize)
    if word is None or not are_permutable(expected.stats, actual.stats):
        return None
    known = evidence.values_of(expected)
    proof: Proof = "values"
    if known is not None and expected.nbytes <= _MAX_SORTED_NBYTES:
        sides = []
        for view in (known, tensor):
            data = np.empty(expected.nbytes, "|u1")
            view.read_into(0, data.data)
            sides.append(np.sort(data.view(word)))
        if not np.array_equal(sides[0], sides[1]):
            return None
    else:
        proof, hashes = "hash", expected.hashes
        ours = None if hashes is None else hashes.unordered
        if known is not None:
            ours = _unordered(evidence, known)
        if ours is None or _unordered(evidence, tensor) != ours:
            return None
    text = "the same values, in another order"
    return Cause(kind="reordered", text=text, proof=proof, accept=("order",))


def _unordered(evidence: Evidence, tensor: View) -> bytes:
    total = np.zeros(2, "<u4")
    for start in range(0, tensor.nbytes, _READ_NBYTES):
        evidence.check_time()
        data = np.empty(min(_READ_NBYTES, tensor.nbytes - start), "|u1")
        tensor.read_into(start, data.data)
        total += unordered_sums(data, tensor.dtype)
    return total.tobytes()
