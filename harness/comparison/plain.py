"""A comparison as plain data, for JSON, tables and notebooks, by type.

In: a `Comparison`. Out: Structs, whose JSON Schema `harness schema` prints and to which later
versions only add; one flat dict per tensor; a compact table as HTML. Intervals are [lower, upper].
Numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity"; complex ones are
[real, imaginary].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from harness.comparison.cause import Acceptable, Cause, CauseKind, Proof
from harness.comparison.difference import Difference, Verdict
from harness.comparison.findings import FINDING_KINDS, Divergence, Finding, FindingKind
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.text.folding import escaped, printable

if TYPE_CHECKING:
    from harness.comparison.comparison import Comparison

Number = float | Literal["NaN", "Infinity", "-Infinity"]
Side = Literal["expected", "actual"]
_SIDES: tuple[Side, Side] = ("expected", "actual")
_MAX_SHOWN = 20  # rows of a notebook's table


class StatsData(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of a tensor; min to l2 of its finite elements."""

    min: Number
    max: Number
    mean: Number
    std: Number
    l2: Number
    num_zero: int
    num_nan: int
    num_posinf: int
    num_neginf: int


Value = Number | bool | tuple[Number, Number]


class ElementData(msgspec.Struct, frozen=True, kw_only=True):
    """One element that differs."""

    index: tuple[int, ...]
    expected: Value
    actual: Value


class CauseData(msgspec.Struct, frozen=True, kw_only=True):
    """What happened, in words, and its facts: see `harness.comparison.cause.Cause`."""

    kind: CauseKind
    text: str
    proof: Proof
    accept: tuple[Acceptable, ...] | UnsetType = UNSET
    dtype: str | UnsetType = UNSET
    of: tuple[str, ...] | UnsetType = UNSET
    shape: tuple[int, ...] | UnsetType = UNSET
    axes: tuple[int, ...] | UnsetType = UNSET
    axis: int | UnsetType = UNSET
    rows: tuple[tuple[int, int], ...] | UnsetType = UNSET
    changed: tuple[int, ...] | UnsetType = UNSET
    order: tuple[int, ...] | UnsetType = UNSET
    num_added: int | UnsetType = UNSET
    num_heads: int | UnsetType = UNSET
    value: Number | UnsetType = UNSET
    factor: Number | UnsetType = UNSET
    factors: tuple[Number, ...] | UnsetType = UNSET
    offset: Number | UnsetType = UNSET
    correlation: Number | UnsetType = UNSET
    bound: Number | UnsetType = UNSET


