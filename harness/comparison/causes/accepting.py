"""What a policy lets pass of what was explained."""

from __future__ import annotations

from dataclasses import replace

from harness.comparison.causes.cause import ACCEPTABLE, Acceptable
from harness.comparison.comparison import Comparison
from harness.comparison.findings import FINDING_KINDS, Finding


def accepted(comparison: Comparison) -> Comparison:
    """Make findings whose cause the policy accepts findings of kind `accepted`, which pass."""
    words = frozenset(comparison.policy.accept)
    if not words:
        return comparison
    found = [
        replace(finding, kind="accepted") if _passes(finding, words) else finding
        for finding in comparison.findings
    ]
    ordered = sorted(found, key=lambda finding: FINDING_KINDS.index(finding.kind))
    return replace(comparison, findings=tuple(ordered))


def _passes(finding: Finding, words: frozenset[str]) -> bool:
    return any(cause.accept and words.issuperset(cause.accept) for cause in finding.causes)


def words_to_accept(comparison: Comparison) -> tuple[Acceptable, ...]:
    """The words that let all that fails pass; () where some of it has no such cause."""
    needed: set[Acceptable] = set()
    for finding in comparison.findings:
        if not finding.fails and finding.kind != "undecided":
            continue
        cause = next((cause for cause in finding.causes if cause.accept), None)
        if cause is None:
            return ()
        needed |= set(cause.accept)
    return tuple(word for word in ACCEPTABLE if word in needed)
