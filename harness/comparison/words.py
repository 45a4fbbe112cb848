"""A comparison as text: one line for the whole, then findings by kind, worst first.

In: a `Comparison` and a `Style`. Out: lines of text, with colour codes only where the style says,
and no wider than it says; or the sections that they are made of, for other reports to set out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.comparison.cause import Cause
from harness.comparison.findings import Divergence, Finding, FindingKind
from harness.comparison.mapping import changed_prefix
from harness.text.fitting import Style
from harness.text.folding import fold, fold_names, in_order, printable

if TYPE_CHECKING:
    from harness.comparison.difference import Difference, Element


_MAX_GROUPS = 12
_MAX_PATTERNS = 6
# What stands between a whole and its parts.
_SIGNS = (" is now ", " stands where ", " = ")
_DIGITS = re.compile(r"\d+")
HEADINGS: dict[FindingKind, str] = {
    "damaged": "damaged: not the bytes that were saved",
    "missing": "missing: only in expected",
    "unexpected": "unexpected: only in actual",
    "prefix": "prefix: the same keys under another prefix",
    "renamed": "renamed: equal weights under another key",
    "shape": "shape",
    "dtype": "dtype",
    "value": "value: entries other than tensors changed",
    "unwritten": "unwritten: the load left them as the model initialised them",
    "different": "different: allclose is false",
    "unchanged": "unchanged: identical, where --must-change demands a change",
    "alias": "alias: tied weights are now separate, or the reverse",
    "requires_grad": "requires_grad: frozen, or no longer frozen",
    "optimizer": "optimizer: its state is lost, or belongs to another parameter",
    "hyperparameter": "hyperparameter: lost in the reload",
    "config": "config: the configuration changed (a failure with --check-config)",
    "undecided": "undecided: the golden cannot tell whether allclose holds",
    "close": "close: within the tolerance, but not identical",
    "accepted": "accepted: allowed by --accept, --cast or --must-change",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report: its heading, and lines that are indented by four spaces or more."""

    heading: str
    lines: tuple[str, ...]


def divergence_lines(divergence: Divergence) -> Iterator[str]:
    finding = divergence.finding
    if finding.difference is not None:
        yield f"    {printable(finding.key)}  {finding.expected}"
        yield from (f"      {line}" for line in _differences([finding.difference]))
    else:
        yield f"    {printable(finding.key)}: {finding.kind}"
        yield f"      expected {finding.expected}, actual {finding.actual}"
    yield f"    {_inputs_of(divergence)}"


def _inputs_of(divergence: Divergence) -> str:
    """What is known of a module's inputs, and of all that was computed before it."""
    several = divergence.num_before != 1
    before = f"the {divergence.num_before:,} activation{'s' * several} computed before it"
    odd = [f"{name} changed" for name in divergence.diverging]
    odd += [f"{name} is undecided" for name in divergence.undecided]
    odd += [f"{name} is on one side only" for name in divergence.alone]
    total = len(divergence.agreeing) + len(odd)
    same = "within the tolerance" if divergence.num_close else "unchanged"
    close = f", {divergence.num_close:,} of them not identical" * bool(divergence.num_close)
    if divergence.num_undecided:
        inputs = f"of its {total} inputs {', '.join(odd)}; " if odd else ""
        count = divergence.num_undecided
        are = "are" if count > 1 else "is"
        return f"{inputs}{count:,} of {before} {are} undecided: the change may begin there"
    if odd:
        return f"of its {total} inputs {', '.join(odd)}; {same}: {before}{close}"
    if total == 0:
        return f"none of its inputs is recorded; {same}: {before}{close}"
    inputs = "its input is" if total == 1 else f"all {total} of its inputs are"
    return f"{inputs} {same}, and so {'are' if several else 'is'} {before}{close}"


def finding_lines(findings: Sequence[Finding], style: Style) -> Iterator[str]:
    """Findings of one kind: those with a cause by what happened, the others by what they say."""
    explained: list[Finding] = []
    plain: list[Finding] = []
    for finding in findings:
        is_explained = finding.causes and not _says_its_cause(finding)
        (explained if is_explained else plain).append(finding)
    yield from _explained_lines(explained, style)
    yield from _plain_lines(plain, style)


