"""Every tensor of every stage as one row of plain data, for the map and the table of a page.

In: comparisons. Out: `Tables`, whose rows are tuples of what JSON can hold, in the order of the
state dict (of the outputs: of execution). So that thousands of tensors stay small, rows that
several stages share are there once, words that rows share are numbers, numbers have the digits
that a person reads, and a strip is a string. What takes most is apart, as `Extra`, so that it can
be left out where it is too much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from harness.comparison.comparison import Comparison
from harness.comparison.difference import Difference, Element, round_outward, sufficient_atol
from harness.comparison.findings import FINDING_KINDS, Finding, describe
from harness.comparison.plain import Pairing, number, pairings
from harness.comparison.policy import Tolerance
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.fingerprints.stats import Stats
from harness.text.folding import escaped, printable

Json = Any
_DIGITS, _STATS_DIGITS = 3, 6
# Of a strip: 0 and what is not finite, then tenths of a decade below the strip's greatest value.
_ZERO, _ENDLESS = ".", "!"
_TENTHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SIGNS = np.frombuffer(_TENTHS.encode(), "|u1")
STRIP_SIGNS = {"zero": _ZERO, "endless": _ENDLESS, "tenths": _TENTHS}
STATS = tuple(column.name for column in fields(Stats))


class Row(NamedTuple):
    """One tensor, place, or other thing that was compared; `kind` is that of its worst finding.

    `expected` and `actual` are dtype and shape as numbers of words, None where that side has no
    such tensor.
    """

    key: str
    kind: str
    expected: int | None
    actual: int | None
    nbytes: int
    findings: tuple[Told, ...]


class Told(NamedTuple):
    """A finding; `expected` and `actual` only where they say more than dtype and shape."""

    kind: str
    expected: str | None
    actual: str | None
    actual_key: str | None
    causes: tuple[str, ...]
    difference: Measured | None


class Measured(NamedTuple):
    """A difference; `ratio` is its rms to what the tolerance allows of an average element."""

    why: str
    is_exact: bool
    tolerance: int
    numel: int
    max_abs: tuple[Json, ...]
    min_atol: tuple[Json, ...]
    rms: Json
    ratio: Json
    num_differing: int | None
    num_beyond: int | None
    chance: Json


class Extra(NamedTuple):
    """What more is known of a row.

    `strip` is its greatest value and one sign per range, `elements` are (index, expected, actual,
    actual - expected), stats are in the order of `STATS`.
    """

    where: str | None = None
    strip: tuple[Json, ...] | None = None
    elements: tuple[tuple[str, ...], ...] = ()
    expected_stats: tuple[Json, ...] | None = None
    actual_stats: tuple[Json, ...] | None = None


COLUMNS = {
    "row": Row._fields,
    "finding": Told._fields,
    "difference": Measured._fields,
    "extra": Extra._fields,
    "stats": STATS,
}


@dataclass(frozen=True)
class Tables:
    """The rows of all stages, each once, and for every stage the numbers of its rows."""

    rows: dict[tuple[Row, Extra], int] = field(default_factory=dict)
    stages: list[Json] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)
    tolerances: dict[Tolerance, int] = field(default_factory=dict)

    def add(self, comparison: Comparison) -> int:
        """Add a stage; returns its number."""
        numbers: list[int] = []
        places: dict[str, int] = {}
        for pairing in pairings(comparison):
            places.setdefault(pairing.key, len(numbers))
            numbers.append(self.rows.setdefault(self._row(pairing), len(self.rows)))
        diverges, inputs = comparison.divergence, []
        if diverges is not None:
            names = (*diverges.agreeing, *diverges.undecided, *diverges.diverging)
            keys = [f"{diverges.diverging_module}:in.{name}" for name in names]
            inputs = [places[key] for key in keys if key in places]
        self.stages.append(
            {
                "stage": comparison.stage,
                "sides": [_side(comparison.expected), _side(comparison.actual)],
                "rows": numbers,
                "diverges": None if diverges is None else places[diverges.finding.key],
                "inputs": inputs,
            }
        )
        return len(self.stages) - 1

    def as_json(self, max_nbytes: int) -> dict[str, Json]:
        """Everything; of the extras as many as there is room for, of the worst rows first."""
        rows = [row for row, _ in self.rows]
        found = {
            "columns": COLUMNS,
            "strip": STRIP_SIGNS,
            "words": [*self.words],
            "tolerances": [(t.atol, t.rtol, t.exact) for t in self.tolerances],
            "rows": rows,
            "stages": self.stages,
        }
        left = max_nbytes - len(json.dumps(found, separators=(",", ":")))
        extras: list[Extra | None] = [None] * len(rows)
        known = [extra for _, extra in self.rows]
        for place in sorted(range(len(rows)), key=lambda place: _rank(rows[place])):
            left -= len(json.dumps(known[place], separators=(",", ":")))
            if left < 0:
                break
            extras[place] = known[place]
        return {**found, "extras": extras}

    def _row(self, pairing: Pairing) -> tuple[Row, Extra]:
        expected, actual, findings = pairing.expected, pairing.actual, pairing.findings
        tensor = expected or actual
        row = Row(
            key=printable(pairing.key) or '""',
            kind=pairing.kind,
            expected=self._type(expected),
            actual=self._type(actual),
            nbytes=0 if tensor is None else tensor.nbytes,
            findings=tuple(self._told(finding, expected) for finding in findings),
        )
        return row, _extra(expected, actual, findings)

    def _type(self, tensor: TensorFingerprint | None) -> int | None:
        return None if tensor is None else self.words.setdefault(describe(tensor), len(self.words))

    def _told(self, finding: Finding, expected: TensorFingerprint | None) -> Told:
        said = finding.difference is None
        said &= finding.kind not in ("missing", "unexpected", "renamed", "dtype", "shape", "value")
        return Told(
            kind=finding.kind,
            expected=finding.expected if said else None,
            actual=finding.actual if said else None,
            actual_key=None if finding.actual_key is None else printable(finding.actual_key),
            difference=None
            if finding.difference is None
            else self._measured(finding.difference, None if expected is None else expected.stats),
            causes=tuple(escaped(cause.text) for cause in finding.causes),
        )

    def _measured(self, difference: Difference, expected: Stats | None) -> Measured:
        return Measured(
            why=difference.why,
            is_exact=difference.is_exact,
            tolerance=self.tolerances.setdefault(difference.tolerance, len(self.tolerances)),
            numel=difference.numel,
            max_abs=tuple(_short(end) for end in round_outward(difference.max_abs)),
            min_atol=tuple(_short(end) for end in sufficient_atol(difference.min_atol)),
            rms=_short(difference.rms),
            ratio=_short(_ratio(difference, expected or difference.stats[0])),
            num_differing=difference.num_differing,
            num_beyond=difference.num_beyond,
            chance=_short(difference.chance),
        )


def _side(side: Fingerprint) -> Json:
    return {
        "name": printable(side.name),
        "container": side.container,
        "section": printable(side.section),
    }


def _rank(row: Row) -> tuple[int, float]:
    """The worst kind first, within it what is farthest off."""
    ratios = (float(f.difference.ratio) for f in row.findings if f.difference is not None)
    ratio = max((r for r in ratios if not math.isnan(r)), default=0.0)
    return min((FINDING_KINDS.index(f.kind) for f in row.findings), default=99), -ratio


def _extra(
    expected: TensorFingerprint | None,
    actual: TensorFingerprint | None,
    findings: Sequence[Finding],
) -> Extra:
    before = None if expected is None else expected.stats
    difference = next((f.difference for f in findings if f.difference is not None), None)
    if difference is None:
        # Where nothing was measured, one side may still be known.
        after = None if actual is None or actual is expected else actual.stats
        return Extra(expected_stats=_stats(before), actual_stats=_stats(after))
    return Extra(
        where=difference.where,
        strip=_strip(difference.strip),
        elements=tuple(_element(element) for element in difference.elements),
        expected_stats=_stats(before or difference.stats[0]),
        actual_stats=_stats(difference.stats[1]),
    )


def _ratio(difference: Difference, expected: Stats | None) -> float:
    if math.isinf(difference.max_abs[0]):  # a NaN or an infinity, which no rms counts
        return math.inf
    tolerance = difference.tolerance
    allowed = 0.0 if tolerance.exact else tolerance.atol
    if expected is not None and difference.numel and not tolerance.exact:
        allowed += tolerance.rtol * expected.l2 / math.sqrt(difference.numel)
    if not difference.rms or math.isnan(difference.rms):
        return difference.rms
    return difference.rms / allowed if allowed else math.inf


def _short(value: float, digits: int = _DIGITS) -> Json:
    """A number with as many digits as are shown."""
    return number(float(f"{value:.{digits}g}"))


def _stats(stats: Stats | None) -> tuple[Json, ...] | None:
    if stats is None:
        return None
    values = (getattr(stats, name) for name in STATS)
    return tuple(v if isinstance(v, int) else _short(v, _STATS_DIGITS) for v in values)


def _strip(values: Sequence[float]) -> tuple[Json, ...] | None:
    if not values:
        return None
    runs = np.array(values)
    top = float(runs[np.isfinite(runs)].max(initial=0.0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        tenths = np.nan_to_num(np.rint(10 * np.log10(top / runs)))
    signs = _SIGNS[np.clip(tenths, 0, len(_SIGNS) - 1).astype(int)]
    signs[runs == 0] = ord(_ZERO)
    signs[~np.isfinite(runs)] = ord(_ENDLESS)
    return _short(top), signs.tobytes().decode()


def _element(element: Element) -> tuple[str, ...]:
    one, other = element.expected, element.actual
    return (
        ", ".join(map(str, element.index)),
        *(f"{v:.9g}" if isinstance(v, float) else str(v) for v in (one, other)),
        f"{other - one:.3g}",
    )
