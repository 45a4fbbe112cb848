"""Explain the findings of a comparison: what happened to each, where that can be proved.

In: a `Comparison`, and the open checkpoints that it is of. Out: the same with `causes` on its
findings; tensors that were joined, split or rounded under another key are findings of kind
`renamed`, in place of missing and unexpected ones. What is not proved is not said. The search ends
when it has taken about as long as the comparison itself, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from harness.checkpoint.sources.paths import Location, to_path
from harness.checkpoint.tensors import Checkpoint
from harness.comparison.cause import GOLDEN
from harness.comparison.causes.accepting import accepted
from harness.comparison.causes.adapters import Adapter, opened_adapter
from harness.comparison.causes.evidence import Budget, OutOfTime
from harness.comparison.causes.search import EXPLAINED, VALUED, Search
from harness.comparison.comparison import Comparison
from harness.comparison.findings import FINDING_KINDS
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.streaming.workers import ALL_CORES, Workers

# The search takes no longer than a comparison that reads all: what was not read is given so many
# bytes a second, and a small checkpoint more time, so that no busy machine ends it.
_SMALL_NBYTES, _SMALL_SECONDS, _LEAST_SECONDS, _READ_RATE = 100 << 20, 10.0, 0.5, 1e9


def explained(
    comparison: Comparison,
    actual: Checkpoint | None = None,
    reference: Checkpoint | None = None,
    *,
    known: Mapping[str, TensorFingerprint] | None = None,
    adapter: Adapter | None = None,
    seconds: float = 0.0,
    side: str = GOLDEN,
    workers: Workers = ALL_CORES,
) -> Comparison:
    """Add causes to the findings, and let pass what the policy accepts.

    `actual` is the open checkpoint; None where its side is a golden. `reference` is the expected
    side, open, where it is there: what the golden lacks is read from it. `known` is what was read
    of the actual side already, in full; the rest is read once. `adapter` may explain sums.
    `seconds` is how long the comparison took: the search takes no longer, unless the policy accepts
    what it may find. `side` is what the expected side is called. Memory: 20 MB a thread, 64 MB for
    what is transposed, and the sketches of what differs.
    """
    of_interest = [f for f in comparison.findings if f.kind in EXPLAINED]
    if not of_interest:
        return accepted(comparison)
    is_small = sum(t.nbytes for t in comparison.actual.tensors.values()) <= _SMALL_NBYTES
    least = _SMALL_SECONDS if is_small else _LEAST_SECONDS
    must_end = not comparison.policy.accept and comparison.policy.cast is None
    least = max(seconds + _unread(comparison) / _READ_RATE, least)
    budget = Budget(least if must_end else math.inf)
    search = Search.of(comparison, actual, reference, known or {}, budget, workers)
    search.adapter = adapter
    note = None
    try:
        search.in_bytes()
        search.across_keys()
        search.each()
    except OutOfTime:
        left = sum(1 for finding in search.findings if not finding.causes)
        were = "finding was" if left == 1 else "findings were"
        note = (
            f"the search for causes ended after {budget.seconds:.1f} s, as long as a comparison "
            f"takes: {left:,} {were} not looked at in full (with --accept it goes on to the end)"
        )
    said = search.together()
    ordered = sorted(search.findings, key=lambda f: FINDING_KINDS.index(f.kind))
    findings = tuple(replace(f, causes=tuple(c.of_side(side) for c in f.causes)) for f in ordered)
    notes = (one for one in (said, note) if one)
    found = replace(comparison, findings=findings, notes=(*comparison.notes, *notes))
    return accepted(_with_known(found))


def with_causes(
    comparison: Comparison,
    actual: Checkpoint | None = None,
    reference: Checkpoint | None = None,
    *,
    started: float,
    known: Mapping[str, TensorFingerprint] | None = None,
    adapter: Location | None = None,
    side: str = GOLDEN,
    workers: Workers = ALL_CORES,
) -> Comparison:
    """As `explained`, in about the time since `started`, with the adapter in a file.

    Nothing but the adapter is read where all is well.
    """
    with nullcontext() if adapter is None else opened_adapter(to_path(adapter)) as opened:
        if not comparison.findings and not comparison.policy.must_change:
            return comparison
        return explained(
            comparison,
            actual,
            reference,
            known=known,
            adapter=opened,
            seconds=time.monotonic() - started,
            side=side,
            workers=workers,
        )


def _unread(comparison: Comparison) -> int:
    """The bytes of tensors that the comparison did not read, on both sides."""
    actual, total = comparison.actual.tensors, 0
    for finding in comparison.findings:
        tensor = actual.get(finding.actual_key or finding.key)
        if tensor is not None and tensor.digest is None and finding.kind in ("shape", "dtype"):
            total += 2 * tensor.nbytes
    return total


def _with_known(comparison: Comparison) -> Comparison:
    """Say, where no key is common, how many tensors are there under other keys."""
    is_common = any(
        f.kind in (*VALUED, "shape", "dtype", "alias", "prefix") for f in comparison.findings
    )
    renamed = {f.key for f in comparison.findings if f.kind == "renamed"}
    if is_common or comparison.num_identical or not renamed:
        return comparison
    total = len(renamed) + comparison.count("missing")
    firsts = [cause for f in comparison.findings for cause in f.causes[:1]]
    of_renamed = [f.causes[0] for f in comparison.findings if f.kind == "renamed" and f.causes]
    are = "are equal"
    if any(not cause.accept for cause in of_renamed):
        are = "are equal or nearly so" if all(c.accept or c.bound for c in of_renamed) else "are"
        are = "are equal or related" if any(c.correlation for c in of_renamed) else are
    equal = f"no key in common, but {len(renamed):,} of {total:,} tensors {are} under other keys"
    if any("rounded" in cause.accept for cause in firsts):
        equal += ", up to rounding"
    if len(renamed) < min(comparison.count("missing"), comparison.count("unexpected")):
        return comparison  # a few counters may be equal in any two models
    notes = tuple(note for note in comparison.notes if not note.startswith("no key in common"))
    return replace(comparison, notes=(equal, *notes), no_common_key=False)