def _says_its_cause(finding: Finding) -> bool:
    """Whether its cause says no more than its own words: another name, or another prefix."""
    is_moved = len(finding.causes) == 1 and finding.causes[0].accept == ("renamed",)
    return finding.kind == "prefix" or (finding.kind == "renamed" and is_moved)


def _explained_lines(findings: Sequence[Finding], style: Style) -> Iterator[str]:
    groups: dict[str | None, list[Finding]] = {}
    for finding in findings:
        # What differs in numbers alone happened to all of them; counters have any numbers.
        cause = _told_cause(finding)
        said = cause.kind if cause.kind == "counter" else _template(_in_brief(finding))
        groups.setdefault(said, []).append(finding)
    shown, hidden = [*groups.values()][:_MAX_GROUPS], [*groups.values()][_MAX_GROUPS:]
    for members in shown:
        if members[0].kind == "renamed":
            yield from _renamed_lines(members, style)
        else:
            yield f"    {_cause_of(members, style)}{_many(members)}"
            yield from (f"      {line}" for line in _affected(members, style))
    if hidden:
        count = sum(map(len, hidden))
        yield f"    {style.ellipsis} and {count:,} more (--format json lists all)"


def _told_cause(finding: Finding) -> Cause:
    """The cause that is said: that it moved, its new name says."""
    first, *others = finding.causes
    if first.kind != "moved" or finding.kind != "renamed":
        return first
    if first.bound and not others:
        return replace(first, text="nearly the same values")
    if first.correlation and not others:
        return replace(first, text="other values that correlate with the expected ones")
    return others[0] if others else first


def _renamed_lines(members: Sequence[Finding], style: Style) -> Iterator[str]:
    cause = _told_cause(members[0])
    olds = _patterns([finding.key for finding in members], style)
    said = _cause_of(members, style)
    sign = next((sign for sign in _SIGNS if sign in said), None)
    if sign is not None and cause.kind in ("joined", "stacked", "split", "unrelated"):
        # The whole stands in front of what it is made of.
        wholes = olds
        if sign != " is now ":
            wholes = _patterns([*dict.fromkeys(f.actual or "" for f in members)], style)
        yield f"    {wholes}{sign}{said.partition(sign)[2]}{_many(members)}"
        return
    yield f"    {_cause_of(members, style)}{_many(members)}"
    alike: dict[str | None, list[Finding]] = {}
    for finding in members:
        alike.setdefault(_template(finding.actual), []).append(finding)
    for some in alike.values():
        yield f"      {_patterns([finding.key for finding in some], style)}"
        now = _patterns([finding.actual or "" for finding in some], style)
        yield f"      {'is' if len(some) == 1 else 'are'} now {now}"


def _affected(members: Sequence[Finding], style: Style) -> Iterator[str]:
    """Which tensors a cause is of, and how far they are off."""
    first = members[0]
    keys = _patterns([finding.key for finding in members], style)
    sides = {(finding.expected, finding.actual) for finding in members}
    if first.kind in ("dtype", "shape", "alias", "accepted"):
        yield keys
        ours, theirs = (list(dict.fromkeys(map(str, side))) for side in zip(*sides, strict=True))
        if len(ours) + len(theirs) <= 4:
            yield f"expected {' or '.join(sorted(ours))}, actual {' or '.join(sorted(theirs))}"
    else:
        yield f"{keys}  {first.expected or first.actual}" if len(sides) == 1 else keys
    differences = [f.difference for f in members if f.difference is not None]
    if len(differences) == 1 and _has_all_elements(differences[0]):
        yield from _differences(differences)
    elif differences:
        why = 1 if len(differences) == 1 else 0
        yield from [*_differences(differences)][why : why + 2]


def _has_all_elements(difference: Difference) -> bool:
    """Whether the elements that differ are so few that all of them are known."""
    return 0 < (difference.num_differing or 0) <= len(difference.elements)


