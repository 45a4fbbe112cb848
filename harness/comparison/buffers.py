"""Non-persistent buffers: in no file, built by the model's code, and yet outputs depend on them.

In: both sides of a comparison, and the buffers that each has beside its state. Out: both sides with
the buffers among their tensors, where both know of them; else a note that they were not compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from harness.checkpoint.tensors import Checkpoint
from harness.comparison.comparison import Comparison
from harness.fingerprints.fingerprint import Fingerprint

_WHAT = "non-persistent buffer: in no file, built by the model's code"


class Sides(NamedTuple):
    """What is compared, and what is to be said of what is not."""

    expected: Fingerprint
    actual: Checkpoint
    notes: tuple[str, ...] = ()


def joined(expected: Fingerprint, buffers: Fingerprint | None, actual: Checkpoint) -> Sides:
    """Join the `buffers` that a golden holds to its weights, and a module's to its state."""
    if actual.buffers is None:
        return Sides(expected, actual)
    if buffers is None:
        if not actual.buffers:
            return Sides(expected, actual)
        count = len(actual.buffers)
        many = (
            f"{count:,} non-persistent buffers are" if count > 1 else "1 non-persistent buffer is"
        )
        note = f"{many} not compared: a golden of a file has none (record the module, or --load)"
        return Sides(expected, actual, (note,))
    return Sides(
        replace(expected, tensors={**expected.tensors, **buffers.tensors}),
        replace(actual, tensors={**actual.tensors, **actual.buffers}),
    )


def named(comparison: Comparison, buffers: Fingerprint | None, actual: Checkpoint) -> Comparison:
    """Say of each finding of a buffer that it is one."""
    keys = {*(() if buffers is None else buffers.tensors), *(actual.buffers or ())}
    findings = [
        replace(
            finding,
            expected=finding.expected and f"{finding.expected}, {_WHAT}",
            actual=finding.actual and f"{finding.actual}, {_WHAT}",
        )
        if finding.key in keys
        else finding
        for finding in comparison.findings
    ]
    return replace(comparison, findings=tuple(findings))
