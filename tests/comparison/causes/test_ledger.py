"""The findings while causes are looked for: what is replaced, and that the rest stays."""

from __future__ import annotations

from harness.comparison.cause import Cause
from harness.comparison.causes.ledger import Ledger
from harness.comparison.findings import Finding

MOVED = Cause(kind="moved", text="holds what a holds", proof="digest")
CONSTANT = Cause(kind="constant", text="all zero", proof="stats")


def test_causes_are_added_at_the_place_of_their_finding() -> None:
    first, second = Finding(kind="different", key="a"), Finding(kind="alias", key="a")
    ledger = Ledger([first, second])
    ledger.explain(first, MOVED)
    [explained, other] = ledger
    assert explained.causes == (MOVED,)
    assert other == second
    ledger.explain(explained, CONSTANT)
    assert [finding.causes for finding in ledger] == [(MOVED, CONSTANT), ()]


def test_what_was_missing_and_unexpected_becomes_renamed() -> None:
    kept = Finding(kind="missing", key="kept")
    ledger = Ledger(
        [
            kept,
            *(Finding(kind="missing", key=key) for key in "qk"),
            Finding(kind="unexpected", key="qk"),
        ]
    )
    ledger.rename(("q", "k"), ("qk",), (MOVED,))
    found = list(ledger)
    assert found[0] == kept
    assert [(f.kind, f.key, f.actual_key, f.causes) for f in found[1:]] == [
        ("renamed", "q", "qk", (MOVED,)),
        ("renamed", "k", "qk", (MOVED,)),
    ]
    assert ledger.of_keys(["q", "none", "qk"]) == [found[1]]


def test_settings_of_one_name_are_all_kept() -> None:
    settings = [Finding(kind="config", key="a", expected=text) for text in "xyz"]
    assert list(Ledger(settings)) == settings