def _cause_of(findings: Sequence[Finding], style: Style) -> str:
    """What happened to all of them, in words: numbers in which the words differ are folded."""
    causes = [_told_cause(finding) for finding in findings]
    texts = [*dict.fromkeys(cause.text for cause in causes)]
    if causes[0].kind == "moved" and causes[0].bound:
        bound = 10.0 ** math.ceil(math.log10(max(cause.bound or 0.0 for cause in causes)))
        return f"{texts[0]}, to within {bound:.0e} of their norm"
    if causes[0].kind == "moved" and causes[0].correlation:
        ends = dict.fromkeys(f"{f(c.correlation or 0.0 for c in causes):.2f}" for f in (min, max))
        return f"{texts[0]} ({' to '.join(ends)})"
    if len(texts) == 1:
        return texts[0]
    if findings[0].causes[0].kind == "counter":
        return "BatchNorm's num_batches_tracked changed"
    for said in (texts, [*dict.fromkeys(map(_in_brief, findings))]):
        folded = fold(said, ellipsis=style.ellipsis)
        if len(folded) == 1:
            return folded[0][0]
    return f"{texts[0]} (and so on)"


def _in_brief(finding: Finding) -> str:
    """What happened, with `layers.2.*` for the other key that it names: whole layers move."""
    cause = _told_cause(finding)
    if cause.kind != "moved" or len(cause.of) != 1:
        return cause.text
    start, _ = changed_prefix(cause.of[0], finding.key)
    return cause.text.replace(cause.of[0], f"{start}*" if start.endswith(".") else cause.of[0])


def _patterns(keys: Sequence[str], style: Style) -> str:
    """Keys on one line; of many that do not fold, the first."""
    folded = fold_names(keys, ellipsis=style.ellipsis)
    shown = [pattern for pattern, _ in folded[:_MAX_PATTERNS]]
    more = sum(len(members) for _, members in folded[_MAX_PATTERNS:])
    return ", ".join(shown) + (f" {style.ellipsis} and {more:,} more" if more else "")


def _plain_lines(findings: Sequence[Finding], style: Style) -> Iterator[str]:
    groups = list(_grouped(findings, style))
    said = None
    for pattern, members in groups[:_MAX_GROUPS]:
        first = members[0]
        if first.kind in ("dtype", "shape"):
            # One cast, or one change of width, shows in many tensors: say it once above them.
            if said != (first.expected, first.actual):
                said = (first.expected, first.actual)
                yield f"    expected {first.expected}, actual {first.actual}:"
            yield f"      {pattern}{_many(members)}"
        else:
            yield from _group(pattern, members, style)
    hidden = groups[_MAX_GROUPS:]
    if hidden:
        count = sum(len(members) for _, members in hidden)
        yield f"    {style.ellipsis} and {count:,} more (--format json lists all)"


def _grouped(findings: Sequence[Finding], style: Style) -> Iterator[tuple[str, list[Finding]]]:
    """Fold the keys of findings that say the same, in the order of the worst of each."""
    alike: dict[tuple[str | None, str | None], list[Finding]] = {}
    for finding in findings:
        said = (
            (finding.expected, finding.actual)
            if finding.kind not in ("renamed", "alias", "value")
            else (_template(finding.expected), _template(finding.actual))
        )
        alike.setdefault(said, []).append(finding)
    order = {finding.key: index for index, finding in enumerate(findings)}
    groups = []
    for members in alike.values():
        # What is said once above its tensors must stay together.
        together = order[members[0].key] if members[0].kind in ("dtype", "shape") else None
        for pattern, folded in _folded(members, style):
            place = min(order[finding.key] for finding in folded)
            groups.append(((place if together is None else together, place), pattern, folded))
    for _, pattern, members in sorted(groups, key=lambda group: group[0]):
        yield pattern, members


def _folded(findings: Sequence[Finding], style: Style) -> Iterator[tuple[str, list[Finding]]]:
    """Fold keys; not those of new names that stand in another order, which a pattern would hide."""
    by_key = {finding.key: finding for finding in findings}
    for pattern, keys in fold(list(by_key), ellipsis=style.ellipsis):
        folded = [by_key[key] for key in keys]
        if folded[0].kind == "renamed" and not in_order(keys, [f.actual or "" for f in folded]):
            yield from ((printable(finding.key), [finding]) for finding in folded)
        else:
            yield pattern, folded


def _many(members: Sequence[Finding]) -> str:
    return f"  ({len(members):,} tensors)" if len(members) > 1 else ""


