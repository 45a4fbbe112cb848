"""The findings of a comparison while causes are looked for: each is found and replaced at once.

In: findings. Out: the same with causes, and `renamed` ones in place of what was missing and
unexpected. Every step takes time in proportion to the tensors that it is about, not to all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from harness.comparison.cause import Cause
from harness.comparison.findings import Finding, FindingKind


class Ledger:
    """Findings in order; those of tensors have a kind and key of their own."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self._findings: dict[tuple[FindingKind, str, int], Finding] = {}
        self._kinds: defaultdict[str, list[FindingKind]] = defaultdict(list)
        for finding in findings:
            self._add(finding)

    def __iter__(self) -> Iterator[Finding]:
        return iter([*self._findings.values()])  # what is replaced meanwhile is seen as it was

    def of_keys(self, keys: Iterable[str]) -> list[Finding]:
        """What was found of each key."""
        return [self._findings[kind, key, 0] for key in keys for kind in self._kinds.get(key, ())]

    def explain(self, finding: Finding, *causes: Cause) -> None:
        """Add causes to a finding of a tensor."""
        place = finding.kind, finding.key, 0
        self._findings[place] = replace(finding, causes=(*finding.causes, *causes))

    def rename(
        self, expected: tuple[str, ...], actual: tuple[str, ...], causes: tuple[Cause, ...]
    ) -> None:
        """Put findings of kind `renamed` in place of what was missing and unexpected."""
        self._remove("missing", expected)
        self._remove("unexpected", actual)
        for key in expected:
            self._add(
                Finding(
                    kind="renamed",
                    key=key,
                    actual_key=actual[0],
                    expected=key,
                    actual=", ".join(actual),
                    causes=causes,
                )
            )

    def _add(self, finding: Finding) -> None:
        kinds, number = self._kinds[finding.key], 0
        if finding.kind in kinds:
            number = len(self._findings)  # another one of what is no tensor
        else:
            kinds.append(finding.kind)
        self._findings[finding.kind, finding.key, number] = finding

    def _remove(self, kind: FindingKind, keys: Iterable[str]) -> None:
        for key in keys:
            if self._findings.pop((kind, key, 0), None) is not None:
                self._kinds[key].remove(kind)
