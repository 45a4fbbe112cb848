"""Hypotheses about dtypes: the golden's values rounded to a narrower one, or widened.

In: an expected fingerprint, and a view of the actual tensor that may have its values. Out: a
`Match`, which digests, hashes or all values prove: the same bytes, or what a cast has made of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.checkpoint.dtypes import DTYPES, Array, DType, numpy_dtype
from harness.comparison.cause import CASTS, Cause, CauseKind, Proof
from harness.comparison.causes.evidence import Evidence, Roundoff
from harness.comparison.causes.linear import UPPER
from harness.comparison.causes.views import View, are_same, wide_of
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.hashes import UNIT_NUMEL, hash_unit, join_units
from harness.fingerprints.sketch import sketch_values
from harness.streaming.chunks import buffers

_CASTS = tuple(DTYPES[name] for name in CASTS)
_READ_NUMEL, _HEAD_NUMEL = 1 << 20, 1 << 10


@dataclass(frozen=True)
class Cast:
    """A view's values in another dtype, rounded to the nearest, ties to even, as torch does."""

    view: View
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.view.nbytes // self.view.dtype.itemsize * self.dtype.itemsize

    def read_into(self, start: int, buffer: memoryview) -> None:
        stored = self.view.dtype
        first, count = start // self.dtype.itemsize, len(buffer) // self.dtype.itemsize
        data = np.empty(count * stored.itemsize, "|u1")
        self.view.read_into(first * stored.itemsize, data.data)
        values: Array = data.view(numpy_dtype(stored))
        with np.errstate(all="ignore"):
            # By way of float32: as torch does, and since not each float8 can be cast to another.
            if stored.itemsize == 1 or (stored.name == "float64" and self.dtype.itemsize < 4):
                values = values.astype("<f4")
            buffer[:] = values.astype(numpy_dtype(self.dtype)).view("|u1").data


@dataclass(frozen=True, kw_only=True)
class Match:
    """That a view has an expected tensor's values; `how` they were cast, None: not at all."""

    proof: Proof = "digest"
    kind: CauseKind = "rounded"
    how: str | None = None
    dtype: str | None = None
    bound: float | None = None

    @property
    def causes(self) -> tuple[Cause, ...]:
        """What happened to the values alone."""
        if self.how is None:
            return ()
        text = f"the golden's values, {self.how}"
        cause = Cause(kind=self.kind, text=text, proof=self.proof, dtype=self.dtype)
        if self.proof == "sketch":
            return (replace(cause, bound=self.bound),)
        return (replace(cause, accept=("rounded",)),)

    def of(self, cause: Cause) -> tuple[Cause, ...]:
        """A cause that holds by this match, and beside it what happened to the values.

        What accepts the first accepts all of it, and nothing less does.
        """
        if self.how is None:
            return (cause,)
        both = replace(
            cause,
            text=f"{cause.text}, {self.how}",
            proof=self.proof,
            accept=(*cause.accept, "rounded") if cause.accept else (),
            dtype=self.dtype,
        )
        return both, *(replace(alone, accept=()) for alone in self.causes)


def matched(evidence: Evidence, view: View, expected: TensorFingerprint) -> Match | None:
    """Find whether a view has an expected tensor's values, in its dtype or cast."""
    view = evidence.memory.at_hand(view)
    if view.dtype == expected.dtype and evidence.are_bytes_of(view, expected):
        return Match()
    return recast(evidence, view, expected)


def recast(evidence: Evidence, view: View, expected: TensorFingerprint) -> Match | None:
    """Find the cast, or the casts, that made a view's values of an expected tensor's."""
    stored, own = view.dtype, expected.dtype
    if {stored.kind, own.kind} != {"float"} or not expected.numel:
        return None
    if view.nbytes // stored.itemsize != expected.numel:
        return None
    evidence.check_time()
    ways = [*_ways(own, stored)]
    roundoff = Roundoff.of(own, stored, *(dtype for through in ways for dtype in through))
    if not evidence.begins_as(view, expected, roundoff):
        return None
    for through in ways:
        proof = _proof_of(evidence, view, expected, through)
        if proof is not None:
            names = [dtype.name for dtype in through]
            how = f"rounded to {', then to '.join(names)}"
            if stored != through[-1]:
                how += f" (and stored as {stored})"
            return Match(proof=proof, how=how, dtype=names[-1])
    narrow = Cast(view, own)
    if (
        stored == own
        or stored.itemsize < own.itemsize
        or not evidence.are_bytes_of(narrow, expected)
    ):
        return None
    if are_same(Cast(narrow, stored), view):
        return Match(kind="widened", how=f"widened to {stored}", dtype=stored.name)
    return Match(how=f"with more digits: rounded to {own} they are the same", dtype=own.name)


def _ways(own: DType, stored: DType) -> Iterator[tuple[DType, ...]]:
    """The dtypes that values may have gone through, the simplest way first."""
    for dtype in _CASTS:
        if dtype != own and dtype.itemsize <= own.itemsize and stored in (dtype, own):
            yield (dtype,)
    if stored.itemsize == 2 and own.itemsize > 2:
        yield from ((one, stored) for one in _CASTS if one.itemsize == 2 and one != stored)


