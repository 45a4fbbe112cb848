"""Which of a golden's tensors is which of a checkpoint's: by key, by prefix, by equal weights.

In: the expected and the actual `Fingerprint`, and a `Policy`. Out: a frozen `Matching`. Refused
(UsageError): options of the policy that fit no tensor, or make one key of two.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import takewhile
from typing import NamedTuple

from harness.comparison.mapping import changed_prefix, makes_any, names_any
from harness.comparison.policy import Policy, PolicyOfStages, fits
from harness.errors import UsageError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint

# Inserted into keys by torch.compile, data parallelism and activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_NUMBER = re.compile(r"\d+")
# Of very many equal tensors, some are looked at for the most alike name.
_MAX_COMPARED = 500  # keys with what may be a typo
# Characters of a prefix that may have changed: each dot in them is tried.
_MAX_PREFIX = 200
_MAX_ALIKE = 16


class Pair(NamedTuple):
    """Two tensors that stand for each other."""

    expected: TensorFingerprint
    actual: TensorFingerprint


@dataclass(frozen=True, kw_only=True)
class PrefixChange:
    """The keys of `count` tensors have another prefix: `key` is the one that came, or went."""

    key: str
    expected: str
    actual: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Who stands for whom.

    `pairs` are to be compared, also those under another `prefix`; `renamed` have equal weights
    under another key; `tied` are left out by one side since they are another key's tensor, which it
    names; `num_ignored` tensors are left out by the policy.
    """

    pairs: tuple[Pair, ...]
    prefix: PrefixChange | None
    renamed: tuple[Pair, ...]
    missing: tuple[TensorFingerprint, ...]
    unexpected: tuple[TensorFingerprint, ...]
    tied: tuple[tuple[str, str], ...] = ()
    num_ignored: int

    @property
    def expected(self) -> Iterator[TensorFingerprint]:
        """The golden's tensors but the ignored ones."""
        yield from (pair.expected for pair in (*self.pairs, *self.renamed))
        yield from self.missing

    @property
    def no_common_key(self) -> bool:
        """Whether both sides have tensors, and none of a common key for each other.

        A few of equal values may be counters that every model has.
        """
        few = len(self.renamed) < min(len(self.missing), len(self.unexpected))
        return few and not self.pairs


def match(expected: Fingerprint, actual: Fingerprint, policy: Policy) -> Matching:
    """Find the counterpart of every tensor; in the golden's order."""
    _check_globs(policy, expected, actual)
    theirs = _stripped(policy, expected, actual)
    _check_map(policy, expected, theirs)
    named = new_names(policy, expected.tensors)
    stays = [
        (key, name)
        for key, name in named.items()
        if not is_ignored(policy, key, name, expected.tensors, theirs)
    ]
    # What is under the name of another one, which it makes room for, is in no file.
    kept = {name: expected.tensors[key] for key, name in stays if name is not None}
    gone = {key: expected.tensors[key] for key, name in stays if name is None}
    taken = {*named.values()} - kept.keys()
    found = {
        k: t for k, t in theirs.items() if k in kept or (k not in taken and not policy.ignores(k))
    }
    num_ignored = len(named) - len(stays) + len(theirs.keys() - found.keys() - taken)
    if num_ignored and not stays and not found:
        raise UsageError(
            f"--ignore {' --ignore '.join(policy.ignore)}: ignores every key of {expected.name}",
            hint="ignore fewer keys: a comparison of nothing always passes",
        )

    pairs = [Pair(tensor, found[key]) for key, tensor in kept.items() if key in found]
    missing = {key: tensor for key, tensor in kept.items() if key not in found}
    unexpected = {key: tensor for key, tensor in found.items() if key not in kept}
    tied = [
        *_pop_tied(missing, expected, [pair.expected for pair in pairs], unless=actual),
        *_pop_tied(unexpected, actual, [pair.actual for pair in pairs], unless=expected),
    ]
    prefixed, prefix = _find_prefix(missing, unexpected)
    pairs += [Pair(missing.pop(a), unexpected.pop(b)) for a, b in prefixed]
    alone = {tensor.key: tensor for tensor in missing.values()} | gone
    renamed = [Pair(alone.pop(a), unexpected.pop(b)) for a, b in _find_renamed(alone, unexpected)]
    return Matching(
        pairs=tuple(pairs),
        prefix=prefix,
        renamed=tuple(renamed),
        missing=tuple(tensor for key, tensor in expected.tensors.items() if key in alone),
        unexpected=tuple(unexpected.values()),
        tied=tuple(tied),
        num_ignored=num_ignored,
    )


