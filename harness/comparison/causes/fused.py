"""Hypotheses about fused projections: query, key and value in one tensor, in some layout.

In: the golden's tensors without a counterpart, and the checkpoint's. Out: groups in which one
tensor of one side has the rows of several of the other: one part behind the other, or a share of
each part for each head or group of heads (as in BLOOM, GPT-NeoX and Megatron), or row by row, and
each of these transposed (GPT-2). The digests of the parts, or of the whole, prove it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence
from harness.comparison.causes.regrouped import NUMBER, Regrouped, names, short
from harness.comparison.causes.views import Joined, View, narrowed, permuted, split
from harness.fingerprints.fingerprint import TensorFingerprint

_Part = TypeVar("_Part", Tensor, TensorFingerprint)
_MAX_PARTS, _MAX_CANDIDATES = 4, 6


@dataclass(frozen=True)
class _Layout:
    """How many groups of rows the whole has, each with a share of every part."""

    groups: int
    is_transposed: bool

    def cause(self, text: str, of: Sequence[str], *, is_split: bool) -> Cause:
        by = f", in {self.groups:,} groups" if self.groups > 1 else ""
        turned = ", transposed" if self.is_transposed else ""
        return Cause(
            kind="split" if is_split else "joined",
            text=f"{text} {'split' if is_split else 'joined'} along 0{by}{turned}",
            proof="digest",
            accept=("joined", "transposed") if self.is_transposed else ("joined",),
            of=tuple(of),
            axis=0,
            axes=(1, 0) if self.is_transposed else None,
            num_heads=self.groups if self.groups > 1 else None,
        )


def fused(
    evidence: Evidence,
    missing: Mapping[str, TensorFingerprint],
    unexpected: Mapping[str, Tensor],
) -> Iterator[Regrouped]:
    """Find what was fused, then what was split, along rows in any of the layouts."""
    left, free = dict(missing), dict(unexpected)
    for tensor in unexpected.values():
        found = _fused(evidence, tensor, left)
        if found is not None:
            yield found
            del free[tensor.key]
            for key in found.expected:
                del left[key]
    for expected in [*left.values()]:
        found = _unfused(evidence, expected, free)
        if found is not None:
            yield found
            for key in found.actual:
                del free[key]


def _fused(
    evidence: Evidence, tensor: Tensor, missing: Mapping[str, TensorFingerprint]
) -> Regrouped | None:
    for layout, parts in _layouts(tensor, missing):
        whole = permuted(tensor, (1, 0)) if layout.is_transposed else tensor
        size = whole.shape[0] // layout.groups
        grouped = split(whole, 0, (layout.groups, size))
        start = 0
        for part in parts:
            stop = start + part.shape[0] // layout.groups
            if not evidence.are_bytes_of(narrowed(grouped, 1, start, stop), part):
                break
            start = stop
        else:
            keys = [part.key for part in parts]
            text = f"{short(tensor.key, keys)} = {names(keys)}"
            cause = layout.cause(text, keys, is_split=False)
            return Regrouped(expected=tuple(keys), actual=(tensor.key,), cause=cause)
    return None


def _unfused(
    evidence: Evidence, expected: TensorFingerprint, free: Mapping[str, Tensor]
) -> Regrouped | None:
    for layout, parts in _layouts(expected, free):
        if evidence.are_bytes_of(_whole(layout, parts), expected):
            keys = [part.key for part in parts]
            text = f"{short(expected.key, keys)} is now {names(keys)},"
            cause = layout.cause(text, keys, is_split=True)
            return Regrouped(expected=(expected.key,), actual=tuple(keys), cause=cause)
    return None


def _whole(layout: _Layout, parts: Sequence[Tensor]) -> View:
    groups = layout.groups
    grouped = [split(part, 0, (groups, part.shape[0] // groups)) for part in parts]
    if layout.is_transposed:
        return Joined([permuted(part, (2, 0, 1)) for part in grouped], 2)
    return Joined(grouped, 1)


def _layouts(
    whole: Tensor | TensorFingerprint, others: Mapping[str, _Part]
) -> Iterator[tuple[_Layout, tuple[_Part, ...]]]:
    """The layouts that the shapes allow, with parts of the same layer in an order."""
    numbers = NUMBER.findall(whole.key)
    near = [
        other
        for other in others.values()
        if other.dtype == whole.dtype
        and other.numel < whole.numel
        and len(other.shape) == len(whole.shape)
        and NUMBER.findall(other.key) == numbers
    ]
    for is_transposed in (False, True) if len(whole.shape) == 2 else (False,):
        shape = whole.shape[::-1] if is_transposed else whole.shape
        fitting = [other for other in near if other.shape[1:] == shape[1:]]
        if not shape or len(fitting) > _MAX_CANDIDATES:
            continue
        for count in range(2, min(_MAX_PARTS, len(fitting)) + 1):
            for parts in permutations(fitting, count):
                rows = [part.shape[0] for part in parts]
                if sum(rows) == shape[0]:
                    for groups in _divisors(math.gcd(*rows)):
                        yield _Layout(groups, is_transposed), parts


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
