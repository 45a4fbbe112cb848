"""The maps under which old keys have their new names: what a report prints to be pasted.

In: a `Comparison`. Out: fields of a `Policy`, of as few maps as say it: globs, numbers in braces,
prefixes, keys. They are found by equal weights, also where layers got other numbers and the old
ones are in use: `blocks.{1..3}.=blocks.{0..2}.`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.comparison.comparison import Comparison
from harness.comparison.mapping import Pair, changed_prefix, in_braces
from harness.comparison.matching import Matching, match, new_names, prefixes_of, skeleton
from harness.comparison.policy import Policy
from harness.errors import UsageError
from harness.fingerprints.fingerprint import TensorFingerprint

_MAX_MAPPED = 12  # more make a command that nobody pastes
# A part of a key that is a number, in front of another part.
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")
_Tensors = Mapping[str, TensorFingerprint]


def renaming(comparison: Comparison) -> tuple[str, Mapping[str, Any]] | None:
    """What is accepted, and the fields of a policy that do: maps, a prefix, layers that are gone.

    None where nothing is renamed, or no few maps say it.
    """
    policy, failing = comparison.policy, [f for f in comparison.findings if f.fails]
    renamed = [
        finding
        for finding in failing
        if finding.kind == "renamed"
        and finding.actual in (None, finding.actual_key)
        and all(cause.accept in (("renamed",), ()) for cause in finding.causes[:1])
    ]
    prefix = next((f.key for f in failing if f.kind == "prefix" and f.expected == "no prefix"), "")
    strip = policy.strip_prefix + prefix
    theirs = {key.removeprefix(strip): t for key, t in comparison.actual.tensors.items()}
    pairs = {f.key: (f.actual_key or "").removeprefix(strip) for f in renamed}
    if any(old == new or set("=*") & {*old, *new} for old, new in pairs.items()):
        return None  # no map can say it, or one did not fit
    alone = {} if comparison.is_unloaded else _alone(comparison, theirs)
    shifted = {
        key: there
        for key, there in alone.items()
        if there not in (key, policy.renamed(key)) and skeleton(key) == skeleton(there)
    }
    # Equal scales may be those of any layer: weights that only one tensor has come first.
    sure = {key: there for key, there in pairs.items() if alone.get(key) == there} | shifted
    places = {skeleton(old) for old, _ in map(changed_prefix, sure, sure.values())}
    pairs = {
        key: there
        for key, there in pairs.items()
        if key in sure or skeleton(changed_prefix(key, there)[0]) not in places
    }
    key_map = _key_map(policy, comparison.expected.tensors, theirs, pairs, shifted)
    if not key_map:
        return None
    fields: dict[str, Any] = {"key_map": (*policy.key_map, *key_map)}
    if prefix:
        fields["strip_prefix"] = strip
    names = "names" if len(pairs) + len(shifted) > 1 else "name"
    is_equal = all(cause.accept for finding in renamed for cause in finding.causes[:1])
    what = f"accept the new {names}" if is_equal else f"compare the values under the new {names}"
    left = _left_out(comparison, replace(policy, **fields), {**shifted, **pairs})
    if left:
        fields["ignore"] = (*policy.ignore, *left)
        what += f", and leave out {', '.join(left)}"
    return what, fields


def _alone(comparison: Comparison, actual: _Tensors) -> dict[str, str]:
    """The keys of weights that are one tensor's alone, on either side."""

    def alone(tensors: _Tensors) -> dict[bytes | None, str]:
        count = Counter(t.digest for t in tensors.values() if not t.dtype.is_value)
        return {t.digest: key for key, t in tensors.items() if count[t.digest] == 1}

    ours, theirs = alone(comparison.expected.tensors), alone(actual)
    return {key: theirs[digest] for digest, key in ours.items() if digest in theirs}


