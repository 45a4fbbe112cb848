"""Hypotheses about dtypes: the golden's values rounded to a narrower one, or widened.

In: both sides' fingerprints, and the tensors. Out: a `Cause` that hashes or digests prove.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from harness.checkpoint.dtypes import DTYPES, Array, DType, numpy_dtype
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import CASTS, Acceptable, Cause, Proof
from harness.comparison.causes.evidence import Evidence, is_constant
from harness.comparison.causes.views import View, are_same, digest_as
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.fingerprints.hashes import UNIT_NUMEL, hash_unit, join_units
from harness.streaming.chunks import buffers
from harness.streaming.threads import parallel

_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


def is_wider(one: DType, other: DType) -> bool:
    """Whether a dtype holds all values of another, and more."""
    if one.kind != "float" or other.kind != "float" or one == other:
        return False
    if {one.name, other.name} == {"float16", "bfloat16"}:
        return False
    return one.itemsize > other.itemsize


@dataclass(frozen=True)
class Cast:
    """A tensor's values in another dtype, rounded to the nearest, ties to even."""

    tensor: View
    stored: DType
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes // self.stored.itemsize * self.dtype.itemsize

    def read_into(self, start: int, buffer: memoryview) -> None:
        count = len(buffer) // self.dtype.itemsize
        first = start // self.dtype.itemsize
        data = np.empty(count * self.stored.itemsize, "|u1")
        self.tensor.read_into(first * self.stored.itemsize, data.data)
        buffer[:] = cast(data, self.stored, self.dtype).view("|u1").data


def cast(data: Array, stored: DType, dtype: DType) -> Array:
    """Values as those of another dtype, as torch casts them."""
    values: Array = data.view(numpy_dtype(stored))
    with np.errstate(all="ignore"):
        if stored.name == "float64" and dtype.itemsize < 4:  # by way of float32
            values = values.astype("<f4")
        return np.asarray(values.astype(numpy_dtype(dtype)))


def rounded(
    evidence: Evidence,
    expected: TensorFingerprint,
    actual: TensorFingerprint,
    tensor: Tensor | None,
) -> Cause | None:
    """Find the rounding, or the widening, that made the one of the other."""
    if expected.numel != actual.numel or expected.dtype.kind != "float" or not expected.numel:
        return None
    if expected.shape != actual.shape or actual.dtype.kind != "float":
        return None
    if tensor is not None and is_wider(actual.dtype, expected.dtype):
        return _widened(evidence, expected, tensor)
    if tensor is None:
        return None
    for name in CASTS:
        dtype = DTYPES[name]
        if not is_wider(expected.dtype, dtype) or actual.dtype not in (dtype, expected.dtype):
            continue
        proof = _proof_of(evidence, expected, tensor, dtype)
        if proof is not None:
            stays = "" if actual.dtype == dtype else f" (and stored as {actual.dtype})"
            return Cause(
                kind="rounded",
                text=f"the golden's values, rounded to {name}{stays}",
                proof=proof,
                accept=("rounded",),
                dtype=name,
            )
    return None


def _proof_of(
    evidence: Evidence, expected: TensorFingerprint, tensor: Tensor, dtype: DType
) -> Proof | None:
    """What proves that a tensor holds the golden's values rounded to a dtype; None: it does not."""
    wide = _values_of(evidence, expected)
    if wide is not None:
        narrow = Cast(wide, expected.dtype, dtype)
        return "values" if _is_cast(evidence, narrow, dtype, tensor, tensor.dtype) else None
    kept = None if expected.hashes is None else expected.hashes.of_rounding(expected.dtype, dtype)
    if kept is None:
        return None
    if tensor.dtype != dtype:
        narrow = Cast(tensor, tensor.dtype, dtype)
        if not are_same(Cast(narrow, dtype, tensor.dtype), tensor):
            return None
    return "hash" if hash_as(evidence, tensor, tensor.dtype, dtype) == kept else None


