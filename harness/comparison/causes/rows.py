"""Hypotheses about rows: which changed, which were added or removed, and in what order they are.

In: the expected fingerprint, with values, residues or a reference to read, and the actual tensor.
Out: a `Cause`. With the values of both sides each row has a 64-bit hash; from the golden alone its
residues, four bits of each element, show every row of which none differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import DType
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause, Proof
from harness.comparison.causes.evidence import Evidence, are_permutable
from harness.comparison.causes.views import View, narrowed
from harness.fingerprints.arithmetic import as_floats
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.fingerprints.hashes import unordered_sums
from harness.fingerprints.residues import BLOCK_NUMEL, encode

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_NAMED = 4
_MAX_SORTED_NBYTES = 64 << 20
_READ_NBYTES = 4 << 20
_WORDS = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8"}


def rows_changed(evidence: Evidence, expected: TensorFingerprint, actual: Tensor) -> Cause | None:
    """Find which rows, or columns, are the golden's, and where they are now."""
    if expected.dtype != actual.dtype or len(expected.shape) != len(actual.shape):
        return None
    if len(expected.shape) < 2 or not expected.numel or not actual.numel:
        return None
    differing = [
        a for a, (n, m) in enumerate(zip(expected.shape, actual.shape, strict=True)) if n != m
    ]
    known: View | None = evidence.references.get(expected.key)
    if known is None and expected.values is not None:
        known = expected
    if known is not None:
        for axis in (0, 1):
            if set(differing) <= {axis}:
                ours = _hashes(evidence, known, expected.dtype, expected.shape, axis)
                theirs = _hashes(evidence, actual, actual.dtype, actual.shape, axis)
                cause = _of_hashes(ours, theirs, axis)
                if cause is not None:
                    return cause
        return None
    if set(differing) <= {0} and expected.residues is not None:
        return _of_residues(evidence, expected, actual)
    return None


