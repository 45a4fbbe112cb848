"""Hypotheses about one tensor's bytes: the same as the golden's, seen in another way.

In: the expected fingerprint of a tensor, and the actual tensor. Out: the first `Cause` that the
expected digest proves, or None. Each costs a block to reject, and one pass over the tensor to
prove.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import TypeAlias

from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence
from harness.comparison.causes.rounding import matched
from harness.comparison.causes.views import are_same, narrowed, permuted, reshaped, split
from harness.fingerprints.fingerprint import TensorFingerprint

# What was done, of tensors of any size, and what makes the view and the cause of one.
_Way: TypeAlias = tuple[object, Callable[[], tuple[Tensor, Cause]]]
_MAX_NDIM = 5
_RESHAPED = Cause(kind="reshaped", text="", proof="digest", accept=("reshaped",))
_TRANSPOSED = Cause(kind="transposed", text="", proof="digest", accept=("transposed",))
_KEPT = Cause(kind="rows", text="", proof="digest", accept=("rows",))
_ROTATED = Cause(kind="rows", text="", proof="digest", accept=("order",), axis=0)
_CHANNELS_LAST = {(0, 2, 3, 1): "channels_last", (0, 2, 3, 4, 1): "channels_last_3d"}


def seen_otherwise(
    evidence: Evidence, expected: TensorFingerprint, actual: Tensor, *, as_others: bool = False
) -> tuple[Cause, ...]:
    """Find the other shape, order of dims or order of rows in which the values are the golden's.

    With `as_others`, of those that explained other tensors.
    """
    if expected.numel != actual.numel or expected.numel < 2:
        return ()
    # What explained one tensor is tried first for the next.
    ways = sorted(_ways(expected, actual), key=lambda way: way[0] not in evidence.proved)
    for name, make in ways:
        if as_others and name not in evidence.proved:
            break
        view, cause = make()
        match = matched(evidence, view, expected)
        if match is not None:
            evidence.proved.add(name)
            return match.of(cause)
    return ()


def _ways(expected: TensorFingerprint, actual: Tensor) -> Iterator[_Way]:
    if expected.shape != actual.shape:
        same = reshaped(actual, expected.shape)
        if same is not None:
            text = f"the same bytes as {list(actual.shape)}"
            yield _way("reshaped", same, replace(_RESHAPED, text=text, shape=actual.shape))
    yield from _permutations(expected, actual)
    if expected.shape == actual.shape and len(expected.shape) in (1, 2):
        yield from _rotary(actual)


def _way(name: object, view: Tensor, cause: Cause) -> _Way:
    return name, lambda: (view, cause)


def _permutations(expected: TensorFingerprint, actual: Tensor) -> Iterator[_Way]:
    """Dims in another order: as told by the shape, or bytes in one order read as in another."""
    ndim = len(actual.shape)
    for axes in _orders(ndim) if 2 <= ndim <= _MAX_NDIM else ():
        view = permuted(actual, axes)
        # `axes` make the golden of what is there: the reverse is what happened to it.
        back = _inverse(axes)
        if view.shape == expected.shape:
            text = "transposed" if ndim == 2 else f"its dims permuted as {list(back)}"
            yield _way((axes, "whole"), view, replace(_TRANSPOSED, text=text, axes=back))
        elif ndim == len(expected.shape) < _MAX_NDIM or _is_squeezed(view.shape, expected.shape):
            text = f"its dims permuted as {list(back)}, then reshaped"
            yield _way((axes, "reshaped"), view, replace(_TRANSPOSED, text=text, axes=back))
    ndim = len(expected.shape)
    if sorted(actual.shape) != sorted(expected.shape) or not 2 <= ndim <= _MAX_NDIM:
        return
    for axes in _orders(ndim) if ndim < _MAX_NDIM else ((0, 2, 3, 4, 1), (0, 4, 1, 2, 3)):
        memory = reshaped(actual, tuple(expected.shape[axis] for axis in axes))
        if memory is None:
            return
        name = _CHANNELS_LAST.get(axes)
        if name is None:
            name = "its transpose" if ndim == 2 else f"its dims in the order {list(axes)}"
        text = f"the bytes of {name}, read as contiguous"
        cause = replace(_TRANSPOSED, text=text, axes=axes)
        yield _way((axes, "read"), permuted(memory, _inverse(axes)), cause)


def _orders(ndim: int) -> list[tuple[int, ...]]:
    found = (axes for axes in permutations(range(ndim)) if axes != tuple(range(ndim)))
    return sorted(found, key=lambda axes: axes not in ((0, 2, 3, 1), (0, 3, 1, 2)))


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(axis) for axis in range(len(axes)))


def _is_squeezed(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return [n for n in shape if n != 1] == [n for n in other if n != 1]


def _rotary(actual: Tensor) -> Iterator[_Way]:
    """Rows of query and key heads: halves side by side, or rotated pairs interleaved."""
    num_rows = actual.shape[0]
    for head_dim in range(4, num_rows + 1, 2):
        if num_rows % head_dim == 0:
            for is_paired in (True, False):
                yield (head_dim, is_paired), partial(_rotated, actual, head_dim, is_paired)


def _rotated(actual: Tensor, head_dim: int, is_paired: bool) -> tuple[Tensor, Cause]:
    heads, half = actual.shape[0] // head_dim, head_dim // 2
    sizes = (heads, half, 2) if is_paired else (heads, 2, half)
    view = permuted(split(actual, 0, sizes), (0, 2, 1, *range(3, len(actual.shape) + 2)))
    said = "half-split, now interleaved" if is_paired else "interleaved, now half-split"
    plural = f"{heads} head{'s' if heads > 1 else ''} of {head_dim}"
    # Row 1 of the golden, as the simplest that has moved.
    text = (
        f"its rows in another order: RoPE {said} ({plural}); row 1 is now row "
        f"{2 if is_paired else half}"
    )
    return view, replace(_ROTATED, text=text, num_heads=heads)


def rows_kept(evidence: Evidence, expected: TensorFingerprint, actual: Tensor) -> Cause | None:
    """Find whether the golden is a range of one dim of what is there now."""
    if len(expected.shape) != len(actual.shape):
        return None
    axes = [a for a, (n, m) in enumerate(zip(expected.shape, actual.shape, strict=True)) if n != m]
    if len(axes) > 1:
        return _corner(evidence, expected, actual)
    if not axes or expected.numel == 0 or expected.shape[axes[0]] > actual.shape[axes[0]]:
        return None
    axis = axes[0]
    size, now = expected.shape[axis], actual.shape[axis]
    name = range_name(axis)
    for start in (0, now - size):
        view = narrowed(actual, axis, start, start + size)
        match = matched(evidence, view, expected)
        if match is not None:
            where = "" if start == 0 else f", moved to {start}–{now - 1}"
            text = f"{name} 0 to {size - 1} are the golden's{where}, {now - size:,} added"
            cause = replace(_KEPT, text=text, axis=axis, rows=((start, start + size),))
            return match.of(replace(cause, num_added=now - size))[0]
    return None


def _corner(evidence: Evidence, expected: TensorFingerprint, actual: Tensor) -> Cause | None:
    """Find whether one side is the first indices of several dims of the other."""
    if all(n <= m for n, m in zip(expected.shape, actual.shape, strict=True)):
        match = matched(evidence, _first_of(actual, expected.shape), expected)
        text = f"the first {list(expected.shape)} of {list(actual.shape)} are the golden's"
        return None if match is None else match.of(replace(_KEPT, text=text))[0]
    whole = evidence.references.get(expected.key)
    if whole is None or whole.dtype != actual.dtype:
        return None
    if any(n < m for n, m in zip(expected.shape, actual.shape, strict=True)):
        return None
    if not actual.numel or not are_same(_first_of(whole, actual.shape), actual):
        return None
    text = f"the first {list(actual.shape)} of the golden's {list(expected.shape)}"
    return replace(_KEPT, text=text, proof="values", accept=())


def _first_of(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        tensor = narrowed(tensor, axis, 0, size)
    return tensor


def range_name(axis: int) -> str:
    """What the indices of a dim are called."""
    return {0: "rows", 1: "columns"}.get(axis, f"indices of dim {axis}")
