"""A result as JUnit XML, which every CI shows beside the tests of the code.

One testsuite per golden (or pair of checkpoints), one testcase per stage: few and of the same names
in every run, so that a CI can tell what is new, and as small for thousands of tensors as for ten.
What differs is a failure of the type `different`, what is undecided a failure of the type
`undecided`, what could not be told an error of the kind's type; each with the text report as its
body. Nothing is ever skipped. There are no times: the same result gives the same bytes. What XML
cannot hold never gets here: names are escaped as for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from harness.comparison.comparison import Comparison, counts_of
from harness.comparison.comparison import render as render_text
from harness.report.outcome import Outcome, Result, worst_stage
from harness.text.folding import error_lines, escaped, printable


def render(result: Result) -> str:
    """The whole report as a file."""
    root = Element("testsuites", name=f"harness {result.command}")
    for outcome in result.outcomes:
        _add_suite(root, result, outcome)
    cases = root.findall("testsuite/testcase")
    root.attrib |= _counts(cases)
    indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(root, encoding="unicode")}\n'


def _add_suite(root: Element, result: Result, outcome: Outcome) -> None:
    title = escaped(result.title(outcome))
    suite = SubElement(root, "testsuite", name=title)
    properties = SubElement(suite, "properties")
    for name, value in _properties(outcome):
        SubElement(properties, "property", name=name, value=escaped(value))
    for stage in outcome.stages:
        case = _add_case(suite, result, title, stage.stage)
        if not stage.ok and not outcome.accepts(stage):
            diverged = stage.divergence
            first = (
                f"first: {printable(stage.findings[0].key)}"
                if diverged is None
                else f"first diverges: {printable(diverged.place)}"
            )
            message = f"{counts_of(stage)}; {first}"
            problem = SubElement(case, "failure", type=stage.verdict, message=message)
            problem.text = _body(stage, outcome)
        elif stage.verdict != "identical":
            SubElement(case, "system-out").text = _body(stage, outcome)
    if outcome.error is not None:
        case = _add_case(suite, result, title, _where_it_ended(result, outcome))
        message = escaped(str(outcome.error))
        error = SubElement(case, "error", type=outcome.error.kind, message=message)
        error.text = "\n" + "".join(f"{line}\n" for line in error_lines(outcome.error))
    suite.attrib |= _counts(suite.findall("testcase"))


def _add_case(suite: Element, result: Result, title: str, stage: str) -> Element:
    # Some show the name of a case alone, some take all before the last dot of a class for a folder.
    return SubElement(
        suite, "testcase", classname=f"harness.{result.command}", name=f"{title} {stage}"
    )


def _counts(cases: list[Element]) -> dict[str, str]:
    return {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
    }


def _properties(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "expected", outcome.expected or ""
    yield "actual", outcome.actual or ""
    for stage in outcome.stages:
        yield f"{stage.stage} verdict", stage.verdict
    if outcome.updated is not None:
        yield "updated", str(outcome.updated).lower()


def _body(stage: Comparison, outcome: Outcome) -> str:
    steps = outcome.next_steps if stage is worst_stage(outcome.stages) else ()
    parts = [render_text(stage), *(f"  {escaped(step)}" for step in steps)]
    return "\n" + "\n\n".join(parts) + "\n"


def _where_it_ended(result: Result, outcome: Outcome) -> str:
    if not outcome.stages:
        return "load" if result.command == "roundtrip" else "file"
    return f"after {outcome.stages[-1].stage}"
