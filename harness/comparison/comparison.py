"""The result of comparing two fingerprints, and its report as text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.comparison.findings import FINDING_KINDS, Divergence, Finding, FindingKind
from harness.comparison.policy import Policy
from harness.comparison.words import HEADINGS, Section, divergence_lines, finding_lines
from harness.errors import GoldenMismatch
from harness.fingerprints.fingerprint import Fingerprint
from harness.text.fitting import PLAIN, Style, fit
from harness.text.folding import escaped, in_section, printable

if TYPE_CHECKING:
    from harness.comparison.difference import Verdict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome of one stage: what was compared, and every finding, worst first.

    `no_common_key` says that the two sides have no key in common, `is_of_reload` that the
    actual side of outputs is what the reloaded model computes, `is_unloaded` that a state dict did
    not fit its module: keys and shapes are all that was compared.
    """

    expected: Fingerprint
    actual: Fingerprint
    policy: Policy
    findings: tuple[Finding, ...]
    num_identical: int
    num_ignored: int = 0
    num_nan: int = 0
    stage: str = "file"
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    no_common_key: bool = False
    is_of_reload: bool = False
    is_unloaded: bool = False

    @property
    def can_be_recorded(self) -> bool:
        """Whether a golden can hold what was found: the file, the outputs, and no fault of code."""
        return self.stage not in ("load", "reload") and not self.is_of_reload

    @property
    def verdict(self) -> Verdict:
        """The worst of all tensors: different, undecided, close or identical."""
        kinds = {finding.kind for finding in self.findings}
        if any(finding.fails for finding in self.findings):
            return "different"
        if "undecided" in kinds:
            return "undecided"
        return "close" if kinds & {"close", "accepted"} else "identical"

    @property
    def exit_code(self) -> int:
        """0 all identical or close, 1 something differs, 3 something is undecided."""
        return {"identical": 0, "close": 0, "different": 1, "undecided": 3}[self.verdict]

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def count(self, kind: FindingKind) -> int:
        """The number of tensors with findings of a kind."""
        return sum(finding.count for finding in self.findings if finding.kind == kind)

    def __bool__(self) -> bool:
        """Whether it passes, so that `assert harness.diff(a, b)` is a test."""
        return self.ok

    def __str__(self) -> str:
        """The report as text."""
        return render(self)

    def __repr__(self) -> str:
        return f"<Comparison {self.verdict}: {self.stage}: {counts_of(self)}>"

    def _repr_html_(self) -> str:
        from harness.comparison.plain import as_html

        return as_html(self, headline(self))

    def to_dict(self) -> dict[str, Any]:
        """What the JSON report says of this stage: `harness schema` has its types."""
        from harness.comparison.plain import plain, stage_data

        found: dict[str, Any] = plain(stage_data(self))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per tensor, identical ones too, each with the same names.

        Ready for `pandas.DataFrame(comparison.rows())`. `kind` is that of the worst finding, or
        identical or ignored; what was not measured is None or NaN.
        """
        from harness.comparison.plain import rows

        return rows(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a report, in the format of the suffix: .html, .md, .xml (JUnit) or .json.

        Raises UsageError for another suffix, for a file that is there and is no report, and where
        it cannot be written.
        """
        # By its name: reports are made of comparisons, and not the other way round.
        import_module("harness.report.files").write_comparison(self, path)

    def raise_for_mismatch(self) -> Comparison:
        """Raise GoldenMismatch, with the report as its message, unless the verdict passes."""
        if not self.ok:
            raise GoldenMismatch(
                render(self), hint="if this change is intended, update the golden", comparison=self
            )
        return self


_MAX_OTHERS = 6
_MAX_VALUES = 4
SYMBOLS = {"identical": "✓", "close": "✓", "undecided": "?", "different": "✗"}
_COLORS = {"identical": "32", "close": "32", "undecided": "33", "different": "31"}


def render(
    comparison: Comparison, style: Style = PLAIN, *, earlier: Sequence[Comparison] = ()
) -> str:
    """The whole report of one comparison, without a trailing newline.

    What an `earlier` stage has told in the same words is referred to.
    """
    lines = _lines(comparison, style, earlier)
    return "\n".join(part for line in lines for part in fit(line, style.width, style.ellipsis))


def headline(comparison: Comparison, style: Style = PLAIN) -> str:
    """One line: the verdict, the two sides, the counts."""
    verdict = comparison.verdict
    mark = SYMBOLS[verdict] if style.unicode else "ok" if comparison.ok else "FAIL"
    return (
        style.paint(f"{mark} {verdict}", _COLORS[verdict])
        + f"  {printable(comparison.expected.name)}  {comparison.stage}: {counts_of(comparison)}"
    )