def hash_as(evidence: Evidence, view: View, stored: DType, dtype: DType) -> bytes:
    """The hash of a view's values as those of a dtype that is no wider."""
    step = UNIT_NUMEL * stored.itemsize

    def of_unit(start: int) -> bytes:
        evidence.check_time()
        data = buffers.get("chunk", min(step, view.nbytes - start))
        view.read_into(start, data.data)
        return hash_unit(data.view(numpy_dtype(stored)), dtype)

    units = parallel(of_unit, [*range(0, view.nbytes, step)], jobs=evidence.workers.jobs)
    return join_units(units)


def _values_of(evidence: Evidence, expected: TensorFingerprint) -> View | None:
    if expected.values is not None:
        return expected
    return evidence.references.get(expected.key)


def _is_cast(evidence: Evidence, narrow: Cast, dtype: DType, tensor: Tensor, stored: DType) -> bool:
    """Whether a tensor holds just these rounded values, as stored."""
    there: View = narrow if stored == dtype else Cast(narrow, dtype, stored)
    evidence.check_time()
    return there.nbytes == tensor.nbytes and are_same(there, tensor)


def _widened(evidence: Evidence, expected: TensorFingerprint, tensor: Tensor) -> Cause | None:
    narrow = Cast(tensor, tensor.dtype, expected.dtype)
    if not evidence.are_bytes_of(narrow, expected):
        return None
    back = Cast(narrow, expected.dtype, tensor.dtype)
    if not are_same(back, tensor):
        return Cause(
            kind="rounded",
            text=f"with more digits: rounded to {expected.dtype} it is the golden",
            proof="digest",
            accept=("rounded",),
            dtype=expected.dtype.name,
        )
    return Cause(
        kind="widened",
        text=f"the golden's values, widened to {tensor.dtype}",
        proof="digest",
        accept=("rounded",),
        dtype=tensor.dtype.name,
    )


def rounded_elsewhere(
    evidence: Evidence, missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, tuple[Cause, Cause]]]:
    """Pair missing and unexpected tensors that are each other, rounded or widened."""
    left = {k: t for k, t in missing.items() if not is_constant(t.stats)}
    for there, tensor in unexpected.items():
        if tensor.dtype.kind != "float" or not tensor.numel:
            continue
        key, cause = _found_elsewhere(evidence, left, tensor)
        if key is not None and cause is not None:
            del left[key]
            accept: tuple[Acceptable, ...] = ("renamed", "rounded")
            text = f"holds what {key} holds in the golden: {cause.text}"
            moved = replace(cause, kind="moved", text=text, accept=accept, of=(key,))
            yield key, there, (moved, cause)


def _found_elsewhere(
    evidence: Evidence, missing: Mapping[str, TensorFingerprint], tensor: Tensor
) -> tuple[str | None, Cause | None]:
    evidence.check_time()
    actual = evidence.actual.get(tensor.key)
    if actual is None:
        return None, None
    fitting = {k: t for k, t in missing.items() if t.shape == tensor.shape}
    for dtype in {t.dtype.name: t.dtype for t in fitting.values()}.values():
        if is_wider(tensor.dtype, dtype):
            narrow = Cast(tensor, tensor.dtype, dtype)
            digest = digest_as(narrow, dtype, tensor.shape, evidence.workers)
            for key, expected in fitting.items():
                if expected.digest == digest:
                    return key, _widened(evidence, expected, tensor)
    for key, expected in fitting.items():
        if is_wider(expected.dtype, tensor.dtype) and _may_round(expected, actual):
            cause = rounded(evidence, expected, actual, tensor)
            if cause is not None:
                return key, cause
    return None, None


def _may_round(expected: TensorFingerprint, actual: TensorFingerprint) -> bool:
    """Whether the least and the greatest value allow it: rounding keeps their order."""
    ours, theirs = expected.stats, actual.stats
    if ours is None or theirs is None:
        return True
    ends = np.array([ours.min, ours.max])
    with np.errstate(all="ignore"):
        now = ends.astype(numpy_dtype(actual.dtype)).astype("<f8")
    return bool(now[0] == theirs.min and now[1] == theirs.max)
