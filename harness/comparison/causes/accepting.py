"""What a policy lets pass of what was explained."""

from __future__ import annotations

from dataclasses import replace

from harness.comparison.cause import ACCEPTABLE, Acceptable
from harness.comparison.comparison import Comparison
from harness.comparison.findings import FINDING_KINDS, Finding
from harness.comparison.policy import Policy

_CHANGED = ("damaged", "missing", "shape", "dtype", "different", "undecided", "close")


def accepted(comparison: Comparison) -> Comparison:
    """Make what the policy accepts findings of kind `accepted`; add what had to change and did not.

    `num_identical` counts no tensor that had to change.
    """
    policy = comparison.policy
    if not policy.accept and policy.cast is None and not policy.must_change:
        return comparison
    findings = [
        replace(finding, kind="accepted") if _passes(finding, policy) else finding
        for finding in comparison.findings
    ]
    changed = {f.key for f in comparison.findings if f.kind in _CHANGED}
    unchanged = [
        Finding(kind="unchanged", key=key, expected="a change", actual="the same bytes")
        for key in comparison.expected.tensors
        if key not in changed and policy.demands_change(key) and not policy.ignores(key)
    ]
    ordered = sorted([*findings, *unchanged], key=lambda f: FINDING_KINDS.index(f.kind))
    known = {finding.key for finding in comparison.findings}
    fewer = sum(1 for finding in unchanged if finding.key not in known)
    return replace(
        comparison, findings=tuple(ordered), num_identical=comparison.num_identical - fewer
    )


def _passes(finding: Finding, policy: Policy) -> bool:
    words = set(policy.accept)
    if finding.kind in ("different", "undecided") and policy.demands_change(finding.key):
        return True
    for cause in finding.causes:
        is_cast = policy.cast is not None and cause.dtype == policy.cast
        if cause.accept and set(cause.accept) <= words | ({"rounded"} if is_cast else set()):
            return True
    return False


def words_to_accept(comparison: Comparison) -> tuple[Acceptable, ...]:
    """The words that let pass what fails and has such a cause."""
    needed: set[Acceptable] = set()
    for finding in comparison.findings:
        if finding.fails or finding.kind == "undecided":
            needed |= set(next((c.accept for c in finding.causes if c.accept), ()))
    return tuple(word for word in ACCEPTABLE if word in needed)
