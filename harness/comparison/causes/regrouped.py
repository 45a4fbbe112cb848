"""Hypotheses across keys: tensors joined, split and stacked, in any of the layouts that are used.

In: the golden's tensors without a counterpart, and the checkpoint's. Out: groups in which one
tensor of one side, the whole, is several of the other, each value of it proved by digests. A whole
has members, one for each number in a series of keys (experts, layers), stacked or one behind the
other; a member has up to four parts, joined along a dim: one behind the other, or a share of each
for each head or group of heads (BLOOM, GPT-NeoX, Megatron), or one by one; and each part may be
transposed. A layout that explained one tensor is tried first for the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from typing import Any, Generic, TypeVar

from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Acceptable, Cause
from harness.comparison.causes.evidence import Evidence
from harness.comparison.causes.rounding import Match, matched
from harness.comparison.causes.views import (
    Chained,
    Joined,
    View,
    narrowed,
    permuted,
    selected,
    split,
)
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.text.folding import fold, fold_names

NUMBER = re.compile(r"\d+")
# A number of its own, as of a layer or an expert, and not that of w1.
_INDEX = re.compile(r"(?<![^._])\d+(?![^._])")
_WORD = re.compile(r"[^\W\d_]+")
_MAX_PARTS, _MAX_CANDIDATES, _MAX_MEMBERS, _MAX_WAYS = 4, 6, 4096, 64

_Part = TypeVar("_Part", bound=Tensor | TensorFingerprint)


@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """Keys of the golden that are keys of the checkpoint now; one side is a single tensor."""

    expected: tuple[str, ...]
    actual: tuple[str, ...]
    causes: tuple[Cause, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How parts make a member, in `groups` along `axis`, and members a whole."""

    axis: int
    groups: int
    is_turned: bool
    is_stacked: bool
    in_order: bool

    def grouped(self, tensor: Tensor) -> Tensor:
        """A member, or a part of it as it stands there, with the groups as a dim."""
        return split(tensor, self.axis, (self.groups, tensor.shape[self.axis] // self.groups))

    def shape_of(self, part: Tensor | TensorFingerprint) -> tuple[int, ...]:
        """The shape of a part as it stands in a member."""
        return part.shape[::-1] if self.is_turned else part.shape

    def part_of(self, member: Tensor, start: int, stop: int) -> Tensor:
        """The part in a range of each group, in the order of its own values."""
        part = narrowed(self.grouped(member), self.axis + 1, start, stop)
        if not self.is_turned:
            return part
        return permuted(part, (1, 2, 0) if self.axis else (2, 0, 1))

    def member_of(self, parts: Sequence[Tensor]) -> View:
        standing = [permuted(part, (1, 0)) if self.is_turned else part for part in parts]
        if len(parts) == 1 or (self.axis == 0 and self.groups == 1):
            return Chained(standing)
        return Joined([self.grouped(part) for part in standing], self.axis + 1)


@dataclass(frozen=True, kw_only=True)
class Hypothesis(Generic[_Part]):
    """The parts of each member, and their layout."""

    layout: Layout
    members: Sequence[Sequence[_Part]]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(part.key for member in self.members for part in member)


def regrouped(
    evidence: Evidence, missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, Tensor]
) -> Iterator[Regrouped]:
    """Find what was joined or stacked, then what was split or taken from a stack."""
    used: set[str] = set()
    series = Series(t for t in missing.values() if t.numel > 1)
    for tensor in unexpected.values():
        evidence.check_time()
        for way in series.ways(tensor, used, evidence.proved):
            match = _is_whole(evidence, tensor, way)
            if match is not None:
                evidence.proved.add(way.layout)
                used.update(way.keys)
                causes = causes_of(tensor.key, way, match, is_split=False)
                yield Regrouped(expected=way.keys, actual=(tensor.key,), causes=causes)
                used.add(tensor.key)
                break
    free = Series(t for t in unexpected.values() if t.numel > 1 and t.key not in used)
    for expected in missing.values():
        evidence.check_time()
        if expected.key in used:
            continue
        for split_up in free.ways(expected, used, evidence.proved):
            whole = Chained([split_up.layout.member_of(parts) for parts in split_up.members])
            match = matched(evidence, whole, expected)
            if match is not None:
                evidence.proved.add(split_up.layout)
                used.update(split_up.keys)
                causes = causes_of(expected.key, split_up, match, is_split=True)
                yield Regrouped(expected=(expected.key,), actual=split_up.keys, causes=causes)
                break


def by_names(
    missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, TensorFingerprint]
) -> Iterator[Regrouped]:
    """The same by keys and shapes alone, where there are no values to compare."""
    used: set[str] = set()
    for is_split, some, wholes in ((False, missing, unexpected), (True, unexpected, missing)):
        series = Series(t for t in some.values() if t.numel > 1)
        for whole in wholes.values():
            ways = [*islice(series.ways(whole, used, set()), _MAX_WAYS)]
            if whole.key in used or not ways:
                continue
            way = max(ways, key=lambda way: likeness(whole.key, way.keys))
            if likeness(whole.key, way.keys) > 0:
                used |= {whole.key, *way.keys}
                causes = causes_of(whole.key, way, Match(), is_split=is_split)
                causes = tuple(replace(cause, proof="names") for cause in causes)
                one, other = (whole.key,), way.keys
                expected, actual = (one, other) if is_split else (other, one)
                yield Regrouped(expected=expected, actual=actual, causes=causes)


