"""Hypotheses that one tensor's values are another's, and that it counts.

In: what is known of both sides, and what is missing, unexpected or found different. Out: a `Cause`,
or None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, are_permutable, is_constant
from harness.comparison.causes.rounding import ends, recast
from harness.comparison.causes.same_bytes import seen_otherwise
from harness.comparison.findings import Finding
from harness.fingerprints.fingerprint import TensorFingerprint

_MAX_CIRCLE = 64


def moved_from(key: str) -> Cause:
    return Cause(
        kind="moved",
        text=f"holds what {key} holds in the golden",
        proof="digest",
        accept=("renamed",),
        of=(key,),
    )


def elsewhere(
    evidence: Evidence, missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, tuple[Cause, ...]]]:
    """Pair missing and unexpected tensors that are each other, cast, reshaped or transposed.

    Candidates are those whose least and greatest values agree, which no step on the way changes
    but a rounding, and that keeps their order.
    """
    exact: dict[object, list[str]] = {}
    cast: dict[object, list[str]] = {}
    left = {k: t for k, t in missing.items() if t.stats is not None and not is_constant(t.stats)}
    for (key, expected), both in zip(left.items(), ends([*left.values()]), strict=True):
        for index, names in zip((exact, cast), both, strict=True):
            for name in names:
                index.setdefault((expected.numel, name), []).append(key)
    known = [t for t in map(evidence.actual.get, unexpected) if t is not None]
    for actual, (own, after) in zip(known, ends(known), strict=True):
        tensor = unexpected[actual.key]
        wanted = [(exact, name) for name in own | after] + [(cast, name) for name in own]
        found = (key for index, name in wanted for key in index.get((actual.numel, name), ()))
        for key in dict.fromkeys(found):
            if key in left and (causes := as_one(evidence, left[key], actual, tensor)):
                del left[key]
                yield key, actual.key, causes
                break


def as_one(
    evidence: Evidence, expected: TensorFingerprint, actual: TensorFingerprint, tensor: Tensor
) -> tuple[Cause, ...]:
    """Prove of two tensors under different keys that they are each other, in whatever form."""
    moved = moved_from(expected.key)
    if expected.shape == tensor.shape:
        match = recast(evidence, tensor, expected)
        if match is not None:
            first, *others = match.of(moved)
            text = f"{moved.text}: {others[0].text}"
            return replace(first, text=text), *others
    if is_constant(expected.stats) or (
        expected.dtype == actual.dtype and not are_permutable(expected.stats, actual.stats)
    ):
        return ()
    causes = seen_otherwise(evidence, expected, tensor)
    if not causes:
        return ()
    text = f"{moved.text}: {causes[0].text}"
    accept = ("renamed", *causes[0].accept)
    first = replace(causes[0], text=text, of=(expected.key,), accept=accept)
    return first, replace(moved, accept=()), *causes[1:]


def copied(evidence: Evidence, finding: Finding, actual: TensorFingerprint) -> Cause | None:
    """Another tensor of the golden has these bytes."""
    if actual.numel < 2 or is_constant(actual.stats):
        return None
    tensor, keys = evidence.tensors.get(actual.key), []
    if actual.digest is not None:
        keys = [key for key in evidence.by_digest.get(actual.digest, ()) if key != finding.key]
    if not keys and tensor is not None:
        keys = evidence.same_in(evidence.references, tensor, actual)
    if not keys:
        return None
    named = " and ".join(keys[:3])
    if finding.kind == "unexpected":
        return Cause(kind="moved", text=f"a copy of {named}", proof="digest", of=tuple(keys))
    length = _circle(evidence, finding.key, keys[0])
    circle = {None: "", 2: ", and the reverse"}.get(length, f", in a circle of {length}")
    return Cause(
        kind="moved",
        text=f"holds what {named} holds in the golden{circle}",
        proof="digest",
        accept=() if length is None else ("moved",),
        of=tuple(keys),
    )


def _circle(evidence: Evidence, key: str, other: str) -> int | None:
    """How many keys have exchanged their tensors, where `key` has what `other` has in the golden.

    None where some tensor is lost.
    """
    wanted = evidence.expected[key]
    for length in range(2, _MAX_CIRCLE + 1):
        there, tensor = evidence.actual.get(other), evidence.tensors.get(other)
        if there is None:
            return None
        if there.digest is not None and wanted.digest is not None:
            if there.digest == wanted.digest:
                return length
            keys = evidence.by_digest.get(there.digest, [])
        elif tensor is None:
            return None
        elif evidence.are_bytes_of(tensor, wanted):
            return length
        else:
            keys = evidence.same_in(evidence.references, tensor, there)
        if not keys:
            return None
        other = keys[0]
    return None


def kept_elsewhere(evidence: Evidence, expected: TensorFingerprint) -> list[Cause]:
    """A tensor of the checkpoint that is expected as well has these bytes."""
    if expected.numel < 2 or is_constant(expected.stats):
        return []
    keys = evidence.actual_by_digest.get(expected.digest or b"", [])
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