def _hashes(
    evidence: Evidence, view: View, dtype: DType, shape: tuple[int, ...], axis: int
) -> Array:
    """A 64-bit hash of each index of one dim: its words times odd numbers, modulo 2^64."""
    word = _WORDS.get(dtype.itemsize)
    if word is None:
        return np.arange(0)
    outer, width = shape[0], math.prod(shape[1:])
    step = max(1, _READ_NBYTES // max(1, width * dtype.itemsize))
    across = shape[axis] if axis else outer
    found = np.zeros(across, "<u8")
    weights = _weights(0, width)
    for first in range(0, outer, step):
        evidence.check_time()
        count = min(step, outer - first)
        data = np.empty(count * width * dtype.itemsize, "|u1")
        view.read_into(first * width * dtype.itemsize, data.data)
        words = data.view(word).reshape(count, width).astype("<u8") + np.uint64(1)
        if axis == 0:
            found[first : first + count] = (words * weights).sum(axis=1)
        else:
            # Rows and what lies behind the dim are one; columns have the same weights.
            inner = width // across
            of_place = _weights(first * inner, count * inner).reshape(count, 1, inner)
            found += (words.reshape(count, across, inner) * of_place).sum(axis=(0, 2))
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
        changed = np.flatnonzero(ours != theirs[: len(ours)])
        return _changed_alone(
            changed, len(ours), axis, added=len(theirs) - len(ours), proof="values"
        )
    # Rows were removed: what is left is the golden's, in its order.
    places = {int(value): place for place, value in reversed([*enumerate(ours.tolist())])}
    kept = [places.get(int(value), -1) for value in theirs.tolist()]
    if min(kept) < 0 or kept != sorted(kept):
        return None
    gone = sorted(set(range(len(ours))) - set(kept))
    if kept == [*range(len(kept))]:
        text = f"{name}s 0 to {len(kept) - 1} are the golden's, {len(gone):,} removed"
    else:
        text = f"{_named(gone, name)} removed, the others are the golden's"
    rows = ((0, len(kept)),) if kept == [*range(len(kept))] else None
    return Cause(kind="rows", text=text, proof="values", axis=axis, rows=rows, num_added=-len(gone))


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
    if len(changed) > count // 4 or count < 4 or (not len(changed) and not added):
        return None
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
    shown = ", ".join(map(str, places[:_MAX_NAMED]))
    more = f" and {len(places) - _MAX_NAMED:,} more" if len(places) > _MAX_NAMED else ""
    return f"{name}{'s' if len(places) > 1 else ''} {shown}{more}"


def _ranges(changed: Sequence[int], count: int) -> tuple[tuple[int, int], ...]:
    """The half-open ranges between changed places."""
    ends = [-1, *changed, count]
    return tuple((one + 1, other) for one, other in pairwise(ends) if one + 1 < other)


def _of_residues(evidence: Evidence, expected: TensorFingerprint, actual: Tensor) -> Cause | None:
    """Which rows have an element whose residue is another one than the golden's."""
    count, now = expected.shape[0], actual.shape[0]
    if now < count or expected.residues is None:
        return None
    view = narrowed(actual, 0, 0, count)
    width = expected.numel // count
    itemsize, step = expected.dtype.itemsize, BLOCK_NUMEL * 32
    differs = np.zeros(count, bool)
    packed = np.asarray(expected.residues.packed)
    for first in range(0, expected.numel, step):
        evidence.check_time()
        numel = min(step, expected.numel - first)
        data = np.empty(numel * itemsize, "|u1")
        view.read_into(first * itemsize, data.data)
        ours = encode(as_floats(data, expected.dtype).copy(), expected.residues.grid)
        if ours is None:
            return None
        away = np.flatnonzero(
            np.asarray(ours.packed) != packed[first // 2 : -(-(first + numel) // 2)]
        )
        # A byte has two elements: which of them differs matters where a row ends between them.
        there, here = packed[first // 2 + away], np.asarray(ours.packed)[away]
        for half, mask in ((0, 0x0F), (1, 0xF0)):
            places = first + 2 * away[(there & mask) != (here & mask)] + half
            differs[places[places < expected.numel] // width] = True
        if differs.sum() > count // 4:
            return None
    return _changed_alone(np.flatnonzero(differs), count, 0, added=now - count, proof="hash")


def reordered(
    evidence: Evidence, expected: TensorFingerprint, actual: TensorFingerprint, tensor: Tensor
) -> Cause | None:
    """Find whether the same elements are there in another order, whatever order that is."""
    if expected.dtype != actual.dtype or expected.numel != actual.numel or expected.numel < 2:
        return None
    word = _WORDS.get(expected.dtype.itemsize)
    if word is None or not are_permutable(expected.stats, actual.stats):
        return None
    known: View | None = evidence.references.get(expected.key)
    if known is None and expected.values is not None:
        known = expected
    proof: Proof = "values"
    if known is not None and expected.nbytes <= _MAX_SORTED_NBYTES:
        sides = []
        for view in (known, tensor):
            data = np.empty(expected.nbytes, "|u1")
            view.read_into(0, data.data)
            sides.append(np.sort(data.view(word)))
        if not np.array_equal(sides[0], sides[1]):
            return None
    elif expected.hashes is not None:
        proof = "hash"
        if _unordered(evidence, tensor) != expected.hashes.unordered.tobytes():
            return None
    else:
        return None
    text = "the same values, in another order"
    return Cause(kind="reordered", text=text, proof=proof, accept=("order",))


def _unordered(evidence: Evidence, tensor: Tensor) -> bytes:
    total = np.zeros(2, "<u4")
    for start in range(0, tensor.nbytes, _READ_NBYTES):
        evidence.check_time()
        data = np.empty(min(_READ_NBYTES, tensor.nbytes - start), "|u1")
        tensor.read_into(start, data.data)
        total += unordered_sums(data, tensor.dtype)
    return total.tobytes()