def likeness(whole: str, keys: Sequence[str]) -> int:
    """How many words of its parts are in the name of a whole, or letters: q, k and v in qkv."""
    common = _common((whole, *keys))
    own, parts = _without(whole, common), {_without(key, common) for key in keys}
    words = {word for part in parts for word in _WORD.findall(part)} - {"weight", "bias"}
    rest = "".join(word for word in _WORD.findall(own) if word not in words)  # o is not in proj
    return sum((word in rest) if len(word) == 1 else 1 if word in own else -1 for word in words)


def _is_whole(
    evidence: Evidence, tensor: Tensor, way: Hypothesis[TensorFingerprint]
) -> Match | None:
    """Whether a tensor holds these parts, all of them or none cast."""
    found: Match | None = None
    for view, part in parts_in(tensor, way):
        match = matched(evidence, view, part)
        if match is None or (found is not None and match.how != found.how):
            return None
        found = match
    return found


def parts_in(tensor: Tensor, way: Hypothesis[_Part]) -> Iterator[tuple[Tensor, _Part]]:
    """What stands in a whole for each of its parts."""
    layout, rows = way.layout, tensor.shape[0] // len(way.members)
    for place, parts in enumerate(way.members):
        member = (
            selected(tensor, 0, place)
            if layout.is_stacked
            else narrowed(tensor, 0, place * rows, (place + 1) * rows)
        )
        start = 0
        for part in parts:
            stop = start + layout.shape_of(part)[layout.axis] // layout.groups
            yield layout.part_of(member, start, stop), part
            start = stop


