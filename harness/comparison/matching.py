"""Which of a golden's tensors is which of a checkpoint's: by key, by prefix, by equal weights.

In: the expected and the actual `Fingerprint`, and a `Policy`. Out: a frozen `Matching`. Refused
(UsageError): options of the policy that fit no tensor, or make one key of two.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import takewhile
from typing import NamedTuple

from harness.comparison.mapping import makes_any, names_any
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
    named = {policy.renamed(key): tensor for key, tensor in expected.tensors.items()}
    kept = {k: t for k, t in named.items() if not policy.ignores(t.key) and not policy.ignores(k)}
    ignored = named.keys() - kept
    found = {k: t for k, t in theirs.items() if not policy.ignores(k) and k not in ignored}
    if ignored and not kept and not found:
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
    renamed = [
        Pair(missing.pop(a), unexpected.pop(b)) for a, b in _find_renamed(missing, unexpected)
    ]
    return Matching(
        pairs=tuple(pairs),
        prefix=prefix,
        renamed=tuple(renamed),
        missing=tuple(missing.values()),
        unexpected=tuple(unexpected.values()),
        tied=tuple(tied),
        num_ignored=len(ignored | (theirs.keys() - found.keys())),
    )


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
    targets = Counter(policy.renamed(key) for key in keys)
    for key, count in targets.items():
        if count > 1:
            raise UsageError(
                f"--map: {count} keys of {expected.name} would become {key}",
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
        candidates = list(dict.fromkeys(prefix for key in keys for prefix in _prefixes(key)))
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
        votes.update(("", prefix) for prefix in _prefixes(key) if key[len(prefix) :] in missing)
    for key in missing:
        votes.update((prefix, "") for prefix in _prefixes(key) if key[len(prefix) :] in unexpected)
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


def _prefixes(key: str) -> Iterator[str]:
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

    First those of the same numbers: the scales of all layers may be equal.
    """
    found: dict[str, str] = {}
    for numbers in (_NUMBER.findall, lambda _: None):
        taken = set(found.values())
        alike: dict[tuple[bytes, str, str], list[str]] = defaultdict(list)
        for key, tensor in unexpected.items():
            if tensor.digest is not None and key not in taken:
                alike[tensor.digest, str(numbers(key)), _own_name(tensor)].append(key)
        for key, tensor in missing.items():
            candidates = alike.get((tensor.digest or b"", str(numbers(key)), _own_name(tensor)))
            if candidates and key not in found:
                first = candidates[:_MAX_ALIKE]
                found[key] = max(first, key=lambda other: _likeness(key, other))
                candidates.remove(found[key])
    return [(key, found[key]) for key in missing if key in found]


def _own_name(tensor: TensorFingerprint) -> str:
    """What a value must be called to be the same: many are 0, or True."""
    return tensor.key.rpartition(".")[2] if tensor.dtype.is_value else ""


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