def _key_map(
    policy: Policy,
    expected: _Tensors,
    actual: _Tensors,
    renamed: Mapping[str, str],
    shifted: Mapping[str, str],
) -> tuple[Pair, ...]:
    """What makes old keys the new ones, and the most of them; () where nothing makes them all."""

    def kept(maps: Sequence[Pair]) -> set[str]:
        named = new_names(replace(policy, key_map=(*policy.key_map, *maps)), expected)
        names = [name for name in named.values() if name is not None]
        if len({*names}) < len(names):
            return set()  # of two keys it makes one
        there = {
            k: actual[name] for k, name in named.items() if name is not None and name in actual
        }
        equal = {key for key, tensor in there.items() if expected[key].digest == tensor.digest}
        return equal | {key for key, name in renamed.items() if named[key] == name}

    best: tuple[Pair, ...] = ()
    before = held = kept(())
    few = [m for m in _candidates({**shifted, **renamed}, renamed) if len(m) <= _MAX_MAPPED]
    for maps in sorted(few, key=len):
        found = kept(maps)
        # What is equal under an old number may be another layer's.
        if len(found) > len(held) and found.issuperset(renamed if shifted else {*before, *renamed}):
            best, held = maps, found
            if held.issuperset(shifted):
                break
    return best


def _candidates(pairs: Mapping[str, str], renamed: Mapping[str, str]) -> Iterator[tuple[Pair, ...]]:
    """Maps of prefixes, in some forms, and of keys."""
    prefixes = Counter(changed_prefix(*pair) for pair in pairs.items())
    # What is true of most: a tensor that was exchanged beside is not the new name of a layer.
    most = {old: new for (old, new), _ in reversed(prefixes.most_common())}
    forms = [map(_as_glob, most.items()), most.items()]
    forms += [_braced(most, *places) for places in ((-1, -1), (0, 0), (0, -1), (-1, 0))]
    forms += [map(_as_glob, _braced(most, place, place)) for place in (-1, 0)]
    if len(pairs) == len(renamed):
        yield tuple(pairs.items())
    for maps in map(_ordered, forms):
        if len(maps) < len(pairs) or len(pairs) > len(renamed):
            yield maps


def _ordered(maps: Iterable[Pair]) -> tuple[Pair, ...]:
    """Keys first, then the longest prefix: the first that fits counts."""
    return tuple(
        sorted(dict.fromkeys(maps), key=lambda m: (m[0].endswith("."), -m[0].count("."), m[0]))
    )


def _as_glob(pair: Pair) -> Pair:
    """A pair of prefixes with a `*` for each of its numbers, where both have the same ones."""
    old, new = pair
    if _NUMBER.findall(old) != _NUMBER.findall(new):
        return pair
    return _NUMBER.sub("*", old), _NUMBER.sub("*", new)


def _braced(prefixes: Mapping[str, str], place: int, other: int) -> Iterator[Pair]:
    """Prefixes that are alike but for one number, in this place, with all of it in braces."""
    groups: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for old, new in prefixes.items():
        ours, theirs = (list(_NUMBER.finditer(side)) for side in (old, new))
        if not ours or not theirs:
            yield old, new
            continue
        a, b = ours[place], theirs[other]
        around = old[: a.start()], old[a.end() :], new[: b.start()], new[b.end() :]
        groups.setdefault(around, []).append((int(a[0]), int(b[0])))
    for (start, end, start_now, end_now), numbers in groups.items():
        was, now = map(in_braces, zip(*sorted(numbers), strict=True))
        yield f"{start}{was}{end}", f"{start_now}{now}{end_now}"


def _left_out(comparison: Comparison, policy: Policy, pairs: Mapping[str, str]) -> tuple[str, ...]:
    """Globs of the layers that one side alone has, where the others got new names."""
    layers = {skeleton(old) for old, _ in map(changed_prefix, pairs, pairs.values())}
    kinds = {finding.kind for finding in comparison.findings if finding.fails}

    def matched(ignore: Sequence[str]) -> Matching:
        both = comparison.expected, comparison.actual
        return match(*both, replace(policy, ignore=(*policy.ignore, *ignore)))

    try:
        before = matched(())
    except UsageError:  # without its prefix a key may be another one
        return ()
    alone = [tensor.key for tensor in before.missing]
    if comparison.stage == "file" or "unexpected" in kinds:  # else the module puts it there
        alone += [tensor.key.removeprefix(policy.strip_prefix) for tensor in before.unexpected]
    for deeper in (0, 1):  # what is below may be told from what is now beside it
        found: dict[str, None] = {}
        for key in alone:
            starts = list(prefixes_of(key))
            first = (n for n, start in enumerate(starts) if skeleton(start) in layers - {start})
            found |= {starts[min(n + deeper, len(starts) - 1)]: None for n in [*first][:1]}
        globs = [f"{start.replace('[', '[[]')}*" for start in found]
        if 0 < len(globs) <= _MAX_MAPPED and len(matched(globs).pairs) == len(before.pairs):
            return tuple(globs)
    return ()