def new_names(policy: Policy, keys: Iterable[str]) -> dict[str, str | None]:
    """The name that each of a golden's keys has now; None where another one is mapped to its own.

    So the first of several layers is gone where the second is mapped to its number.
    """
    found = {key: policy.new_name(key) for key in keys}
    taken = {*found.values()}
    return {key: name if name is not None or key in taken else key for key, name in found.items()}


def is_ignored(
    policy: Policy, key: str, name: str | None, ours: Container[str], theirs: Container[str]
) -> bool:
    """Whether a policy leaves out what has one `key` in the golden and a new `name` now.

    A glob may be of either, but for names that are of two things, as of layers that are shifted:
    then it must be of both.
    """
    for glob in policy.ignore:
        is_old, is_new = (n is not None and fits(glob, [n]) for n in (key, name))
        if (is_old and (is_new or name is None or key not in theirs)) or (
            is_new and name not in ours
        ):
            return True
    return False


def _pop_tied(
    alone: dict[str, TensorFingerprint],
    side: Fingerprint,
    paired: Iterable[TensorFingerprint],
    *,
    unless: Fingerprint,
) -> Iterator[tuple[str, str]]:
    """Take out what is another name of a tensor that both have, where a format keeps but one."""
    if unless.keeps_aliases or not side.keeps_aliases:
        return
    first = {tensor.alias_of or tensor.key: tensor.key for tensor in paired}
    for key, tensor in list(alone.items()):
        other = first.get(tensor.alias_of or tensor.key)
        if other is not None:
            del alone[key]
            yield tensor.key, other


def check_used(stages: PolicyOfStages, expected: Fingerprint, actual: Fingerprint) -> None:
    """Raise UsageError for what of a policy no stage made use of; the sides are one stage's."""
    unused = stages.unused
    if unused.parts:
        try:
            match(expected, actual, unused)
        except UsageError as error:
            raise UsageError(f"{error}, at no stage", hint=error.hint) from error
        raise UsageError(f"{unused.parts[0]}: applies to no stage", hint="leave it out")


def _check_globs(policy: Policy, expected: Fingerprint, actual: Fingerprint) -> None:
    """An option that fits nothing is a typo, and would silently weaken or do nothing."""
    keys = list(expected.tensors)
    both = [*keys, *actual.tensors]
    options = [("--ignore", glob, both) for glob in policy.ignore]
    options += [("--tolerance", glob, keys) for glob, _, _ in policy.tolerances]
    options += [("--must-change", glob, keys) for glob in policy.must_change]
    for option, glob, candidates in options:
        if not fits(glob, candidates):
            escaped = glob.replace("[", "[[]")
            if fits(f"*{glob}*", candidates):
                hint = f"a glob matches whole keys: use '*{glob}*'"
            elif fits(escaped, candidates):
                hint = f"[…] in a glob matches one of the characters inside: use '{escaped}'"
            else:
                hint = _most_alike(glob, candidates)
            raise UsageError(f"{option} {glob}: matches no key of {expected.name}", hint=hint)


