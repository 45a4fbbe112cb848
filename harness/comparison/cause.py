"""A cause: what happened to a tensor, in words and as facts, and how that is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

GOLDEN = "the golden"  # what texts call the expected side
# The best explanation first: what keeps every value, what keeps most, what keeps none.
CauseKind = Literal[
    "moved",
    "widened",
    "reshaped",
    "transposed",
    "joined",
    "split",
    "stacked",
    "rounded",
    "rows",
    "reordered",
    "weight_norm",
    "counter",
    "constant",
    "scaled",
    "shifted",
    "sum",
    "unrelated",
]

Proof = Literal["digest", "hash", "values", "stats", "sketch", "names"]
"""What proves it: equal BLAKE3 digests, equal 128-bit hashes, all values, exact statistics, or the
bound of the sketch, which fails with chance 1e-12 per block; names and shapes alone where nothing
was loaded, and values say nothing."""

Acceptable = Literal[
    "renamed", "moved", "reshaped", "transposed", "joined", "order", "rows", "rounded"
]
ACCEPTABLE: Mapping[Acceptable, str] = {
    "renamed": "equal weights under another key",
    "moved": "tensors that exchanged their keys: two of them, or more in a circle",
    "reshaped": "the same bytes in another shape",
    "transposed": "the same values with permuted dimensions",
    "joined": "tensors joined, stacked or split, all values the same",
    "order": "the same values in another order",
    "rows": "rows or columns added, all of the golden's kept",
    "rounded": "the golden's values rounded to a narrower dtype, or widened",
}
"""The words of `--accept`, and what each lets pass."""

CASTS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
"""The dtypes of `--cast`: those to which a rounding is looked for."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One thing that happened, proved.

    `of` are the keys that it came from; `axes` are dims in their new order, `axis` the dim that
    tensors are joined along; `rows` are half-open ranges of a dim that are the golden's; `changed`
    are indices that are not. `bound` is the greatest relative distance that the proof leaves open.
    `accept` are the words of `--accept` that let it pass, () where values were lost.
    """

    kind: CauseKind
    text: str
    proof: Proof
    accept: tuple[Acceptable, ...] = ()
    dtype: str | None = None
    of: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None
    axis: int | None = None
    rows: tuple[tuple[int, int], ...] | None = None
    changed: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    num_added: int | None = None
    num_heads: int | None = None
    value: float | None = None
    factor: float | None = None
    factors: tuple[float, ...] | None = None
    offset: float | None = None
    correlation: float | None = None
    bound: float | None = None

    def of_side(self, name: str) -> Cause:
        """The same, where the expected side is no golden."""
        return self if name == GOLDEN else replace(self, text=self.text.replace(GOLDEN, name))

    @property
    def facts(self) -> dict[str, object]:
        """What is known beyond the words, by name."""
        named = {one.name: getattr(self, one.name) for one in fields(self)[3:]}
        return {name: value for name, value in named.items() if value not in (None, ())}
