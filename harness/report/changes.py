"""How much each tensor of a fine-tuned model changed, and which did not.

In: a `Comparison` with the stats of both sides. Out: a `Change` per tensor that differs, the
greatest relative change first, and lines of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from harness.comparison.comparison import Comparison
from harness.comparison.findings import Finding
from harness.text.fitting import PLAIN, Style
from harness.text.folding import fold_names, printable

_MAX_PATTERNS = 8


@dataclass(frozen=True, kw_only=True)
class Change:
    """One tensor: ‖Δ‖/‖W‖, the cosine of both sides, the share that is unchanged, and max |Δ|.

    NaN is what is not known: of a golden, the share; the others are estimates then.
    """

    key: str
    relative: float
    cosine: float
    share_unchanged: float
    max_abs: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The four numbers as a person reads them; a dash is what is not known."""
        share = "–" if math.isnan(self.share_unchanged) else f"{self.share_unchanged:.1%}"
        cosine = "–" if math.isnan(self.cosine) else f"{self.cosine:.6f}"
        return f"{self.relative:.2e}", cosine, share, f"{self.max_abs:.2e}"


def changes_of(comparison: Comparison) -> list[Change]:
    """The tensors that differ in value, the most changed first."""
    found = [change for f in comparison.findings if (change := _change(f)) is not None]
    return sorted(found, key=lambda c: -math.inf if math.isnan(c.relative) else -c.relative)


def _change(finding: Finding) -> Change | None:
    difference = finding.difference
    if difference is None or not difference.numel:
        return None
    away = difference.rms * math.sqrt(difference.numel)
    before, after = (math.nan if stats is None else stats.l2 for stats in difference.stats)
    product = before * after
    both = before * before + after * after - away * away
    cosine = both / (2 * product) if product else math.nan
    share = math.nan
    if difference.num_differing is not None:
        share = 1 - difference.num_differing / difference.numel
    return Change(
        key=finding.key,
        relative=away / before if before else math.inf,
        cosine=max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else math.nan,
        share_unchanged=share,
        max_abs=difference.max_abs[0],
    )


def unchanged_of(comparison: Comparison) -> list[str]:
    """The keys of the expected side that are there with the same bytes."""
    gone = {finding.key for finding in comparison.findings if finding.kind != "unchanged"}
    policy = comparison.policy
    return [
        key
        for key in comparison.expected.tensors
        if key not in gone and not policy.ignores(key) and not policy.ignores(policy.renamed(key))
    ]


def changes_lines(comparison: Comparison) -> Iterator[str]:
    """The table as text; nothing where no tensor changed."""
    changes = changes_of(comparison)
    if changes:
        yield f"  change of {len(changes):,} tensors, the greatest first"
        yield "    ‖Δ‖/‖W‖     cosine  unchanged     max |Δ|  tensor"
    for change in changes:
        cells = (
            f"{cell:>{width}}" for cell, width in zip(change.cells, (8, 9, 9, 10), strict=True)
        )
        yield f"    {'  '.join(cells)}  {printable(change.key)}"


def unchanged_lines(
    comparison: Comparison, style: Style = PLAIN, *, lists_all: bool = False
) -> Iterator[str]:
    """What did not change, folded or one by one."""
    unchanged, total = unchanged_of(comparison), len(comparison.expected.tensors)
    yield f"  {len(unchanged):,} of {total:,} tensors unchanged{':' if unchanged else ''}"
    if lists_all:
        yield from (f"    {printable(key)}" for key in unchanged)
        return
    folded = fold_names(unchanged, ellipsis=style.ellipsis)
    for pattern, members in folded[:_MAX_PATTERNS]:
        yield f"    {pattern}" + (f"  ({len(members):,} tensors)" if len(members) > 1 else "")
    more = sum(len(members) for _, members in folded[_MAX_PATTERNS:])
    if more:
        yield f"    {style.ellipsis} and {more:,} more (--unchanged lists all)"