def _template(text: str | None) -> str | None:
    return None if text is None else _DIGITS.sub("#", text)


def _group(pattern: str, members: Sequence[Finding], style: Style) -> Iterator[str]:
    first = members[0]
    many = _many(members)
    if first.kind == "missing":
        yield f"    {pattern}  {first.expected}{many}"
    elif first.kind == "unexpected":
        yield f"    {pattern}  {first.actual}{many}"
    elif first.kind == "renamed":
        [(now, _)] = fold([member.actual or "" for member in members], ellipsis=style.ellipsis)
        yield f"    {pattern}{many}"
        yield f"      is now {now}"
    elif first.kind == "config":
        yield from (f"    {printable(one.key)}  {one.expected} → {one.actual}" for one in members)
    elif first.kind == "prefix":
        yield f"    {first.count:,} keys: expected {first.expected}, actual {first.actual}"
    elif first.difference is None:  # a value, or an alias
        yield f"    {pattern}{many}"
        yield f"      expected {first.expected or 'nothing'}"
        yield f"      actual   {first.actual or 'nothing'}"
    else:
        yield f"    {pattern}  {first.expected}{many}"
        differences = [member.difference for member in members if member.difference is not None]
        yield from (f"      {line}" for line in _differences(differences))


def _differences(differences: Sequence[Difference]) -> Iterator[str]:
    from harness.comparison.difference import sufficient_atol  # there is one

    worst = max(differences, key=lambda d: (d.max_abs[0], d.max_abs[1]))
    if len(differences) == 1:
        yield worst.why
    if worst.verdict == "different" and math.isinf(worst.max_abs[1]) and worst.max_abs[0] == 0.0:
        return  # nothing is known but that the digest differs
    endless = math.isinf(worst.max_abs[0])
    size = "is undefined" if endless else _size(worst)
    rms = (
        ""
        if math.isnan(worst.rms) or endless
        else f", rms {'' if worst.is_exact else 'about '}{worst.rms:.1e}"
    )
    where = f", {worst.where}" if worst.where and len(differences) == 1 else ""
    yield f"{'worst: ' if len(differences) > 1 else ''}max |actual - expected| {size}{rms}{where}"
    if worst.verdict in ("different", "undecided") and not worst.tolerance.exact:
        least = (
            max(d.min_atol[0] for d in differences),
            max(d.min_atol[1] for d in differences),
        )
        if math.isinf(least[0]):
            yield "no tolerance accepts it"
        else:
            now = f"(now {worst.tolerance.atol:g}, rtol {worst.tolerance.rtol:g})"
            yield f"would pass at atol {_interval(sufficient_atol(least))} {now}"
    if len(differences) == 1 and worst.verdict != "close":
        yield from (_element(element) for element in worst.elements)
        if worst.num_beyond is not None and worst.num_beyond > len(worst.elements) > 0:
            more = worst.num_beyond - len(worst.elements)
            yield f"and {more:,} more element{'s' if more > 1 else ''}"
    if any(any(d.num_nonfinite) for d in differences):
        counts = [sum(d.num_nonfinite[side] for d in differences) for side in (0, 1)]
        yield f"NaN and infinities: {counts[0]:,} expected, {counts[1]:,} actual"


def _size(difference: Difference) -> str:
    """The greatest difference: a number, one that is about so much, or an interval."""
    from harness.comparison.difference import round_outward

    (low, high), about = difference.max_abs, difference.about
    error = 0.0 if about is None else max(high - about, about - low)
    if about is None or (low > 0.0 and error > about):  # an interval says more
        return _interval(round_outward((low, high)))
    return f"{about:.1e} ± {round_outward((0.0, error))[1]:.1e}"


def _interval(ends: tuple[float, float]) -> str:
    low, high = ends
    if low == high:
        return f"{low:.2e}"
    if math.isinf(high):
        return f"at least {low:.1e}" if low else "unknown"
    return f"up to {high:.1e}" if low == 0.0 else f"{low:.1e} to {high:.1e}"


def _element(element: Element) -> str:
    index = list(element.index)
    return f"{index}  expected {_value(element.expected)}  actual {_value(element.actual)}"


def _value(value: float | complex | int | bool) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
