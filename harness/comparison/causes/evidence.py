"""What is known of both sides of a comparison, to test hypotheses with, and the time that is left.

In: fingerprints of the expected side, the open actual checkpoint, and the open reference where it
is there. Out: answers to "are these the bytes of that tensor?", the cheap ones first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from harness.checkpoint.dtypes import Array, DType
from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.comparison.causes.views import Memory, View, are_same, digest_as, wide_of
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.sketch import Sketch, projection
from harness.fingerprints.stats import Stats
from harness.streaming.threads import parallel
from harness.streaming.workers import ALL_CORES, Workers

_Result = TypeVar("_Result")
_HEAD_NBYTES = 256
_ROUNDOFF = {
    "float64": (2.0**-53, 0.0),
    "float32": (2.0**-24, 2.0**-150),
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-134),
    "float8_e4m3fn": (2.0**-4, 2.0**-10),
    "float8_e5m2": (2.0**-3, 2.0**-17),
}


class OutOfTime(Exception):  # noqa: N818 - it ends a search, and is no error
    """The search for causes has taken as long as it may."""


class _Refuted(Exception):  # noqa: N818 - it ends a pass, and is no error
    """Some values do not fit a hypothesis."""


@dataclass(frozen=True)
class Roundoff:
    """The greatest errors of rounding to a dtype: relative, and absolute near zero."""

    relative: float
    absolute: float

    @classmethod
    def of(cls, *dtypes: DType) -> Roundoff:
        """That of the dtype with the greatest."""
        found = [_ROUNDOFF.get(dtype.name, (1.0, 0.0)) for dtype in dtypes]
        return cls(max(one for one, _ in found), max(other for _, other in found))

    @property
    def is_coarse(self) -> bool:
        """Whether so much fits within it that nothing is proved."""
        return self.relative > 2.0**-8


class Budget:
    """Seconds from now on: over when both the clock and the processor have spent them.

    A busy machine ends no search that has hardly begun; a slow source does, at four times as long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic(), time.process_time()

    @property
    def is_over(self) -> bool:
        passed, used = time.monotonic() - self._started[0], time.process_time() - self._started[1]
        return min(passed, max(used, passed / 4)) > self.seconds


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Both sides, keyed by each side's own keys.

    `expected` and `actual` have what is known of all tensors, and more of it as the search goes on
    (`detail`); `tensors` read the actual side, `references` the expected one.
    """

    expected: dict[str, TensorFingerprint]
    actual: dict[str, TensorFingerprint]
    tensors: Mapping[str, Tensor]
    references: Mapping[str, Tensor]
    reference: Checkpoint | None = None
    checkpoint: Checkpoint | None = None
    block_nbytes: int
    budget: Budget
    workers: Workers = ALL_CORES
    proved: set[object] = field(default_factory=set)
    memory: Memory = field(default_factory=Memory)
    _heads: dict[object, dict[bytes, list[str]]] = field(default_factory=dict)

    def check_time(self) -> None:
        """Raise OutOfTime where the budget is over."""
        if self.budget.is_over:
            raise OutOfTime

    def detail(self, ours: set[str], theirs: set[str], *, sketches: bool) -> None:
        """Read the stats, and the sketches, of what lacks them: expected tensors, and actual ones.

        Small tensors have their values. Digests are what is not known of a tensor that another one
        of the golden may be.
        """
        for known, keys, checkpoint, digests in (
            (self.expected, ours, self.reference, False),
            (self.actual, theirs, self.checkpoint, sketches and self.reference is None),
        ):
            lacking = {key for key in keys & known.keys() if _lacks(known[key], sketches=sketches)}
            if checkpoint is None or not lacking:
                continue
            self.check_time()
            found = detailed(
                checkpoint,
                lacking,
                self.block_nbytes,
                self.workers,
                sketches=sketches,
                digests=digests,
            )
            for key, tensor in found.items():
                known[key] = replace(tensor, digest=known[key].digest or tensor.digest)

    @cached_property
    def by_digest(self) -> Mapping[bytes, list[str]]:
        """The expected keys of each digest."""
        return _by_digest(self.expected)

    @cached_property
    def actual_by_digest(self) -> Mapping[bytes, list[str]]:
        """The actual keys of each digest that is known."""
        return _by_digest(self.actual)

    def same_in(
        self, tensors: Mapping[str, Tensor], view: View, like: TensorFingerprint
    ) -> list[str]:
        """The keys of tensors that have a view's bytes, compared byte by byte; `like` is the view.

        Where a digest is known it need not be asked: those of what is identical are not.
        """
        name = (id(tensors), like.dtype.name, like.shape)
        if name not in self._heads:
            heads: dict[bytes, list[str]] = {}
            self._heads[name] = heads
            for key, tensor in tensors.items():
                if tensor.dtype == like.dtype and tensor.shape == like.shape:
                    heads.setdefault(_head_of(tensor), []).append(key)
        self.check_time()
        keys = self._heads[name].get(_head_of(view), [])
        return [key for key in keys if are_same(tensors[key], view)]

    def passes(
        self, function: Callable[[int], _Result | None], places: Sequence[int]
    ) -> list[_Result] | None:
        """Map over places of tensors, on all threads; None, and no more is read, where one is."""

        def run(place: int) -> _Result:
            self.check_time()
            found = function(place)
            if found is None:
                raise _Refuted
            return found

        try:
            return parallel(run, places, jobs=self.workers.jobs)
        except _Refuted:
            return None

    def values_of(self, expected: TensorFingerprint) -> View | None:
        """What reads an expected tensor's values: kept ones, or the reference; None: a sketch."""
        if expected.values is not None:
            return expected
        return self.references.get(expected.key)

    def are_bytes_of(self, view: View, expected: TensorFingerprint) -> bool:
        """Whether the view's bytes are those of an expected tensor: by its digest, or all of them.

        What its first block shows to be another tensor is read no further.
        """
        self.check_time()
        if view.nbytes != expected.nbytes:
            return False
        if expected.key in self.references:
            return are_same(self.references[expected.key], view)
        if expected.digest is None:
            return False
        if not self.begins_as(view, expected):
            return False
        return digest_as(view, expected.dtype, expected.shape, self.workers) == expected.digest

    def begins_as(
        self, view: View, expected: TensorFingerprint, roundoff: Roundoff | None = None
    ) -> bool:
        """Whether a view's first block may be an expected tensor's: its bytes, or rounded so."""
        if not view.nbytes:
            return True
        if expected.values is not None and roundoff is None:
            start = bytearray(min(view.nbytes, 16384))
            view.read_into(0, memoryview(start))
            return expected.values.startswith(start)
        known = self.values_of(expected)
        if expected.dtype.kind != "float" or (known is None and expected.sketch is None):
            return True
        numel = block_numel(expected.dtype, self.block_nbytes)
        values = wide_of(view, 0, numel)
        if known is not None:
            return is_near(values, wide_of(known, 0, numel), roundoff or Roundoff(0, 0))
        assert expected.sketch is not None
        return begins_as(values, expected.sketch, numel, roundoff=roundoff)


