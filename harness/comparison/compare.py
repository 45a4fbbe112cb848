"""Compare two fingerprints under a policy: every finding, and one verdict.

In: the expected and the actual `Fingerprint`, a `Policy`, and a function that measures pairs of
tensors whose digests differ. Out: a frozen `Comparison`. No I/O: what must be read to measure is
behind that function. Refused: options of the policy that fit no tensor (UsageError), and a side
that changed while it was read (CheckpointError).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import nsmallest
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from harness.comparison.comparison import Comparison
from harness.comparison.configs import config_findings
from harness.comparison.findings import FINDING_KINDS, Finding, describe
from harness.comparison.matching import Matching, Pair, match
from harness.comparison.policy import Policy
from harness.errors import CheckpointError
from harness.fingerprints.fingerprint import Fingerprint

if TYPE_CHECKING:
    from harness.comparison.difference import Measure
    from harness.fingerprints.integrity import Damage


_PART = re.compile(r"\[(shard|summand) \d+ of \d+ of \[")  # of a DTensor
_MAX_NAMED = 6
_MAX_TIED = 4  # keys that are named of a tied group
_MAX_TO_CHECK = 20  # for damage
_STRANGERS = "no key in common: is it a checkpoint of another model?"


def compare(
    expected: Fingerprint,
    actual: Fingerprint,
    policy: Policy,
    measure: Measure,
    *,
    stage: str = "file",
) -> Comparison:
    """Compare `actual` with `expected` (a golden, as a rule); all findings are collected."""
    policy = policy.with_recorded(expected.tolerance)
    matching = match(expected, actual, policy)
    findings = list(_of_keys(matching))
    aliases = _alias_changes(expected, actual, matching.pairs)
    to_measure: list[Pair] = []
    num_identical = 0
    for pair in matching.pairs:
        structural = _structure(pair, policy)
        if structural is not None:
            findings.append(structural)
            continue
        if pair.expected.key in aliases:
            findings.append(aliases[pair.expected.key])
        if pair.expected.digest is not None and pair.expected.digest == pair.actual.digest:
            num_identical += pair.expected.key not in aliases
        else:
            to_measure.append(pair)
    settings, elsewhere = config_findings(expected, actual, is_note=not policy.check_config)
    triples = [(p.expected, p.actual, policy.tolerance(p.expected.key)) for p in to_measure]
    differences = measure(triples) if triples else []
    for pair, difference in zip(to_measure, differences, strict=True):
        if difference.verdict == "identical":
            _refuse_contradiction(pair, actual)
            num_identical += pair.expected.key not in aliases
        elif difference.verdict == "different" or pair.expected.key not in aliases:
            findings.append(
                Finding(
                    kind=difference.verdict,
                    key=pair.expected.key,
                    actual_key=_other_key(pair),
                    expected=describe(pair.expected),
                    actual=describe(pair.actual),
                    difference=difference,
                )
            )
    findings += settings
    return Comparison(
        expected=expected,
        actual=actual,
        policy=policy,
        findings=tuple(sorted(findings, key=_severity)),
        num_identical=num_identical,
        num_ignored=matching.num_ignored,
        num_nan=sum(1 for t in matching.expected if t.stats is not None and t.stats.num_nan),
        stage=stage,
        notes=tuple(
            filter(
                None, (*_notes(expected, actual, matching), *_ties(matching, findings), elsewhere)
            )
        ),
        no_common_key=matching.no_common_key,
    )


def _of_keys(matching: Matching) -> Iterator[Finding]:
    """What the keys alone tell."""
    prefix = matching.prefix
    if prefix is not None:
        yield Finding(
            kind="prefix",
            key=prefix.key,
            expected=prefix.expected,
            actual=prefix.actual,
            count=prefix.count,
        )
    for ours, theirs in matching.renamed:
        yield Finding(
            kind="renamed",
            key=ours.key,
            actual_key=theirs.key,
            expected=ours.key,
            actual=theirs.key,
        )
    for tensor in matching.missing:
        yield Finding(kind="missing", key=tensor.key, expected=describe(tensor))
    for tensor in matching.unexpected:
        yield Finding(kind="unexpected", key=tensor.key, actual=describe(tensor))


def _notes(expected: Fingerprint, actual: Fingerprint, matching: Matching) -> Iterator[str]:
    if matching.no_common_key:
        yield _STRANGERS
    parts = [t for t in (*matching.missing, *matching.unexpected) if _PART.search(t.key)]
    if parts:
        which = (
            "1 entry is one rank's part" if len(parts) == 1 else f"{len(parts):,} entries are parts"
        )
        yield f"{which} of a tensor: give the files of all ranks, as a folder or a quoted glob"
    for entries in dict.fromkeys((expected.unread, actual.unread)):
        if entries:
            more = f", and {len(entries) - _MAX_NAMED:,} more" if len(entries) > _MAX_NAMED else ""
            count = "1 entry" if len(entries) == 1 else f"{len(entries):,} entries"
            yield f"{count} not compared: {', '.join(entries[:_MAX_NAMED])}{more}"


def _ties(matching: Matching, findings: Sequence[Finding]) -> Iterator[str]:
    """What one side has left out, since it is tied to what is there."""
    found = {finding.actual_key or finding.key for finding in findings} | {f.key for f in findings}
    groups: dict[str, list[str]] = defaultdict(list)
    for key, other in matching.tied:
        groups[other].append(key)
    for other, keys in list(groups.items())[:_MAX_NAMED]:
        agree = "differ" if other in found else "agree"
        named = ", ".join(keys[:_MAX_NAMED])
        if len(keys) > _MAX_NAMED:
            named += f" and {len(keys) - _MAX_NAMED:,} more"
        are = "is" if len(keys) == 1 else "are"
        yield f"{named} {are} tied to {other}, whose values {agree}"
    if len(groups) > _MAX_NAMED:
        yield f"more are tied to {len(groups) - _MAX_NAMED:,} other keys"


def with_damages(
    comparison: Comparison,
    find: Callable[[list[str]], Mapping[str, Damage]],
    side: Literal["expected", "actual"] = "actual",
) -> Comparison:
    """Add a finding for each tensor, of the worst that differ in value, whose bytes are damaged.

    `find` tells which of one side's keys are. Of very many, some tell as much as all.
    """
    differing = [f for f in comparison.findings if f.difference is not None]
    keys = {f.key: f.key if side == "expected" else f.actual_key or f.key for f in differing}
    checked = differing[:_MAX_TO_CHECK]
    damaged = find([keys[finding.key] for finding in checked]) if checked else {}
    found = [
        Finding(
            kind="damaged",
            key=finding.key,
            actual_key=finding.actual_key,
            expected=f"CRC-32 {damage.expected:08x}, says {damage.where}",
            actual=f"CRC-32 {damage.actual:08x}",
        )
        for finding in checked
        if (damage := damaged.get(keys[finding.key])) is not None
    ]
    notes = comparison.notes
    if found and len(differing) > len(checked):
        more = f"{len(differing) - len(checked):,} more that differ were not looked at for damage"
        notes = (*notes, more)
    return replace(comparison, findings=(*found, *comparison.findings), notes=notes)


def _refuse_contradiction(pair: Pair, actual: Fingerprint) -> None:
    """Equal bytes have equal digests, unless they were read at two times."""
    ours, theirs = pair.expected, pair.actual
    if ours.dtype == theirs.dtype and None not in (ours.digest, theirs.digest):
        raise CheckpointError(
            f"{actual.name}: the values of {theirs.key!r} are as expected, but their digest is not",
            hint="something writes to it while it is read: try again when that is done",
        )


def _other_key(pair: Pair) -> str | None:
    return pair.actual.key if pair.actual.key != pair.expected.key else None


def _severity(finding: Finding) -> tuple[int, float]:
    """Worst kind first, within it the largest difference; ties keep the golden's order."""
    size = 0.0
    if finding.difference is not None:
        size = finding.difference.max_abs[0]
    return FINDING_KINDS.index(finding.kind), -size