def counts_of(comparison: Comparison) -> str:
    """How many tensors are identical, and how many there are of each kind of finding."""
    counts = [f"{comparison.num_identical:,} identical"]
    counts += [
        f"{comparison.count(kind):,} {kind}"
        for kind in reversed(FINDING_KINDS)
        if comparison.count(kind)
    ]
    if comparison.num_ignored:
        counts.append(f"{comparison.num_ignored:,} ignored")
    return ", ".join(counts) + _part_compared(comparison)


def _part_compared(comparison: Comparison) -> str:
    """Which part of a file was looked at, and which were not."""
    if comparison.stage != "file":
        return ""
    actual = comparison.actual
    section = "" if actual.section in ("", ".") else f"section {printable(actual.section)}"
    parts = _few([name for name, count in actual.others if count != 0], _MAX_OTHERS)
    values = [name for name, count in actual.others if count == 0]
    if values:
        kind = "value" if len(values) == 1 else "values"
        parts += f"{', ' if parts else ''}{kind} {_few(values, _MAX_VALUES)}"
    others = f"not compared: {parts}" if parts else ""
    said = "; ".join(filter(None, (section, others)))
    return f" ({said})" if said else ""


def _few(names: Sequence[str], most: int) -> str:
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def _lines(
    comparison: Comparison, style: Style, earlier: Sequence[Comparison] = ()
) -> Iterator[str]:
    yield headline(comparison, style)
    yield from (f"  {line}" for line in sides(comparison))
    yield from (f"  note: {escaped(note)}" for note in comparison.notes)
    diverged = divergence_section(comparison)
    if diverged is not None:
        yield from _set_out(diverged, style)
    if note := nan_note(comparison):
        yield f"  note: {note}"
    told = {
        section: before.stage
        for before in reversed(earlier)
        for section in finding_sections(before, style)
    }
    for section in finding_sections(comparison, style):
        if section in told:
            section = Section(heading=f"{section.heading}, as at {told[section]}", lines=())
        yield from _set_out(section, style)
    chance = chance_note(comparison)
    if chance:
        yield ""
        yield f"  ({chance})"


def _set_out(section: Section, style: Style) -> Iterator[str]:
    yield ""
    yield "  " + style.paint(section.heading, "1")
    yield from section.lines


def sides(comparison: Comparison) -> list[str]:
    """What was compared with what, unless both are the same."""
    if comparison.verdict == "identical":
        return []
    return [
        f"expected  {escaped(_side(comparison.expected))}",
        f"actual    {escaped(_side(comparison.actual))}",
    ]


def nan_note(comparison: Comparison) -> str:
    """How many tensors are NaN in part, "" where none is."""
    count = comparison.num_nan
    if not count:
        return ""
    return f"{count:,} expected tensor{' contains' if count == 1 else 's contain'} NaN"


def chance_note(comparison: Comparison) -> str:
    """How sure the verdicts are, "" where they are exact."""
    chance = sum(f.difference.chance for f in comparison.findings if f.difference is not None)
    return (
        f"decided by sketch: unless a change was made to fool it, the chance of a wrong verdict "
        f"is below {chance:.0e}"
        if chance
        else ""
    )


def finding_sections(comparison: Comparison, style: Style) -> Iterator[Section]:
    """The findings by kind, worst first, without the aftermath of what diverges first."""
    for kind in FINDING_KINDS:
        findings = [finding for finding in comparison.findings if finding.kind == kind]
        if findings and not _is_aftermath(kind, comparison):
            said = HEADINGS[kind]
            if kind == "renamed" and comparison.is_unloaded:
                said = "renamed: as shapes and names tell"
            elif kind == "renamed" and not all(c.accept for f in findings for c in f.causes[:1]):
                said = "renamed: under another key"  # not all of equal weights
            yield Section(
                heading=f"{said} ({comparison.count(kind):,})",
                lines=tuple(map(escaped, finding_lines(findings, style))),
            )


def _is_aftermath(kind: FindingKind, comparison: Comparison) -> bool:
    """Rounding shows in every output, and what diverges once diverges everywhere behind it."""
    if comparison.stage != "outputs":
        return False
    diverged = comparison.divergence is not None
    return kind == "close" or (diverged and kind in ("different", "undecided"))


def divergence_section(comparison: Comparison) -> Section | None:
    """The first place in a computation that is not as recorded."""
    if comparison.divergence is None:
        return None
    return Section(
        heading=f"first diverges: {printable(comparison.divergence.place)}",
        lines=tuple(map(escaped, divergence_lines(comparison.divergence))),
    )


def _side(fingerprint: Any) -> str:
    section = in_section(fingerprint.section)
    return f"{printable(fingerprint.name)} ({fingerprint.container}{section})"
