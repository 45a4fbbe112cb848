"""What stands where other tensors stood, by shapes and names, and what its values have of theirs.

In: the golden's tensors without a counterpart, and the checkpoint's, of which no hypothesis about
equal values holds. Out: groups with a `Cause` that nothing accepts: values that are unrelated in
every layout that the shapes allow, or related in one, to which something else happened, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, is_constant
from harness.comparison.causes.regrouped import (
    NUMBER,
    Hypothesis,
    Layout,
    Regrouped,
    Series,
    causes_of,
    likeness,
    names,
    parts_in,
    short,
)
from harness.comparison.causes.rounding import Match
from harness.comparison.causes.unrelated import (
    Correlation,
    correlation_of_blocks,
    joint,
    sampled,
    unrelated,
)
from harness.comparison.causes.views import Chained, View
from harness.fingerprints.fingerprint import TensorFingerprint

_Part = Tensor | TensorFingerprint
_MAX_LAYOUTS, _MAX_PAIRS = 64, 8


@dataclass(frozen=True, kw_only=True)
class _Stand:
    """A whole in place of parts, or the reverse, and how the values correlate at the best."""

    whole: _Part
    way: Hypothesis[_Part]
    found: Correlation
    is_split: bool

    def as_group(self, causes: tuple[Cause, ...]) -> Regrouped:
        parts, whole = self.way.keys, (self.whole.key,)
        expected, actual = (whole, parts) if self.is_split else (parts, whole)
        return Regrouped(expected=expected, actual=actual, causes=causes)


def replaced(
    evidence: Evidence,
    missing: Mapping[str, TensorFingerprint],
    unexpected: Mapping[str, Tensor],
    pairs: Iterable[tuple[str, str]],
) -> Iterator[Regrouped]:
    """Find what stands where something else stood; `pairs` of keys may be each other by name."""
    groups: dict[str, list[_Stand]] = {}
    for stand in _stands(evidence, missing, unexpected, pairs):
        groups.setdefault(NUMBER.sub("#", stand.whole.key), []).append(stand)
    for stands in groups.values():
        related = [stand for stand in stands if stand.found.is_related]
        for stand in related:
            if len(stand.way.keys) > 1:
                yield stand.as_group((_related(stand),))
        cause = unrelated([stand.found for stand in stands])
        if cause is not None and not related:
            yield from (stand.as_group((_unrelated(stand, cause),)) for stand in stands)


def _stands(
    evidence: Evidence,
    missing: Mapping[str, TensorFingerprint],
    unexpected: Mapping[str, Tensor],
    pairs: Iterable[tuple[str, str]],
) -> Iterator[_Stand]:
    used: set[str] = set()
    layouts: dict[str, list[Layout]] = {}
    found: list[tuple[_Part, Iterable[Hypothesis[_Part]], bool]] = []
    ours: Series[_Part] = Series(t for t in missing.values() if t.numel > 1)
    theirs: Series[_Part] = Series(t for t in unexpected.values() if t.numel > 1)
    found += [(t, ours.ways(t, used, set()), False) for t in unexpected.values()]
    found += [(t, theirs.ways(t, used, set()), True) for t in missing.values()]
    alone = Layout(axis=0, groups=1, is_turned=False, is_stacked=False, in_order=True)
    for key, there in (*pairs, *_alone_of_its_shape(missing, unexpected)):
        if missing[key].shape == unexpected[there].shape:
            way: Hypothesis[_Part] = Hypothesis(layout=alone, members=[[missing[key]]])
            found.append((unexpected[there], [way], False))
    for whole, of_shape, is_split in found:
        evidence.check_time()
        by_name = [*of_shape] if isinstance(of_shape, list) else _by_name(whole, of_shape)
        ways = [way for way in by_name if used.isdisjoint((whole.key, *way.keys))]
        name = NUMBER.sub("#", whole.key)
        # Of a series the first one shows which layouts there are.
        ways = [way for way in ways if way.layout in layouts.get(name, [way.layout])]
        tried = []
        for way in ways:
            one = _correlation(evidence, whole, way, missing, is_split=is_split)
            if one is not None:
                tried.append(_Stand(whole=whole, way=way, found=one, is_split=is_split))
        if tried:
            best = max(tried, key=lambda stand: abs(stand.found.value))
            if not best.found.is_related:
                best = tried[0]  # in the golden's order; the best of many is so by chance
            simple = [way.layout for way in ways if way.layout.groups == 1]
            layouts.setdefault(
                name, [best.way.layout] if best.found.is_related else [best.way.layout, *simple]
            )
            used.update((whole.key, *best.way.keys))
            yield best


def _by_name(whole: _Part, ways: Iterable[Hypothesis[_Part]]) -> list[Hypothesis[_Part]]:
    """The ways to make a whole of those tensors whose names are in its own; none where two are."""
    sets: dict[frozenset[str], list[Hypothesis[_Part]]] = {}
    for way in islice(ways, _MAX_LAYOUTS):
        sets.setdefault(frozenset(way.keys), []).append(way)
    alike = {keys: likeness(whole.key, sorted(keys)) for keys in sets}
    most = max(alike.values(), default=0)
    best = [keys for keys, count in alike.items() if count == most]
    return sets[best[0]] if most > 0 and len(best) == 1 else []


def _alone_of_its_shape(
    missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Pairs of one shape and layer, of which each side has no other."""
    sides: list[dict[object, list[str]]] = [{}, {}]
    both: tuple[Mapping[str, _Part], ...] = (missing, unexpected)
    for side, tensors in zip(sides, both, strict=True):
        for key, tensor in tensors.items():
            side.setdefault((*NUMBER.findall(key), tensor.shape), []).append(key)
    for name, keys in sides[0].items():
        if len(keys) == len(sides[1].get(name, ())) == 1:
            yield keys[0], sides[1][name][0]


def _correlation(
    evidence: Evidence,
    whole: _Part,
    way: Hypothesis[_Part],
    missing: Mapping[str, TensorFingerprint],
    *,
    is_split: bool,
) -> Correlation | None:
    """How values correlate in a layout, of a few parts."""
    evidence.check_time()
    pairs: Iterable[tuple[View, _Part]]
    if isinstance(whole, Tensor):
        pairs = parts_in(whole, way)
    else:
        members = [
            way.layout.member_of([p for p in m if isinstance(p, Tensor)]) for m in way.members
        ]
        pairs = [(Chained(members), whole)]
    found = []
    for view, part in islice(pairs, _MAX_PAIRS):
        expected = missing[part.key]
        if is_constant(expected.stats):
            continue
        seen, known = evidence.memory.at_hand(view), evidence.values_of(expected)
        one = (
            correlation_of_blocks(expected, seen, evidence.block_nbytes)
            if known is None
            else sampled(known, seen)
        )
        if one is None:
            return None
        found.append(one)
    return joint(found)


def _related(stand: _Stand) -> Cause:
    [cause] = causes_of(stand.whole.key, stand.way, Match(), is_split=stand.is_split)
    value, error = stand.found.value, stand.found.error
    text = f"{cause.text}, with other values (correlation {value:.2f} ± {2 * error:.2f})"
    return replace(cause, text=text, proof="sketch", accept=(), correlation=value)


def _unrelated(stand: _Stand, cause: Cause) -> Cause:
    whole, keys = stand.whole.key, stand.way.keys
    said = f"{short(whole, keys)} stands where {names(keys)} stood"
    if stand.is_split:
        said = f"{short(whole, keys)} is now {names(keys)}"
    text = f"{said}, by shape and name: {cause.text}"
    return replace(cause, text=text, of=(whole,) if stand.is_split else keys)
