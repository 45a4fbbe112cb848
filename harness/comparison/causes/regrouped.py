"""Hypotheses across keys: tensors joined, split and stacked, and how their parts are ordered.

In: the golden's tensors without a counterpart, and the checkpoint's. Out: groups in which one
tensor of one side is several of the other, each byte of it proved by the golden's digests. A form
that explained one tensor is tried first for the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from harness.checkpoint.dtypes import DType
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence
from harness.comparison.causes.views import (
    Chained,
    Joined,
    View,
    digest_as,
    narrowed,
    permuted,
    selected,
)
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.text.folding import fold, fold_names

NUMBER = re.compile(r"\d+")
_MAX_PARTS = 4  # of a join, whose order is tried
_MAX_STACKED = 4096


@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """Keys of the golden that are keys of the checkpoint now; one side is a single tensor."""

    expected: tuple[str, ...]
    actual: tuple[str, ...]
    cause: Cause


def regrouped(
    evidence: Evidence,
    missing: Sequence[TensorFingerprint],
    unexpected: Sequence[Tensor],
) -> Iterator[Regrouped]:
    """Find what was joined or stacked, then what was split or taken from a stack."""
    left = {tensor.key: tensor for tensor in missing if tensor.numel > 1}
    free = {tensor.key: tensor for tensor in unexpected if tensor.numel > 1}
    for tensor in [*free.values()]:
        found = _parts_of(evidence, tensor, left)
        if found is not None:
            yield found
            del free[tensor.key]
            for key in found.expected:
                left.pop(key, None)
    for expected in [*left.values()]:
        found = _whole_of(evidence, expected, free)
        if found is not None:
            yield found
            for key in found.actual:
                free.pop(key, None)


class _Wanted:
    """The golden's tensors that parts may be, by shape, and by digest."""

    def __init__(self, dtype: DType, tensors: Mapping[str, TensorFingerprint]) -> None:
        of_dtype = [t for t in tensors.values() if t.dtype == dtype]
        self.shapes: dict[tuple[int, ...], list[TensorFingerprint]] = {}
        for tensor in of_dtype:
            self.shapes.setdefault(tensor.shape, []).append(tensor)


def _parts_of(
    evidence: Evidence, tensor: Tensor, missing: Mapping[str, TensorFingerprint]
) -> Regrouped | None:
    """The golden's tensors that this one consists of."""
    wanted = _Wanted(tensor.dtype, missing)
    ndim = len(tensor.shape)
    for axis in range(min(ndim, 3)):
        keys = _along(evidence, tensor, axis, wanted)
        if keys is not None and len(keys) > 1:
            cause = Cause(
                kind="joined",
                text=f"{short(tensor.key, keys)} = {names(keys)} joined along {axis}",
                proof="digest",
                accept=("joined",),
                of=tuple(keys),
                axis=axis,
            )
            return Regrouped(expected=tuple(keys), actual=(tensor.key,), cause=cause)
    if ndim < 2 or tensor.shape[0] > _MAX_STACKED:
        return None
    for form in _FORMS:
        keys = []
        for index in range(tensor.shape[0]):
            found = form(evidence, selected(tensor, 0, index), wanted)
            if found is None:
                break
            keys += found
        else:
            if len(set(keys)) == len(keys) and len(keys) > 1:
                return Regrouped(
                    expected=tuple(keys), actual=(tensor.key,), cause=_stacked(tensor.key, keys)
                )
    return None


def _stacked(key: str, keys: Sequence[str]) -> Cause:
    return Cause(
        kind="stacked",
        text=f"{short(key, keys)} = {names(keys)}, stacked",
        proof="digest",
        accept=("joined",),
        of=tuple(keys),
        axis=0,
    )


def _as_it_is(evidence: Evidence, view: Tensor, wanted: _Wanted) -> list[str] | None:
    return _one_of(evidence, view, wanted.shapes.get(view.shape, ()))


def _as_transposed(evidence: Evidence, view: Tensor, wanted: _Wanted) -> list[str] | None:
    return _as_it_is(evidence, permuted(view, (1, 0)), wanted) if len(view.shape) == 2 else None