class FindingData(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as recorded; from `why` on, only where values were compared."""

    kind: FindingKind
    key: str
    expected: str | None
    actual: str | None
    actual_key: str | UnsetType = UNSET
    count: int | UnsetType = UNSET
    causes: tuple[CauseData, ...]
    why: str | UnsetType = UNSET
    is_exact: bool | UnsetType = UNSET
    atol: float | UnsetType = UNSET
    rtol: float | UnsetType = UNSET
    numel: int | UnsetType = UNSET
    max_abs: tuple[Number, Number] | UnsetType = UNSET
    min_atol: tuple[Number, Number] | UnsetType = UNSET
    rms: Number | UnsetType = UNSET
    num_differing: int | UnsetType | None = UNSET
    num_beyond: int | UnsetType | None = UNSET
    where: str | UnsetType | None = UNSET
    strip: tuple[Number, ...] | UnsetType = UNSET
    elements: tuple[ElementData, ...] | UnsetType = UNSET
    num_nonfinite: dict[Side, int] | UnsetType = UNSET
    stats: dict[Side, StatsData | None] | UnsetType = UNSET
    chance: float | UnsetType = UNSET


class DivergenceData(msgspec.Struct, frozen=True, kw_only=True):
    """The first place in a computation that is not as recorded."""

    diverging_module: str
    key: str
    inputs_agreeing: tuple[str, ...]
    inputs_undecided: tuple[str, ...]
    inputs_diverging: tuple[str, ...]
    inputs_on_one_side: tuple[str, ...]
    num_before: int
    num_close: int
    num_undecided: int
    undecided_module: str | None


class NotCompared(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of the file that were not looked at, and entries that cannot be read as data."""

    sections: tuple[str, ...]
    entries: tuple[str, ...]


class StageData(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one golden."""

    stage: str
    verdict: Verdict
    num_identical: int
    num_ignored: int
    findings: tuple[FindingData, ...]
    notes: tuple[str, ...]
    not_compared: NotCompared
    first_divergence: DivergenceData | None


def stage_data(comparison: Comparison) -> StageData:
    """The comparison as a Struct, whose numbers are Python's."""
    return StageData(
        stage=comparison.stage,
        verdict=comparison.verdict,
        num_identical=comparison.num_identical,
        num_ignored=comparison.num_ignored,
        findings=tuple(map(_finding, comparison.findings)),
        notes=comparison.notes,
        not_compared=NotCompared(
            sections=tuple(name for name, _ in comparison.actual.others),
            entries=tuple(sorted({*comparison.expected.unread, *comparison.actual.unread})),
        ),
        first_divergence=None
        if comparison.divergence is None
        else _divergence(comparison.divergence),
    )


def _divergence(found: Divergence) -> DivergenceData:
    return DivergenceData(
        diverging_module=found.diverging_module,
        key=found.finding.key,
        inputs_agreeing=found.agreeing,
        inputs_undecided=found.undecided,
        inputs_diverging=found.diverging,
        inputs_on_one_side=found.alone,
        num_before=found.num_before,
        num_close=found.num_close,
        num_undecided=found.num_undecided,
        undecided_module=found.undecided_module,
    )


def _finding(finding: Finding) -> FindingData:
    difference = finding.difference
    return FindingData(
        kind=finding.kind,
        key=finding.key,
        expected=finding.expected,
        actual=finding.actual,
        actual_key=UNSET if finding.actual_key is None else finding.actual_key,
        count=finding.count if finding.kind == "prefix" else UNSET,
        causes=tuple(map(_cause, finding.causes)),
        **({} if difference is None else _measured(difference)),
    )


def _cause(cause: Cause) -> CauseData:
    facts: dict[str, Any] = dict(cause.facts)
    return CauseData(kind=cause.kind, text=cause.text, proof=cause.proof, **facts)


def _measured(difference: Difference) -> dict[str, Any]:
    return {
        **{
            name: getattr(difference, name)
            for name in FindingData.__struct_fields__
            if hasattr(difference, name)
        },
        "atol": difference.tolerance.atol,
        "rtol": difference.tolerance.rtol,
        "elements": tuple(
            ElementData(index=e.index, expected=_value(e.expected), actual=_value(e.actual))
            for e in difference.elements
        ),
        "num_nonfinite": dict(zip(_SIDES, difference.num_nonfinite, strict=True)),
        "stats": dict(zip(_SIDES, map(stats_data, difference.stats), strict=True)),
    }


def _value(value: float | complex) -> Value:
    return (value.real, value.imag) if isinstance(value, complex) else value


def stats_data(stats: object) -> StatsData | None:
    """Statistics as a Struct."""
    return None if stats is None else msgspec.convert(stats, StatsData, from_attributes=True)


def plain(value: Any) -> Any:
    """A Struct as what `json.dumps` takes, with numbers that JSON lacks as text."""
    return _finite(msgspec.to_builtins(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return number(value) if isinstance(value, float) else value


def number(value: float) -> Any:
    """A number as JSON can hold it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class Pairing(NamedTuple):
    """A tensor of either side, or a thing that is none, and what was found of it."""

    side: Literal["expected", "actual", "neither"]
    key: str
    is_ignored: bool
    expected: TensorFingerprint | None
    actual: TensorFingerprint | None
    findings: Sequence[Finding]

    @property
    def kind(self) -> str:
        """That of the worst finding; `identical` or `ignored` where there is none."""
        worst = min(self.findings, key=severity, default=None)
        return worst.kind if worst else "ignored" if self.is_ignored else "identical"


def severity(finding: Finding) -> int:
    """The place of a finding's kind, worst first."""
    return FINDING_KINDS.index(finding.kind)


def pairings(comparison: Comparison) -> Iterator[Pairing]:
    """Everything that was compared: the golden's tensors, then what only the actual side has."""
    expected, actual, policy = comparison.expected, comparison.actual, comparison.policy
    of_key: dict[tuple[str, str], list[Finding]] = {}
    for finding in comparison.findings:
        key = finding.key
        excess = finding.kind == "unexpected" or key not in expected.tensors
        of_key.setdefault(("actual" if excess else "expected", key), []).append(finding)
    for key, tensor in expected.tensors.items():
        findings = of_key.pop(("expected", key), [])
        name = policy.renamed(key)
        ignored = policy.ignores(key) or policy.ignores(name)
        other = actual.tensors.get(name) if ignored else _counterpart(tensor, actual, findings)
        yield Pairing("expected", key, ignored, tensor, other, findings)
    names = {policy.renamed(key) for key in expected.tensors}
    for key, tensor in actual.tensors.items():
        name = key.removeprefix(policy.strip_prefix)
        findings = of_key.pop(("actual", key), [])
        if findings or (name not in names and policy.ignores(name)):
            yield Pairing("actual", key, True, None, tensor, findings)
    for (_, key), findings in of_key.items():  # what is no tensor: prefixes, hyperparameters
        yield Pairing("neither", key, False, None, None, findings)


def _counterpart(
    tensor: TensorFingerprint, actual: Fingerprint, findings: Sequence[Finding]
) -> TensorFingerprint | None:
    """What the actual side has for a golden's tensor: one of the same type, if nothing is said."""
    for finding in findings:
        if finding.kind == "missing":
            return None
        if finding.difference is not None or finding.kind in ("dtype", "shape", "value"):
            return actual.tensors[finding.actual_key or finding.key]
    return tensor


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat dict per tensor, each with the same names; see `Comparison.rows`."""
    return [_flat(comparison.stage, pairing) for pairing in pairings(comparison)]


def _flat(stage: str, pairing: Pairing) -> dict[str, Any]:
    worst = min(pairing.findings, key=severity, default=None)
    measured = next((f.difference for f in pairing.findings if f.difference is not None), None)
    causes = [cause for finding in pairing.findings for cause in finding.causes]
    sides = {"expected": pairing.expected, "actual": pairing.actual}
    tensor = pairing.expected or pairing.actual
    max_abs, min_atol = (
        (measured.max_abs, measured.min_atol) if measured else ((math.nan,) * 2, (math.nan,) * 2)
    )
    return {
        "stage": stage,
        "key": pairing.key,
        "kind": pairing.kind,
        "actual_key": worst.actual_key if worst else None,
        **{f"{side}_dtype": t and t.dtype.name for side, t in sides.items()},
        **{f"{side}_shape": t and t.shape for side, t in sides.items()},
        "numel": 0 if tensor is None else tensor.numel,
        "nbytes": 0 if tensor is None else tensor.nbytes,
        "expected": worst.expected if worst else None,
        "actual": worst.actual if worst else None,
        "cause": causes[0].text if causes else None,
        "causes": [plain(_cause(cause)) for cause in causes],
        "why": measured.why if measured else None,
        "is_exact": measured.is_exact if measured else None,
        "atol": measured.tolerance.atol if measured else math.nan,
        "rtol": measured.tolerance.rtol if measured else math.nan,
        "max_abs_lower": max_abs[0],
        "max_abs_upper": max_abs[1],
        "min_atol_lower": min_atol[0],
        "min_atol_upper": min_atol[1],
        "rms": measured.rms if measured else math.nan,
        "num_differing": measured.num_differing if measured else None,
        "num_beyond": measured.num_beyond if measured else None,
        "chance": measured.chance if measured else 0.0,
    }


def as_html(comparison: Comparison, headline: str) -> str:
    """A compact table for notebooks: the headline, and the worst findings."""
    shown = comparison.findings[:_MAX_SHOWN]
    cells = [
        (
            finding.kind,
            printable(finding.key),
            escaped(finding.gist),
        )
        for finding in shown
    ]
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in cells
    )
    more = len(comparison.findings) - len(shown)
    rest = f"<p>and {more:,} more: str(comparison) has them all</p>" if more else ""
    table = f"<table><tr><th>kind</th><th>key</th><th>what</th></tr>{lines}</table>"
    return f"<div><p><b>{escape(headline)}</b></p>{table if cells else ''}{rest}</div>"
