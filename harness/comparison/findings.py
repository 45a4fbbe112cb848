"""A finding: one tensor that is not what was expected, and of which kind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from harness.comparison.cause import Cause
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.text.folding import printable, shortened

if TYPE_CHECKING:
    from harness.comparison.difference import Difference


_MAX_TEXT = 200
_DIGEST = re.compile(r"(?<=, digest )([0-9a-f]{16})[0-9a-f]{48}(?=>)")
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
    "value",
    "unwritten",
    "different",
    "unchanged",
    "alias",
    "requires_grad",
    "optimizer",
    "hyperparameter",
    "config",
    "undecided",
    "close",
    "accepted",
]
FINDING_KINDS: tuple[FindingKind, ...] = get_args(FindingKind)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as the golden says.

    `key` is the golden's key (the checkpoint's, for `unexpected`); `expected` and `actual` are the
    two sides in words; `actual_key` differs from `key` where it was renamed or mapped; `count` is
    the number of tensors that a `prefix` finding covers; `causes` say what happened, the best
    first, where that is proved. A note alone fails nothing.
    """

    kind: FindingKind
    key: str
    expected: str | None = None
    actual: str | None = None
    actual_key: str | None = None
    count: int = 1
    difference: Difference | None = None
    causes: tuple[Cause, ...] = ()
    is_note: bool = False

    def __repr__(self) -> str:
        return f"<Finding {self.kind}: {shortened(self.key, 60)}: {printable(self.gist[:80])[:90]}>"

    @property
    def gist(self) -> str:
        """What happened, where that is known, or how far both sides are from each other."""
        if self.causes and self.kind != "renamed":
            return self.causes[0].text
        if self.difference is not None:
            return self.difference.why
        sides = (self.expected, self.actual_key or self.actual)
        return " → ".join(side for side in sides if side is not None)

    @property
    def fails(self) -> bool:
        return not self.is_note and self.kind not in ("close", "undecided", "accepted")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first place in a computation that is not as recorded, in execution order.

    `diverging_module` is the submodule whose own code computed it; `agreeing` (identical or close),
    `undecided`, `diverging` and `alone` (on one side only) are that submodule's inputs, by name. Of
    the `num_before` activations before it, `num_close` are close and `num_undecided` undecided: the
    first of these is of `undecided_module`, where it may begin.
    """

    finding: Finding
    diverging_module: str
    agreeing: tuple[str, ...]
    diverging: tuple[str, ...]
    num_before: int
    undecided: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    num_close: int = 0
    num_undecided: int = 0
    undecided_module: str | None = None

    @property
    def place(self) -> str:
        """The module, and which one it may be as well."""
        if self.undecided_module is None:
            return self.diverging_module
        return f"{self.diverging_module}, or {self.undecided_module} before it, which is undecided"


def describe(tensor: TensorFingerprint) -> str:
    """A tensor in words: dtype and shape; a value as its text."""
    if not tensor.dtype.is_value:
        return f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.values is None:
        return f"a value with the digest {(tensor.digest or b'').hex()[:16]}"
    text = _DIGEST.sub(r"\1", tensor.values.decode("utf-8", "replace"))
    return (
        text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}… ({len(text):,} characters)"
    )