def _proof_of(
    evidence: Evidence, view: View, expected: TensorFingerprint, through: tuple[DType, ...]
) -> Proof | None:
    """What proves that a view holds the golden's values cast so; None: it does not."""
    known = evidence.values_of(expected)
    if known is not None:
        for dtype in (*through, view.dtype):
            known = Cast(known, dtype) if dtype != known.dtype else known
        return "values" if are_same(known, view) else None
    kept = (
        None if expected.hashes is None else expected.hashes.of_rounding(expected.dtype, through[0])
    )
    if kept is None or len(through) > 1:
        return None
    return "hash" if _hash_as(evidence, view, through[0]) == kept else None


def _hash_as(evidence: Evidence, view: View, dtype: DType) -> bytes | None:
    """The hash of a view's values as those of a dtype that is no wider; None: some are not."""
    step = UNIT_NUMEL * view.dtype.itemsize

    def of_unit(start: int, most: int = step) -> bytes | None:
        data = buffers.get("chunk", min(most, view.nbytes - start))
        view.read_into(start, data.data)
        return hash_unit(data.view(numpy_dtype(view.dtype)), dtype)

    if of_unit(0, _HEAD_NUMEL * view.dtype.itemsize) is None:  # as most, from the start
        return None
    units = evidence.passes(of_unit, range(0, view.nbytes, step))
    return None if units is None else join_units(units)


@np.errstate(all="ignore")  # what is not finite is near nothing
def nearly(evidence: Evidence, view: View, expected: TensorFingerprint) -> Match | None:
    """Find, by the sketch, that values are the golden's to within the rounding of both dtypes.

    Of one dtype they may all be such of a narrower one, as of a model that was quantised.
    """
    stored, own, sketch = view.dtype, expected.dtype, expected.sketch
    if {stored.kind, own.kind} != {"float"} or sketch is None:
        return None
    held = stored if stored != own else _held_in(view)
    if held is None:
        return None
    roundoff = Roundoff.of(held, own)
    if not evidence.begins_as(view, expected, roundoff):
        return None
    block = block_numel(own, evidence.block_nbytes)
    step = max(1, _READ_NUMEL // block) * block
    away = 0.0
    for start in range(0, expected.numel, step):
        evidence.check_time()
        values = wide_of(view, start, step)
        if held != stored and not _are_of(values, held):
            return None
        found = sketch_values(values, block).projections
        first = start // block
        away += float(np.square(found - sketch.projections[first : first + len(found)]).sum())
    bound = UPPER * away**0.5 / float(np.linalg.norm(sketch.norms))
    if not bound <= 8 * roundoff.relative:
        return None
    digit = 10.0 ** math.floor(math.log10(bound)) if bound else 1.0
    how = f"in {held}{'' if held == stored else f' (and stored as {stored})'}"
    how += f", to within {math.ceil(bound / digit) * digit:.0e} of their norm"
    return Match(proof="sketch", how=how, dtype=held.name, bound=bound)


def _held_in(view: View) -> DType | None:
    """The narrowest dtype that has a view's first values; None: no narrower one."""
    first = wide_of(view, 0, _HEAD_NUMEL)
    narrower = [dtype for dtype in _CASTS if dtype.itemsize < view.dtype.itemsize]
    return next((dtype for dtype in narrower[::-1] if _are_of(first, dtype)), None)


def _are_of(values: Array, dtype: DType) -> bool:
    return np.array_equal(values.astype("<f4").astype(numpy_dtype(dtype)).astype("<f8"), values)


def may_be_cast(expected: TensorFingerprint, actual: TensorFingerprint) -> bool:
    """Whether the least and the greatest value allow that the one was cast to the other."""
    (ours, cast), (theirs, other) = ends([expected, actual])
    return not theirs.isdisjoint(ours | cast) or not ours.isdisjoint(other)


_Ends = set[tuple[float, float]]


def ends(tensors: Sequence[TensorFingerprint]) -> list[tuple[_Ends, _Ends]]:
    """The least and the greatest value of each tensor, and what casts may make of them.

    Rounding keeps an order. All tensors of a dtype are cast at once.
    """
    found: list[tuple[_Ends, _Ends]] = [(set(), set()) for _ in tensors]
    of_dtype: dict[DType, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.stats is not None and tensor.dtype.kind == "float":
            of_dtype.setdefault(tensor.dtype, []).append(place)
            found[place][0].add((tensor.stats.min, tensor.stats.max))
    for dtype, places in of_dtype.items():
        values = np.array([pair for place in places for pair in found[place][0]])
        for through in {way for stored in _CASTS for way in _ways(dtype, stored)}:
            now = values
            with np.errstate(all="ignore"):
                for step in through:
                    now = now.astype("<f4").astype(numpy_dtype(step)).astype("<f8")
            for place, (least, greatest) in zip(places, now.tolist(), strict=True):
                found[place][1].add((least, greatest))
    return found
