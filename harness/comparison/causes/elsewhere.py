"""Hypotheses about one tensor that need no search: its bytes are elsewhere, or it counts.

In: what is known of both sides, and a finding. Out: a `Cause`, or None.
"""

from __future__ import annotations

from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, is_constant
from harness.comparison.findings import Finding
from harness.fingerprints.fingerprint import TensorFingerprint


def moved_from(key: str) -> Cause:
    return Cause(
        kind="moved",
        text=f"holds what {key} holds in the golden",
        proof="digest",
        accept=("renamed",),
        of=(key,),
    )


def copied(evidence: Evidence, finding: Finding, actual: TensorFingerprint) -> Cause | None:
    """Another tensor of the golden has these bytes."""
    if actual.numel < 2 or is_constant(actual.stats) or actual.digest is None:
        return None
    keys = [key for key in evidence.by_digest.get(actual.digest, ()) if key != finding.key]
    tensor = evidence.tensors.get(actual.key)
    if not keys and tensor is not None:
        keys = evidence.same_in(evidence.references, tensor, actual)
    if not keys:
        return None
    other, ours = evidence.actual.get(keys[0]), evidence.expected.get(finding.key)
    named = " and ".join(keys[:3])
    if finding.kind == "unexpected":
        return Cause(kind="moved", text=f"a copy of {named}", proof="digest", of=tuple(keys))
    swapped = other is not None and ours is not None and other.digest == ours.digest
    return Cause(
        kind="moved",
        text=f"holds what {named} holds in the golden{', and the reverse' if swapped else ''}",
        proof="digest",
        accept=("renamed",) if swapped else (),
        of=tuple(keys),
    )


def kept_elsewhere(evidence: Evidence, expected: TensorFingerprint) -> list[Cause]:
    """A tensor of the checkpoint that is expected as well has these bytes."""
    if expected.numel < 2 or expected.digest is None or is_constant(expected.stats):
        return []
    keys = [k for k, t in evidence.actual.items() if t.digest == expected.digest]
    reference = evidence.references.get(expected.key)
    if not keys and reference is not None:
        keys = evidence.same_in(evidence.tensors, reference, expected)
    if not keys:
        return []
    text = f"{' and '.join(keys[:3])} holds it, too"
    return [Cause(kind="moved", text=text, proof="digest", of=tuple(keys))]


def counter(expected: TensorFingerprint | None, actual: TensorFingerprint) -> Cause | None:
    """BatchNorm's count of the batches that it has seen."""
    if expected is None or not actual.key.endswith("num_batches_tracked"):
        return None
    before, after = expected.stats, actual.stats
    if actual.numel != 1 or actual.dtype.kind != "int" or before is None or after is None:
        return None
    was, now = int(before.min), int(after.min)
    how = "reset to 0" if now == 0 else "advanced" if now > was else "set back"
    text = f"BatchNorm's num_batches_tracked {how}: {was:,} before, {now:,} now"
    return Cause(
        kind="counter", text=text, proof="values", value=float(now), offset=float(now - was)
    )