def _as_joined(evidence: Evidence, view: Tensor, wanted: _Wanted) -> list[str] | None:
    for axis in range(min(2, len(view.shape))):
        found = _along(evidence, view, axis, wanted)
        if found is not None:
            return found
    return None


def _as_joined_transposed(evidence: Evidence, view: Tensor, wanted: _Wanted) -> list[str] | None:
    return _as_joined(evidence, permuted(view, (1, 0)), wanted) if len(view.shape) == 2 else None


def _as_interleaved(evidence: Evidence, view: Tensor, wanted: _Wanted) -> list[str] | None:
    """Two tensors whose rows, or columns, alternate: gate and up of some experts."""
    for seen in (view, permuted(view, (1, 0))) if len(view.shape) == 2 else (view,):
        for axis in range(len(seen.shape)):
            size = seen.shape[axis]
            if size % 2:
                continue
            halves = [narrowed(seen, axis, start, size, 2) for start in (0, 1)]
            found = [_as_it_is(evidence, half, wanted) for half in halves]
            if all(found):
                return [key for keys in found for key in keys or ()]
    return None


_FORMS = (_as_it_is, _as_joined, _as_transposed, _as_joined_transposed, _as_interleaved)


def _along(evidence: Evidence, view: Tensor, axis: int, wanted: _Wanted) -> list[str] | None:
    """The golden's tensors that are this one's parts along a dim, from the first to the last."""
    rest = view.shape[:axis] + view.shape[axis + 1 :]
    by_size = {
        shape[axis]: tensors
        for shape, tensors in wanted.shapes.items()
        if len(shape) == len(view.shape) and shape[:axis] + shape[axis + 1 :] == rest
    }
    keys: list[str] = []
    start = 0
    while start < view.shape[axis]:
        for size, tensors in by_size.items():
            if 0 < size < view.shape[axis] and start + size <= view.shape[axis]:
                part = narrowed(view, axis, start, start + size)
                free = [tensor for tensor in tensors if tensor.key not in keys]
                found = _one_of(evidence, part, free)
                if found is not None:
                    keys += found
                    start += size
                    break
        else:
            return None
    return keys


def _one_of(
    evidence: Evidence, view: Tensor, candidates: Sequence[TensorFingerprint]
) -> list[str] | None:
    """Which of some tensors a view is, by its digest; few at a time, by their first blocks."""
    if not candidates:
        return None
    evidence.check_time()
    if len(candidates) <= 4:
        for tensor in candidates:
            if evidence.are_bytes_of(view, tensor):
                return [tensor.key]
        return None
    first = candidates[0]
    digest = digest_as(view, first.dtype, first.shape, evidence.workers)
    return next(([tensor.key] for tensor in candidates if tensor.digest == digest), None)


def _whole_of(
    evidence: Evidence, expected: TensorFingerprint, free: Mapping[str, Tensor]
) -> Regrouped | None:
    """The checkpoint's tensors that the golden's consisted of."""
    for parts, view, kind, axis in _wholes(expected, free):
        if evidence.are_bytes_of(view, expected):
            keys = [part.key for part in parts]
            how = "unstacked" if kind == "stacked" else f"split along {axis}"
            cause = Cause(
                kind="split",
                text=f"{short(expected.key, keys)} is now {names(keys)}, {how}",
                proof="digest",
                accept=("joined",),
                of=tuple(keys),
                axis=axis,
            )
            return Regrouped(expected=(expected.key,), actual=tuple(keys), cause=cause)
    return None


