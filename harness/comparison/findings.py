"""A finding: one tensor that is not what was expected, and of which kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from harness.fingerprints.fingerprint import TensorFingerprint

if TYPE_CHECKING:
    from harness.comparison.difference import Difference


# Worst first: what explains all else, what stops a load, what computes something else, what is
# only noted.
FindingKind = Literal[
    "damaged",
    "missing",
    "unexpected",
    "prefix",
    "renamed",
    "shape",
    "dtype",
    "unwritten",
    "different",
    "alias",
    "requires_grad",
    "optimizer",
    "hyperparameter",
    "undecided",
    "close",
]
FINDING_KINDS: tuple[FindingKind, ...] = get_args(FindingKind)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as the golden says.

    `key` is the golden's key (the checkpoint's, for `unexpected`); `expected` and `actual` are the
    two sides in words; `actual_key` differs from `key` where it was renamed or mapped; `count` is
    the number of tensors that a `prefix` finding covers.
    """

    kind: FindingKind
    key: str
    expected: str | None = None
    actual: str | None = None
    actual_key: str | None = None
    count: int = 1
    difference: Difference | None = None

    @property
    def fails(self) -> bool:
        return self.kind not in ("close", "undecided")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first place in a computation that is not as recorded, in execution order.

    `diverging_module` is the submodule whose own code computed it; `agreeing` (identical or close),
    `undecided` and `diverging` are that submodule's inputs, by name. `num_undecided` of the
    `num_before` activations before it are undecided.
    """

    finding: Finding
    diverging_module: str
    agreeing: tuple[str, ...]
    diverging: tuple[str, ...]
    num_before: int
    undecided: tuple[str, ...] = ()
    num_undecided: int = 0


def describe(tensor: TensorFingerprint) -> str:
    """A tensor in words: dtype and shape."""
    return f"{tensor.dtype} {list(tensor.shape)}"