def _structure(pair: Pair, policy: Policy) -> Finding | None:
    """The most structural thing in which two tensors of one key differ, if any."""
    ours, theirs = pair.expected, pair.actual
    if ours.dtype.is_value or theirs.dtype.is_value:
        if ours.dtype == theirs.dtype and ours.digest == theirs.digest:
            return None
        return Finding(
            kind="value",
            key=ours.key,
            actual_key=_other_key(pair),
            expected=describe(ours),
            actual=describe(theirs),
        )
    if ours.shape != theirs.shape:
        return Finding(
            kind="shape",
            key=ours.key,
            actual_key=_other_key(pair),
            expected=str(list(ours.shape)),
            actual=str(list(theirs.shape)),
        )
    if ours.dtype != theirs.dtype and policy.check_dtype:
        return Finding(
            kind="dtype",
            key=ours.key,
            actual_key=_other_key(pair),
            expected=str(ours.dtype),
            actual=str(theirs.dtype),
        )
    return None


def _alias_changes(
    expected: Fingerprint, actual: Fingerprint, pairs: Sequence[Pair]
) -> dict[str, Finding]:
    """Tied tensors that came apart, and separate ones that were tied.

    Only between containers that can say so: safetensors cannot.
    """
    if not (expected.keeps_aliases and actual.keeps_aliases):
        return {}
    # Which of a tied group comes first depends on the order of the file: compare the groups.
    theirs: dict[str, set[str]] = defaultdict(set)
    ours: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        key = pair.expected.key
        ours[pair.expected.alias_of or key].add(key)
        theirs[pair.actual.alias_of or pair.actual.key].add(key)
    before = _groups(map(frozenset, ours.values()))
    known = {group.keys: group for group in before.values()}
    after = _groups(map(frozenset, theirs.values()), known)
    findings = {}
    for pair in pairs:
        key = pair.expected.key
        one, other = before[key], after[key]
        # One finding a group: the first key speaks for a tie that stays whole otherwise.
        if one is not other and key != min(one.some[0], other.some[0]):
            findings[key] = Finding(
                kind="alias", key=key, expected=one.without(key), actual=other.without(key)
            )
    return findings


class _Tied(NamedTuple):
    """Keys that are tied, and the least of them, in order."""

    keys: frozenset[str]
    some: tuple[str, ...]

    def without(self, key: str) -> str:
        """What a key is tied to, in words."""
        others = [other for other in self.some if other != key][:_MAX_TIED]
        more = len(self.keys) - 1 - len(others)
        rest = f" and {more:,} more" if more else ""
        return f"tied to {', '.join(others)}{rest}" if others else "separate"


def _groups(
    groups: Iterable[frozenset[str]], known: Mapping[frozenset[str], _Tied] = MappingProxyType({})
) -> dict[str, _Tied]:
    """The group of each key; of two that are equal, the known one."""
    found = {}
    for keys in groups:
        group = known.get(keys) or _Tied(keys, tuple(nsmallest(_MAX_TIED + 1, keys)))
        found.update(dict.fromkeys(keys, group))
    return found
