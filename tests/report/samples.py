"""Results made by hand, and the names that reports must survive."""

from __future__ import annotations

from typing import Any

from harness.comparison.comparison import Comparison
from harness.comparison.findings import Divergence, Finding
from harness.comparison.policy import Policy
from harness.fingerprints.fingerprint import Fingerprint
from harness.report.outcome import Command, Outcome, Result

# What markup, terminals or XML could take for their own.
HOSTILE = [
    "pipe|in.the.middle",
    "`backticks` ```three```",
    "[a link](https://example.org) ![x](y)",
    "<script>alert(1)</script>",
    "</code></details> &amp; ]]>",
    "new\nline\n\n```\n# heading",
    "\x1b[31mred\x00\x07\x7f",
    "lone \ud800 surrogate \ufffe \uffff",
    "back\\slash\\|",
    " spaces ",
    "größe.ключ.鍵",
    "*bold* _emphasis_ ~~gone~~ @user #1 $x$",
]


def side(name: str) -> Fingerprint:
    return Fingerprint(name=name, container="nemo", section="", tensors={})


def missing(key: str) -> Finding:
    return Finding(kind="missing", key=key, expected="float32 [2, 3]")


GOLDEN = "golden/nest.safetensors"


def comparison(*findings: Finding, name: str = GOLDEN, **rest: Any) -> Comparison:
    return Comparison(
        expected=side(name),
        actual=side("models/nest.nemo"),
        policy=Policy(),
        findings=findings,
        **{"num_identical": 3, **rest},
    )


def diverged(diverging_module: str) -> Comparison:
    """A stage of outputs in which one module diverges."""
    finding = Finding(kind="shape", key=f"{diverging_module}:out", expected="[2]", actual="[3]")
    divergence = Divergence(
        finding=finding,
        diverging_module=diverging_module,
        agreeing=("0",),
        diverging=(),
        num_before=7,
    )
    return comparison(finding, stage="outputs", divergence=divergence)


def outcome(*stages: Comparison, **rest: Any) -> Outcome:
    return Outcome(**{"expected": GOLDEN, "actual": "models/nest.nemo", **rest}, stages=stages)


def result(*outcomes: Outcome, command: Command = "verify") -> Result:
    return Result(command=command, outcomes=outcomes)