def _check_map(
    policy: Policy, expected: Fingerprint, theirs: Mapping[str, TensorFingerprint]
) -> None:
    keys = list(expected.tensors)
    check_mapped(policy, keys, expected.name)
    for old, new in policy.key_map:
        if not makes_any((old, new), theirs):
            raise UsageError(
                f"--map {old}={new}: the checkpoint has no key {new}",
                hint=_most_alike(new, list(theirs)),
            )
    used = {policy.map_of(key) for key in keys}
    for old, new in policy.key_map:
        if (old, new) not in used:
            raise UsageError(
                f"--map {old}={new}: no effect: an earlier map renames all keys that it matches",
                hint="put it first, or leave it out: the first map that matches a key counts",
            )
    sources: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        sources[policy.renamed(key)].append(key)
    for key, some in sources.items():
        # What has a number that another one gets is gone: see `new_names`.
        is_shifted = len(some) == 2 and key in some and len({*map(skeleton, some)}) == 1
        if len(some) > 1 and not is_shifted:
            raise UsageError(
                f"--map: {len(some)} keys of {expected.name} would become {key}",
                hint="give the map of each key, in place of that of a prefix",
            )


def check_mapped(policy: Policy, keys: Sequence[str], name: str) -> None:
    """Raise UsageError for a map of what a golden, called `name`, does not hold."""
    for old, new in policy.key_map:
        if not names_any(old, keys):
            raise UsageError(
                f"--map {old}={new}: {name} has no key {old}",
                hint=f"prefixes end in a dot: --map {old}.={new.removesuffix('.')}."
                if names_any(f"{old}.", keys)
                else _most_alike(old, keys),
            )


def _stripped(
    policy: Policy, expected: Fingerprint, actual: Fingerprint
) -> dict[str, TensorFingerprint]:
    prefix = policy.strip_prefix
    if not prefix:
        return dict(actual.tensors)
    having = [key for key in actual.tensors if key.startswith(prefix)]
    if not having:
        raise UsageError(
            f"--strip-prefix {prefix}: no key of {actual.name} starts with it",
            hint=f"keys of {expected.name} do: --map {prefix}="
            if any(key.startswith(prefix) for key in expected.tensors)
            else f"its first key is {next(iter(actual.tensors), 'none')}",
        )
    if all(key[len(prefix) :].startswith(".") for key in having):
        raise UsageError(
            f"--strip-prefix {prefix}: leaves keys that begin with a dot",
            hint=f"take the dot, too: --strip-prefix {prefix}.",
        )
    stripped: dict[str, TensorFingerprint] = {}
    for key, tensor in actual.tensors.items():
        short = key.removeprefix(prefix)
        if short in stripped:
            raise UsageError(
                f"--strip-prefix {prefix}: two keys of {actual.name} become {short}",
                hint="leave it out: the checkpoint has keys with this prefix and without it",
            )
        stripped[short] = tensor
    return stripped


def _most_alike(name: str, keys: Sequence[str]) -> str:
    """What a key, a prefix or a glob may have been meant to be."""
    from difflib import get_close_matches

    plain = name.rstrip("*")
    candidates = list(keys)
    if plain.endswith("."):
        candidates = list(dict.fromkeys(prefix for key in keys for prefix in prefixes_of(key)))
    if len(candidates) > _MAX_COMPARED:  # each takes a tenth of a millisecond
        candidates = nlargest(_MAX_COMPARED, candidates, key=lambda one: _num_alike(plain, one))
    close = get_close_matches(plain, candidates, 1)
    if close:
        return f"did you mean {close[0]}{name[len(plain) :]}?"
    first = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    return f"the keys begin with {', '.join(first[:6])}{', …' if len(first) > 6 else ''}"


