"""The search for causes: what each finding may be, the cheapest hypotheses first.

In: the findings of a comparison, and what is known of both sides. Out: the same with causes; what
was joined, split, or has another key, as findings of kind `renamed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.adapters import Adapter, sum_of
from harness.comparison.causes.elsewhere import (
    as_one,
    copied,
    counter,
    elsewhere,
    kept_elsewhere,
    moved_from,
)
from harness.comparison.causes.evidence import (
    Budget,
    Evidence,
    are_permutable,
    is_constant,
)
from harness.comparison.causes.in_place import (
    are_of_one_size,
    in_place,
    of_one_norm,
    other_bytes,
    zeros,
)
from harness.comparison.causes.ledger import Ledger
from harness.comparison.causes.linear import constant, linear, linear_in_values
from harness.comparison.causes.nearby import nearby, renamed_alike
from harness.comparison.causes.regrouped import NUMBER, regrouped
from harness.comparison.causes.replaced import replaced
from harness.comparison.causes.rounding import may_be_cast, nearly, recast
from harness.comparison.causes.rows import reordered, rows_changed
from harness.comparison.causes.same_bytes import rows_kept, seen_otherwise
from harness.comparison.causes.sums import Sums
from harness.comparison.causes.unrelated import Correlation, correlation, sampled, unrelated
from harness.comparison.causes.weight_norm import folded, other_form
from harness.comparison.comparison import Comparison
from harness.comparison.findings import Finding
from harness.fingerprints.fingerprint import MAX_KEPT_NUMEL, TensorFingerprint
from harness.streaming.workers import Workers

_T = TypeVar("_T")
_MAX_NEARBY = 1000
VALUED = ("different", "undecided", "close")
_MANY, _RELATED = 4, 0.3  # tensors, and their least correlation, that are said to be trained on
EXPLAINED = ("missing", "unexpected", "renamed", "prefix", "shape", "dtype", *VALUED)


@dataclass
class Search:
    """The findings so far, and what is known to explain them with."""

    evidence: Evidence
    findings: Ledger
    adapter: Adapter | None = None
    tested: set[tuple[str, str]] = field(default_factory=set)

    @cached_property
    def sums(self) -> Sums:
        return Sums(self.evidence)

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        actual: Checkpoint | None,
        reference: Checkpoint | None,
        known: Mapping[str, TensorFingerprint],
        budget: Budget,
        workers: Workers,
    ) -> Search:
        found = dict(comparison.actual.tensors)
        tensors: Mapping[str, Tensor] = {}
        if actual is not None:
            found |= {k: t for k, t in known.items() if k in found and found[k].stats is None}
            tensors = {k: t for k, t in actual.tensors.items() if t.storage.source is not None}
        return cls(
            evidence=Evidence(
                expected=dict(comparison.expected.tensors),
                actual=found,
                tensors=tensors,
                references={} if reference is None else reference.tensors,
                reference=reference,
                checkpoint=actual,
                block_nbytes=comparison.expected.block_nbytes,
                budget=budget,
                workers=workers,
            ),
            findings=Ledger(comparison.findings),
        )

    def _sides(
        self, finding: Finding
    ) -> tuple[TensorFingerprint | None, TensorFingerprint | None, Tensor | None]:
        """What is known of a finding's expected and actual tensor, and the tensor itself."""
        evidence, there = self.evidence, finding.actual_key or finding.key
        expected = None if finding.kind == "unexpected" else evidence.expected.get(finding.key)
        if finding.kind == "missing":
            return expected, None, None
        return expected, evidence.actual.get(there), evidence.tensors.get(there)

    def _detail(self, kinds: Sequence[str], *, sketches: bool) -> None:
        """Read more of what has no cause so far."""
        left = [f for f in self.findings if f.kind in kinds and not f.causes]
        if sketches and self.adapter is None:
            left = [f for f in left if self._may_be_sum(f)]
        ours = {f.key for f in left if f.kind != "unexpected"}
        theirs = {f.actual_key or f.key for f in left if f.kind != "missing"}
        self.evidence.detail(ours, theirs, sketches=sketches)

    def _may_be_sum(self, finding: Finding) -> bool:
        """Whether a sketch may tell more than a sample of what differs has shown."""
        expected, actual, _ = self._sides(finding)
        if finding.kind not in VALUED or expected is None or actual is None:
            return True
        if expected.key not in self.evidence.references or expected.shape != actual.shape:
            return True
        return self.sums.may_be(expected.key, actual)

    def in_bytes(self) -> None:
        """What needs no more than to be looked at once: another dtype, shape, or order of dims."""
        evidence = self.evidence
        for finding in self.findings:
            expected, _, tensor = self._sides(finding)
            if finding.kind not in ("shape", "dtype") or tensor is None or expected is None:
                continue
            if is_constant(expected.stats):
                continue
            match = recast(evidence, tensor, expected) if finding.kind == "dtype" else None
            causes = () if match is None else match.causes
            causes = causes or seen_otherwise(evidence, expected, tensor)
            if not causes and (kept := rows_kept(evidence, expected, tensor)) is not None:
                causes = (kept,)
            self.findings.explain(finding, *causes)

    def across_keys(self) -> None:
        """What is missing under one key and there under another, in another form."""
        for finding in self.findings:
            if finding.kind == "renamed" and not finding.causes:
                form = other_form(finding.key, finding.actual_key or "")
                causes = (moved_from(finding.key), *([form] if form is not None else []))
                self.findings.explain(finding, *causes)
        self._one_by_one()
        self._in_groups()

    def _one_by_one(self) -> None:
        """One tensor under another key: of each series first one, whose name tells the others'."""
        evidence = self.evidence
        for is_first in (True, False):
            missing, unexpected = self._alone()
            if not missing or not unexpected:
                break
            if is_first:
                missing, unexpected = _one_of_each(missing), _one_of_each(unexpected)
            self.evidence.detail({*missing}, {*unexpected}, sketches=False)
            missing = {key: evidence.expected[key] for key in missing}  # with what was read
            for key, there, causes in elsewhere(evidence, missing, unexpected):
                self.findings.rename((key,), (there,), causes)
            missing, unexpected = self._alone()
            for key, there in renamed_alike(self._pairs(), missing, unexpected):
                if causes := as_one(
                    evidence, missing[key], evidence.actual[there], unexpected[there]
                ):
                    self.findings.rename((key,), (there,), causes)

    def _in_groups(self) -> None:
        """Several tensors as one, weight norm, and what is no more than near."""
        evidence = self.evidence
        missing, unexpected = self._alone()
        if missing and unexpected:
            for group in regrouped(evidence, missing, unexpected):
                self.findings.rename(group.expected, group.actual, group.causes)
            missing, unexpected = self._alone()
        if missing and unexpected:
            for keys, cause in folded(evidence, missing, unexpected):
                for finding in self.findings.of_keys(keys):
                    self.findings.explain(finding, cause)
            self._detail(("missing", "unexpected"), sketches=True)
            missing, unexpected = self._alone()
            if min(len(missing), len(unexpected)) > _MAX_NEARBY:  # of each series one
                missing, unexpected = _one_of_each(missing), _one_of_each(unexpected)
            for key, there, cause in nearby(evidence, missing, unexpected):
                self._renamed(key, there, cause)
            missing, unexpected = self._alone()
            for key, there in renamed_alike(self._pairs(), missing, unexpected):
                self._renamed(key, there, None)
            missing, unexpected = self._alone()
            alike = renamed_alike(self._pairs(), missing, unexpected)
            if self._pairs() or not evidence.expected.keys().isdisjoint(evidence.actual):
                # Of another model nothing stands where something of this one stood.
                for group in replaced(evidence, missing, unexpected, alike):
                    self.findings.rename(group.expected, group.actual, group.causes)

    def _renamed(self, key: str, there: str, known: Cause | None) -> None:
        """Say what happened to a tensor beside its new name; at least what is known."""
        self.evidence.check_time()
        causes = self._causes_of(Finding(kind="shape", key=key, actual_key=there))
        if causes and causes[0].of != (key,):
            accept = ("renamed", *causes[0].accept) if causes[0].accept else ()
            first = replace(causes[0], of=(key,), accept=accept)
            others = (replace(cause, accept=()) for cause in (moved_from(key), *causes[1:]))
            self.findings.rename((key,), (there,), (first, *others))
        elif known is not None:
            self.findings.rename((key,), (there,), (known,))

    def _pairs(self) -> list[tuple[str, str]]:
        """The keys, old and new, of what was renamed so far."""
        return [(f.key, f.actual) for f in self.findings if f.kind == "renamed" and f.actual]

    def _alone(self) -> tuple[dict[str, TensorFingerprint], dict[str, Tensor]]:
        """The tensors that only one side has, without a cause so far."""
        evidence = self.evidence
        missing = {
            f.key: evidence.expected[f.key]
            for f in self.findings
            if f.kind == "missing" and f.key in evidence.expected and not f.causes
        }
        unexpected = {
            f.key: evidence.tensors[f.key]
            for f in self.findings
            if f.kind == "unexpected" and f.key in evidence.tensors and not f.causes
        }
        return missing, unexpected

    def each(self) -> None:
        """Every finding for itself, the cheapest hypotheses first."""
        for finding in self.findings:
            if not finding.causes and finding.kind in ("different", "undecided"):
                self._in_values(finding)
        self._detail(EXPLAINED, sketches=False)
        self._detail(EXPLAINED, sketches=True)
        for finding in self.findings:
            if not finding.causes and finding.kind in EXPLAINED:
                causes = self._causes_of(finding)
                self.tested.add((finding.kind, finding.key))
                if causes:
                    self.findings.explain(finding, *causes)

    def _in_values(self, finding: Finding) -> None:
        """What explained others, or a sample of both sides suggests, and all values prove."""
        evidence = self.evidence
        expected, _, tensor = self._sides(finding)
        if expected is None or tensor is None or expected.shape != tensor.shape:
            return
        known = evidence.values_of(expected)
        if known is not None and expected.numel > MAX_KEPT_NUMEL:
            evidence.check_time()
            causes = seen_otherwise(evidence, expected, tensor, as_others=True)
            if not causes and (cause := linear_in_values(evidence, known, tensor)) is not None:
                causes = (cause,)
            self.findings.explain(finding, *causes)

    def _causes_of(self, finding: Finding) -> list[Cause]:
        evidence = self.evidence
        evidence.check_time()
        expected, actual, tensor = self._sides(finding)
        if finding.kind == "prefix":
            return [replace(moved_from(finding.key), text="the same keys under another prefix")]
        if finding.kind == "missing":
            return [] if expected is None else kept_elsewhere(evidence, expected)
        if actual is None or actual.dtype.is_value or (expected and expected.dtype.is_value):
            return []
        found = [counter(expected, actual), copied(evidence, finding, actual)]
        if expected is not None and tensor is not None and expected.shape == actual.shape:
            match = recast(evidence, tensor, expected)
            found += () if match is None else match.causes
        if finding.kind != "close" and not any(found):
            found.append(constant(expected, actual))
            if expected is not None:
                found += self._of_pair(finding, expected, actual, tensor)
            elif not any(found):
                found.append(self.sums.explain(finding.key, actual))
        causes = [cause for cause in found if cause is not None]
        return sorted(causes, key=_quality)

    def _of_pair(
        self,
        finding: Finding,
        expected: TensorFingerprint,
        actual: TensorFingerprint,
        tensor: Tensor | None,
    ) -> list[Cause | None]:
        evidence = self.evidence
        found: list[Cause | None] = []
        if is_constant(expected.stats) or is_constant(actual.stats):
            return found
        if tensor is not None and (
            are_permutable(expected.stats, actual.stats) or may_be_cast(expected, actual)
        ):
            found += seen_otherwise(evidence, expected, tensor)
        if tensor is not None and expected.shape != actual.shape:
            found.append(rows_kept(evidence, expected, tensor))
        if tensor is not None and not any(found) and not _names_all(finding):
            found.append(rows_changed(evidence, expected, actual, tensor))
        if tensor is not None and not any(found):
            found.append(reordered(evidence, expected, actual, tensor))
        if not any(found) and self.adapter is not None:
            found.append(sum_of(self.adapter, expected, actual, evidence.block_nbytes))
        known = evidence.values_of(expected)
        if not any(found) and known and tensor and expected.numel > MAX_KEPT_NUMEL:
            found.append(linear_in_values(evidence, known, tensor))
        elif not any(found):
            found.append(linear(expected, actual, evidence.block_nbytes))
        if not any(found):
            found.append(self.sums.explain(expected.key, actual))
        if not any(found) and tensor is not None and expected.shape == actual.shape:
            match = nearly(evidence, tensor, expected)
            found += () if match is None else match.causes
            if match is None and known is not None and expected.dtype == actual.dtype:
                found.append(in_place(evidence, known, expected, tensor))
            if not any(found):
                found.append(other_bytes(evidence, expected, tensor))
            if not any(found):
                found.append(zeros(expected.stats, actual.stats, expected.numel))
        return found

    def together(self) -> str | None:
        """What no tensor may prove alone: that they have nothing to do with the golden's.

        Returns a note where they have: that they were trained on is no cause of each.
        """
        found: dict[str, tuple[Finding, Correlation]] = {}
        related: list[float] = []
        groups: dict[str, list[str]] = {}
        for finding in self.findings:
            if (finding.kind, finding.key) not in self.tested or finding.causes:
                continue  # what was not tested may have a better cause
            if finding.kind not in ("different", "undecided"):
                continue
            correlated = self._correlation(finding)
            expected, actual, _ = self._sides(finding)
            if correlated is None or expected is None or actual is None:
                continue
            if correlated.is_related:
                related += [correlated.value] if _differs_throughout(finding) else []
            elif (cause := of_one_norm(expected.stats, actual.stats)) is not None:
                self.findings.explain(finding, cause)
            elif not are_of_one_size(expected.stats, actual.stats, actual.dtype.itemsize):
                found[finding.key] = finding, correlated
                name = "".join(c for c in finding.key if not c.isdigit())
                groups.setdefault(name, []).append(finding.key)
        clear: list[str] = []
        unclear: list[str] = []
        for keys in groups.values():
            known = unrelated([found[key][1] for key in keys])
            (unclear if known is None else clear).extend(keys)
        # Tensors too small to tell alone are told together.
        for some in (clear, unclear):
            cause = unrelated([found[key][1] for key in some])
            for finding, related_to in (found[key] for key in some):
                own = cause or (unrelated([related_to]) if some is clear else None)
                if own is not None:
                    self.findings.explain(finding, own)
        if len(related) < _MANY or min(related) < _RELATED:
            return None
        ends = dict.fromkeys(f"{end:.2f}" for end in (min(related), max(related)))
        return (
            f"{len(related):,} tensors that differ correlate with what they were "
            f"({' to '.join(ends)}): trained on, merged, quantised, or another version; "
            "diff --table shows how far"
        )

    def _correlation(self, finding: Finding) -> Correlation | None:
        expected, actual, tensor = self._sides(finding)
        if expected is None or actual is None:
            return None
        reference = self.evidence.references.get(expected.key)
        if reference is not None and tensor is not None and reference.shape == tensor.shape:
            return sampled(reference, tensor)
        return correlation(expected, actual, self.evidence.block_nbytes)


def _differs_throughout(finding: Finding) -> bool:
    """Whether it differs everywhere, as what was trained on does, as far as is known."""
    difference = finding.difference
    if difference is None or not all(difference.strip):
        return False
    return difference.num_differing is None or difference.num_differing > len(difference.elements)


def _one_of_each(tensors: dict[str, _T]) -> dict[str, _T]:
    """The first tensor of each series, whose keys differ in numbers alone."""
    first: dict[str, str] = {}
    for key in tensors:
        first.setdefault(NUMBER.sub("#", key), key)
    return {key: tensors[key] for key in first.values()}


def _names_all(finding: Finding) -> bool:
    """Whether the few elements that changed are named one by one."""
    difference = finding.difference
    if difference is None or difference.num_differing is None:
        return False
    return difference.num_differing <= len(difference.elements)


def _quality(cause: Cause) -> int:
    order = ("counter", "moved", "widened", "rounded", "constant")
    return order.index(cause.kind) if cause.kind in order else len(order)