class Series(Generic[_Part]):
    """Tensors, alone and as series whose keys differ in one number, by the other numbers."""

    def __init__(self, tensors: Iterator[_Part]) -> None:
        self._alone: dict[object, list[_Part]] = {}
        self._series: dict[object, dict[object, list[tuple[int, _Part]]]] = {}
        for tensor in tensors:
            places = [*_INDEX.finditer(tensor.key)]
            numbers = tuple(place[0] for place in places)
            self._alone.setdefault(numbers, []).append(tensor)
            for at, place in enumerate(places):
                others = (*numbers[:at], *numbers[at + 1 :])
                name = tensor.key[: place.start()], tensor.key[place.end() :], tensor.shape
                of_others = self._series.setdefault(others, {})
                of_others.setdefault(name, []).append((int(place[0]), tensor))

    def ways(
        self, whole: Tensor | TensorFingerprint, used: set[str], proved: set[object]
    ) -> Iterator[Hypothesis[_Part]]:
        """What a whole may be made of, as far as keys and shapes allow; proved layouts first."""
        for is_proved in (True, False):
            for way in self._ways(whole, used):
                if (way.layout in proved) == is_proved:
                    yield way

    def _ways(
        self, whole: Tensor | TensorFingerprint, used: set[str]
    ) -> Iterator[Hypothesis[_Part]]:
        numbers = tuple(_INDEX.findall(whole.key))
        ndim = len(whole.shape)
        if not ndim or whole.numel < 2:
            return
        near = self._alone.get(numbers, [])
        if len(near) <= _MAX_MEMBERS:
            alone = [[t] for t in near if t.numel < whole.numel and t.key not in used]
            yield from self._members(whole.shape, alone, is_stacked=False, in_order=True)
        by_count: dict[int, list[list[tuple[int, _Part]]]] = {}
        for some in self._series.get(numbers, {}).values():
            is_small = some[0][1].numel * len(some) <= whole.numel
            if (
                is_small
                and 2 <= len(some) <= _MAX_MEMBERS
                and not any(t.key in used for _, t in some)
            ):
                by_count.setdefault(len(some), []).append(some)
        for count, series in by_count.items():
            sizes = [(whole.shape[1:], True)] if whole.shape[0] == count and ndim > 1 else []
            if whole.shape[0] % count == 0:
                sizes.append(((whole.shape[0] // count, *whole.shape[1:]), False))
            for inner, is_stacked in sizes:
                # As numbers, or by mistake as text.
                orders: list[tuple[bool, Callable[[int], Any]]] = [(True, int)]
                if count > 10:
                    orders.append((False, str))  # by mistake, as text
                for in_order, by in orders:
                    members = [
                        [t for _, t in sorted(some, key=lambda one: by(one[0]))] for some in series
                    ]
                    yield from self._members(
                        inner, members, is_stacked=is_stacked, in_order=in_order
                    )

    def _members(
        self,
        inner: tuple[int, ...],
        series: Sequence[Sequence[_Part]],
        *,
        is_stacked: bool,
        in_order: bool,
    ) -> Iterator[Hypothesis[_Part]]:
        for is_turned in (False, True) if len(inner) == 2 else (False,):
            for axis in range(len(inner)):
                rest = inner[:axis] + inner[axis + 1 :]
                form = Layout(
                    axis=axis,
                    groups=1,
                    is_turned=is_turned,
                    is_stacked=is_stacked,
                    in_order=in_order,
                )
                sizes = {}
                for place, some in enumerate(series):
                    shape = form.shape_of(some[0])
                    if len(shape) == len(inner) and shape[:axis] + shape[axis + 1 :] == rest:
                        sizes[place] = shape[axis]
                alone = [p for p, size in sizes.items() if size == inner[axis]]
                if axis == 0 and len(series) and len(series[0]) > 1:
                    for place in alone:
                        yield Hypothesis(layout=form, members=[[t] for t in series[place]])
                places = [p for p, size in sizes.items() if 0 < size < inner[axis]]
                if len(places) > _MAX_CANDIDATES:
                    continue
                for count in range(2, min(_MAX_PARTS, len(places)) + 1):
                    for chosen in permutations(places, count):
                        each = [sizes[place] for place in chosen]
                        if sum(each) != inner[axis]:
                            continue
                        members = [*zip(*(series[place] for place in chosen), strict=True)]
                        for groups in _divisors(math.gcd(*each)):
                            layout = Layout(**{**vars(form), "groups": groups})
                            yield Hypothesis(layout=layout, members=members)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def causes_of(
    whole: str, way: Hypothesis[_Part], match: Match, *, is_split: bool
) -> tuple[Cause, ...]:
    layout, keys = way.layout, way.keys
    is_joined = len(way.members[0]) > 1 or not layout.is_stacked
    along = f" along {layout.axis}" if len(way.members[0]) > 1 else " along 0"
    if layout.groups > 1:
        along += f", in {layout.groups:,} groups"
    if len(way.members) > 1 and layout.is_stacked:
        how = "unstacked" if is_split else "stacked"
    else:
        how = f"{'split' if is_split else 'joined'}{along}"
    text = f"{short(whole, keys)} {'is now' if is_split else '='} {names(keys)}"
    text += f"{',' if is_split or how == 'stacked' else ''} {how}"
    accept: tuple[Acceptable, ...] = ("joined",)
    if layout.is_turned:
        text += ", transposed"
        accept += ("transposed",)
    if not layout.in_order:
        text += ", in the order of their names as text: " + ", ".join(
            _INDEX.findall(member[0].key)[-1] for member in way.members[:4]
        )
        text += ", …"
        accept += ("order",)
    cause = Cause(
        kind="split" if is_split else "stacked" if how == "stacked" else "joined",
        text=text,
        proof="digest",
        accept=accept,
        of=keys,
        axis=layout.axis if is_joined and how != "stacked" else 0,
        axes=(1, 0) if layout.is_turned else None,
        num_heads=layout.groups if layout.groups > 1 else None,
    )
    return match.of(cause)


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