def _by_digest(tensors: Mapping[str, TensorFingerprint]) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.digest is not None:
            found.setdefault(tensor.digest, []).append(key)
    return found


def _lacks(tensor: TensorFingerprint, *, sketches: bool) -> bool:
    if tensor.stats is None or not sketches:
        return tensor.stats is None
    return tensor.values is None and tensor.sketch is None and tensor.dtype.is_floating


@np.errstate(all="ignore")
def is_near(values: Array, known: Array, roundoff: Roundoff) -> bool:
    """Whether values may be others, rounded; what is not finite is left out."""
    finite = np.isfinite(values) & np.isfinite(known)
    allowed = 2 * (roundoff.relative * np.abs(known) + roundoff.absolute)
    return bool(np.all(~finite | (np.abs(values - known) <= allowed)))


@np.errstate(all="ignore")
def begins_as(
    values: Array, sketch: Sketch, block: int, index: int = 0, roundoff: Roundoff | None = None
) -> bool:
    """Whether a block's values have the golden's sketch, up to its rounding and that of a cast."""
    wide = np.where(np.isfinite(values), values, 0.0)
    by = projection(block).numbers[: wide.size]
    away = np.linalg.norm(wide @ by - sketch.projections[index])
    # Rounding of the sketch is a millionth of this.
    size = np.linalg.norm(wide) + sketch.norms[index]
    allowed = 1e-6 * size
    if roundoff is not None:  # 16 products are some 4 times what they are of, at most 8 times
        allowed += 8 * (roundoff.relative * size + roundoff.absolute * np.sqrt(wide.size))
    return bool(away <= allowed) or not np.isfinite(away)


def _head_of(view: View) -> bytes:
    head = bytearray(min(view.nbytes, _HEAD_NBYTES))
    view.read_into(0, memoryview(head))
    return bytes(head)


def are_permutable(one: Stats | None, other: Stats | None) -> bool:
    """Whether statistics allow that two tensors hold the same values in some order."""
    if one is None or other is None:
        return True
    exact = ("min", "max", "num_zero", "num_nan", "num_posinf", "num_neginf")
    if any(getattr(one, name) != getattr(other, name) for name in exact):
        return False
    return bool(np.isclose(one.l2, other.l2, rtol=1e-9, atol=0.0))


def is_constant(stats: Stats | None) -> bool:
    """Whether all elements are one finite number."""
    return stats is not None and stats.min == stats.max and not stats.num_nonfinite


def detailed(
    checkpoint: Checkpoint,
    keys: set[str],
    block_nbytes: int,
    workers: Workers,
    *,
    sketches: bool = True,
    digests: bool = False,
) -> dict[str, TensorFingerprint]:
    """Fingerprint these tensors, small ones with their values."""
    from harness.comparison.measuring import part
    from harness.fingerprints.scan import fingerprint

    found = part(checkpoint, keys)
    # Parts without values (of the meta device) have no causes.
    readable = {k: t for k, t in found.tensors.items() if t.storage.source is not None}
    return dict(
        fingerprint(
            replace(found, tensors=readable),
            block_nbytes=block_nbytes,
            sketches=sketches,
            digests=digests,
            workers=workers,
        ).tensors
    )
