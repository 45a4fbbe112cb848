"""A result as one HTML page that needs nothing else: no network, no other file.

In: a `Result`. Out: the page's text, the same for the same result. What came out is written here,
by a template that escapes everything; the map and the table are built in the browser from rows
that the page carries as JSON. The page's own Content-Security-Policy forbids every request, and
all scripts and styles but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from harness.comparison.comparison import Comparison, chance_note, nan_note
from harness.comparison.findings import FINDING_KINDS
from harness.comparison.words import HEADINGS
from harness.report.changes import Change, changes_of, unchanged_lines
from harness.report.outcome import Outcome, Result, worst_stage
from harness.report.rows import Tables
from harness.text.fitting import Style
from harness.text.folding import printable
from harness.version import __version__

# A page that opens at once and can be mailed: 2 MB with all that is not data.
_MAX_DATA_NBYTES = 1_850_000
# Of a table that is there to be read, so many rows.
_MAX_CHANGES = 500
_STYLES = ("page.css", "figures.css")
# In this order they are one program.
_SCRIPTS = tuple(
    f"{name}.js" for name in ("data", "roving", "map", "order", "table", "detail", "page")
)

_WORDS = {
    "error": "Could not be checked",
    "different": "Different",
    "undecided": "Undecided",
    "accepted": "Accepted",
    "close": "Close",
    "identical": "Identical",
}
_severity = [*_WORDS].index  # the worst first
_CODES = {
    0: "everything is identical or close",
    1: "something differs",
    2: "could not be checked",
    3: "nothing differs, but something is undecided",
}
# How a kind is drawn; all others are of the structure.
_FAMILIES = {
    "identical": "identical",
    "close": "close",
    "undecided": "undecided",
    "different": "different",
    "unwritten": "different",
    "ignored": "ignored",
    "error": "error",
    "accepted": "identical",
}
_ABOUT = {
    "file": "The tensors of the checkpoint.",
    "load": "The state of the model after it has loaded the checkpoint.",
    "reload": "The same after the model has saved itself, and another has loaded that.",
    "outputs": "What every submodule is given and gives on fixed inputs, as it happens.",
}
_COMMAND = re.compile(r"(?s)(?:(.*?:)\s+)?(harness .*)")


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What is shown of a stage; `index` is that of its rows in the tables."""

    index: int
    comparison: Comparison
    tally: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]

    @property
    def about(self) -> str:
        return _ABOUT.get(self.comparison.stage, "")

    @property
    def things(self) -> str:
        return "places" if self.comparison.stage == "outputs" else "tensors"

    @property
    def tolerance(self) -> str:
        policy = self.comparison.policy
        if policy.exact:
            return "exact: the same bytes"
        more = ", others for some names" if policy.tolerances else ""
        return f"atol {policy.general.atol:g}, rtol {policy.general.rtol:g}{more}"


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What is shown of an outcome."""

    outcome: Outcome
    stages: tuple[_Stage, ...]

    @property
    def verdict(self) -> str:
        found = worst_stage(self.outcome.stages)
        if self.outcome.error is not None:
            return "error"
        if found is None:
            return "identical"
        if not found.ok:
            return found.verdict if self.outcome.exit_code else "accepted"
        passes = {stage.verdict for stage in self.outcome.stages}
        return "close" if "close" in passes else "identical"


def render(result: Result) -> str:
    """The whole report as a file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    tables = Tables()
    outcomes = [
        _Shown(outcome=outcome, stages=tuple(_stage(stage, tables) for stage in outcome.stages))
        for outcome in result.outcomes
    ]
    stages = [stage for outcome in outcomes for stage in outcome.stages]
    worst = min(stages, key=lambda stage: _severity(stage.comparison.verdict), default=None)
    changes, unchanged = _changes(result)
    style, script = _read(_STYLES), _read(_SCRIPTS)
    environment = Environment(
        loader=PackageLoader("harness.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "step": _step, "family": _family}
    page = environment.get_template("page.html.j2").render(
        command=result.command,
        exit_code=result.exit_code,
        meaning=_CODES[result.exit_code],
        verdict=min((o.verdict for o in outcomes), key=_severity, default="identical"),
        words=_WORDS,
        outcomes=outcomes,
        counts=Counter(outcome.verdict for outcome in outcomes),
        stages=stages,
        worst=worst,
        changes=changes[:_MAX_CHANGES],
        num_changes=len(changes),
        unchanged=unchanged,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        policy=_security_policy(style, script),
        data=Markup(_json(_data(tables, worst))),
    )
    # A name from a file may hold what UTF-8 lacks.
    return page.encode("utf-8", "backslashreplace").decode()


def _changes(result: Result) -> tuple[list[Change], list[str]]:
    """How much the tensors of two checkpoints differ, and which do not."""
    found = [stage for outcome in result.outcomes for stage in outcome.stages]
    if result.command != "diff" or len(found) != 1:
        return [], []
    lines = unchanged_lines(found[0], Style(unicode=True))
    return changes_of(found[0]), [line.strip() for line in lines]


def _stage(comparison: Comparison, tables: Tables) -> _Stage:
    counts = [("identical", comparison.num_identical)]
    counts += [(kind, comparison.count(kind)) for kind in reversed(FINDING_KINDS)]
    counts.append(("ignored", comparison.num_ignored))
    notes = [*comparison.notes, nan_note(comparison), chance_note(comparison)]
    return _Stage(
        index=tables.add(comparison),
        comparison=comparison,
        tally=tuple((kind, count) for kind, count in counts if count),
        notes=tuple(note for note in notes if note),
    )


def _family(kind: str) -> str:
    """How a kind, or a verdict, is drawn."""
    return _FAMILIES.get(kind, "structure")


def _read(names: Sequence[str]) -> str:
    folder = files("harness.report") / "templates"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


def _security_policy(style: str, script: str) -> str:
    """Nothing from anywhere; the page's own style and script by their digests."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _json(data: Any) -> str:
    """JSON that may stand in a script element, whatever its strings hold."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _data(tables: Tables, first: _Stage | None) -> dict[str, Any]:
    kinds = (*FINDING_KINDS, "identical", "ignored")
    return {
        **tables.as_json(_MAX_DATA_NBYTES),
        "kinds": FINDING_KINDS,
        "about": {k: words.partition(": ")[2] or f"another {k}" for k, words in HEADINGS.items()},
        "families": {kind: _family(kind) for kind in kinds},
        "first": 0 if first is None else first.index,
    }


def _step(line: str) -> tuple[str, str]:
    """Part a next step into what it is for, and the command to copy, where it has one."""
    found = _COMMAND.fullmatch(line)
    return (found[1] or "", found[2]) if found else (line, "")