def _num_alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def _find_prefix(
    missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, TensorFingerprint]
) -> tuple[list[tuple[str, str]], PrefixChange | None]:
    """Find one change of prefix that explains most of the missing and unexpected keys."""
    votes: Counter[tuple[str, str]] = Counter()  # (expected prefix, actual prefix)
    for key in unexpected:
        votes.update(("", start) for start in prefixes_of(key) if key[len(start) :] in missing)
    for key in missing:
        votes.update(
            (prefix, "") for prefix in prefixes_of(key) if key[len(prefix) :] in unexpected
        )
    plain = {_unwrapped(key): key for key in missing}
    wrapped = {plain.get(_unwrapped(key), ""): key for key in unexpected}
    wrapped.pop("", None)
    if votes:
        (ours, theirs), count = votes.most_common(1)[0]
        if count >= max(2, len(wrapped)):
            pairs = [
                (key, theirs + key[len(ours) :])
                for key in missing
                if key.startswith(ours) and theirs + key[len(ours) :] in unexpected
            ]
            return pairs, PrefixChange(
                key=ours or theirs,
                expected=f"prefix {ours!r}" if ours else "no prefix",
                actual=f"prefix {theirs!r}" if theirs else "no prefix",
                count=len(pairs),
            )
    if len(wrapped) >= 2:
        ours, theirs = _wrappers(wrapped.keys()), _wrappers(wrapped.values())
        return [*wrapped.items()], PrefixChange(
            key=theirs or ours,
            expected=f"wrapped as {ours!r}" if ours else "no wrapper",
            actual=f"wrapped as {theirs!r}" if theirs else "no wrapper",
            count=len(wrapped),
        )
    return [], None


def prefixes_of(key: str) -> Iterator[str]:
    """The starts of a key, up to each of its dots."""
    position = key.find(".", 0, _MAX_PREFIX)
    while 0 <= position < len(key) - 1:
        yield key[: position + 1]
        position = key.find(".", position + 1, _MAX_PREFIX)


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _wrappers(keys: Iterable[str]) -> str:
    parts = {part for key in keys for part in key.split(".")}
    return " ".join(f"{name}." for name in _WRAPPERS if name in parts)


def _find_renamed(
    missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, TensorFingerprint]
) -> list[tuple[str, str]]:
    """Pair missing and unexpected keys of equal digest; among equals, the most alike names.

    The scales of all layers may be equal: what only one key can be comes first, and those that
    changed as these did are next. Then come those of the same numbers.
    """
    groups: dict[tuple[bytes, str], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for place, side in enumerate((missing, unexpected)):
        for key, tensor in side.items():
            if tensor.digest is not None:
                groups[tensor.digest, _own_name(tensor)][place].append(key)
    both = [sides for sides in groups.values() if all(sides)]
    found = {ours[0]: theirs[0] for ours, theirs in both if len(ours) == len(theirs) == 1}
    prefixes = dict(changed_prefix(*pair) for pair in found.items())
    for ours, theirs in both:
        _pair_alike(ours, theirs, prefixes, found)
    return [(key, found[key]) for key in missing if key in found]


def _pair_alike(
    ours: Sequence[str], theirs: Sequence[str], prefixes: Mapping[str, str], found: dict[str, str]
) -> None:
    """Pair keys of one digest: by what became of the prefixes beside them, then by numbers."""
    free = dict.fromkeys(theirs)
    for key in ours:
        starts = reversed([key, *prefixes_of(key)]) if len(ours) > 1 else ()
        new = next((prefixes[s] + key[len(s) :] for s in starts if s in prefixes), None)
        if new in free:
            found[key] = new
            del free[new]
    for numbers in (_NUMBER.findall, lambda _: None):
        by_numbers: dict[str, list[str]] = defaultdict(list)
        for key in free:
            by_numbers[str(numbers(key))].append(key)
        for key in ours:
            candidates = by_numbers[str(numbers(key))][:_MAX_ALIKE]
            if candidates and key not in found:
                found[key] = max(candidates, key=lambda other: _likeness(key, other))
                by_numbers[str(numbers(key))].remove(found[key])
                del free[found[key]]


def _own_name(tensor: TensorFingerprint) -> str:
    """What a value must be called to be the same: many are 0, or True."""
    return tensor.key.rpartition(".")[2] if tensor.dtype.is_value else ""


def skeleton(key: str) -> str:
    """A key without its numbers."""
    return _NUMBER.sub("#", key)


def _likeness(one: str, other: str) -> int:
    """How many parts of two keys agree, from the front and from the back."""
    a, b = one.split("."), other.split(".")
    front = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return front + next(
        (i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y),
        min(len(a), len(b)),
    )