def _wholes(
    expected: TensorFingerprint, free: Mapping[str, Tensor]
) -> Iterator[tuple[list[Tensor], View, str, int]]:
    """What the golden's tensor may be made of: parts in an order, and how."""
    numbers = NUMBER.findall(expected.key)
    near = [
        tensor
        for tensor in free.values()
        if tensor.dtype == expected.dtype and _holds_numbers(tensor.key, numbers)
    ]
    for axis in range(min(3, len(expected.shape))):
        rest = expected.shape[:axis] + expected.shape[axis + 1 :]
        fitting = [
            tensor
            for tensor in near
            if len(tensor.shape) == len(expected.shape)
            and tensor.shape[:axis] + tensor.shape[axis + 1 :] == rest
            and len(NUMBER.findall(tensor.key)) == len(numbers)
        ]
        for count in range(2, min(_MAX_PARTS, len(fitting)) + 1):
            for parts in permutations(fitting, count):
                if sum(part.shape[axis] for part in parts) == expected.shape[axis]:
                    view = Chained(parts) if axis == 0 else Joined(parts, axis)
                    yield [*parts], view, "joined", axis
    if len(expected.shape) < 2:
        return
    series = [some for some in _series(near) if len(some) == expected.shape[0]]
    inner = expected.shape[1:]
    for some in series:
        if some[0].shape == inner:
            yield some, Chained(some), "stacked", 0
        elif len(inner) == 2 and some[0].shape == inner[::-1]:
            yield some, Chained([permuted(part, (1, 0)) for part in some]), "stacked", 0
    for axis in range(len(inner)):
        for one, other in permutations(series, 2):
            pairs = [*zip(one, other, strict=True)]
            for turn in (False, True):
                seen = [
                    tuple(permuted(t, (1, 0)) if turn and len(t.shape) == 2 else t for t in pair)
                    for pair in pairs
                ]
                if _join_shape([part.shape for part in seen[0]], axis) == inner:
                    joined: list[View] = [
                        Chained(pair) if axis == 0 else Joined(pair, axis) for pair in seen
                    ]
                    yield [part for pair in pairs for part in pair], Chained(joined), "stacked", 0


def _join_shape(shapes: Sequence[tuple[int, ...]], axis: int) -> tuple[int, ...] | None:
    first = shapes[0]
    if any(len(s) != len(first) or axis >= len(s) for s in shapes):
        return None
    if len({s[:axis] + s[axis + 1 :] for s in shapes}) > 1:
        return None
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


def _series(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one shape whose keys differ in one number, in the order of that number."""
    found: dict[object, list[tuple[int, Tensor]]] = {}
    for tensor in tensors:
        numbers = NUMBER.findall(tensor.key)
        for place, number in enumerate(numbers):
            parts = NUMBER.split(tensor.key)
            others = (*numbers[:place], *numbers[place + 1 :])
            name = (tuple(parts), place, others, tensor.shape)
            found.setdefault(name, []).append((int(number), tensor))
    for some in found.values():
        if len(some) > 1:
            yield [tensor for _, tensor in sorted(some, key=lambda pair: pair[0])]


def _holds_numbers(key: str, numbers: Sequence[str]) -> bool:
    """Whether these numbers stand in a key, in their order: those of its layer."""
    rest = iter(NUMBER.findall(key))
    return all(number in rest for number in numbers)


def short(key: str, others: Sequence[str]) -> str:
    """A key without what it shares with all others, but for the last part of that."""
    return _without(key, _common((key, *others)))


def names(keys: Sequence[str]) -> str:
    """Keys in a few words, without what all of them share in front."""
    common = _common(keys)
    short = [_without(key, common) for key in keys]
    patterns = [pattern for pattern, _ in fold(short, ellipsis="..")]
    if len(patterns) <= 4:
        return " and ".join(filter(None, (", ".join(patterns[:-1]), patterns[-1])))
    folded = [pattern for pattern, _ in fold_names(short, ellipsis="..")]
    return ", ".join(folded[:4]) + (f" and {len(folded) - 4} more" if len(folded) > 4 else "")


def _common(keys: Sequence[str]) -> str:
    parts = [key.split(".") for key in keys]
    shared = []
    for column in zip(*(part[:-1] for part in parts), strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    if shared and not shared[-1].isdigit():
        shared.pop()  # it says what they are: experts.{0..3}, not {0..3}
    return "".join(f"{part}." for part in shared)


def _without(key: str, prefix: str) -> str:
    return key.removeprefix(prefix)
