"""JUnit XML: valid, read back by a parser that others use, and never a pass that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import xmlschema
from hypothesis import given
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml, TestSuite

from harness.comparison.comparison import render as render_text
from harness.comparison.findings import Finding
from harness.errors import GoldenError
from harness.report.junit import render
from harness.report.outcome import Result
from harness.text.folding import escaped, printable
from tests.report.samples import GOLDEN, HOSTILE, comparison, diverged, missing, outcome, result

SCHEMA = xmlschema.XMLSchema(Path(__file__).with_name("junit.xsd"))


def suites_of(found: Result) -> list[TestSuite]:
    text = render(found)
    SCHEMA.validate(text)
    return list(JUnitXml.fromstring(text.encode()))


def counts(suite: Any) -> tuple[int, int, int, int]:
    return suite.tests, suite.failures, suite.errors, suite.skipped


def test_one_suite_per_golden_and_one_case_per_stage() -> None:
    passed = outcome(*(comparison(stage=stage) for stage in ("file", "load", "reload")))
    failed = outcome(comparison(missing("a.weight")), expected="golden/other.safetensors")
    suites = suites_of(result(passed, failed))
    assert [(suite.name, *counts(suite)) for suite in suites] == [
        (GOLDEN, 3, 0, 0, 0),
        ("golden/other.safetensors", 1, 1, 0, 0),
    ]
    assert [(case.classname, case.name, case.result) for case in suites[0]] == [
        ("harness.verify", f"{GOLDEN} {stage}", []) for stage in ("file", "load", "reload")
    ]
    assert {p.name: p.value for p in suites[0].properties()} == {
        "expected": GOLDEN,
        "actual": "models/nest.nemo",
        "file verdict": "identical",
        "load verdict": "identical",
        "reload verdict": "identical",
    }


def test_a_failure_holds_the_text_report_and_the_next_step() -> None:
    found = comparison(missing("a.weight"), missing("b.weight"))
    [suite] = suites_of(result(outcome(found, next_steps=("if meant:  harness verify x",))))
    [case] = suite
    [problem] = case.result
    assert isinstance(problem, Failure)
    assert problem.type == "different"
    assert problem.message == "3 identical, 2 missing; first: a.weight"
    assert problem.text == f"\n{render_text(found)}\n\n  if meant:  harness verify x\n"


def test_what_departs_first_is_in_the_message() -> None:
    [suite] = suites_of(result(outcome(diverged("encoder.layers.0"))))
    [[problem]] = [case.result for case in suite]
    assert problem.message == "3 identical, 1 shape; first diverges: encoder.layers.0"


def test_undecided_is_a_failure_of_its_own_type() -> None:
    found = comparison(Finding(kind="undecided", key="a.weight", expected="float32 [2]"))
    [suite] = suites_of(result(outcome(found)))
    [[problem]] = [case.result for case in suite]
    assert isinstance(problem, Failure)
    assert problem.type == "undecided"


def test_what_could_not_be_told_is_an_error_and_what_ran_before_it_still_counts() -> None:
    error = GoldenError("x: no golden there", hint="harness record x")
    suites = suites_of(
        result(
            outcome(error=error, actual=None),
            outcome(comparison(), comparison(stage="load"), error=error),
        )
    )
    assert [[case.name for case in suite] for suite in suites] == [
        [f"{GOLDEN} file"],
        [f"{GOLDEN} file", f"{GOLDEN} load", f"{GOLDEN} after load"],
    ]
    assert [counts(suite) for suite in suites] == [(1, 0, 1, 0), (3, 0, 1, 0)]
    [problem] = next(iter(suites[0])).result
    assert isinstance(problem, Error)
    assert (problem.type, problem.message) == ("golden", "x: no golden there")
    assert problem.text == "\nerror: x: no golden there\n  next: harness record x\n"


def test_what_is_close_passes_and_says_so() -> None:
    found = comparison(Finding(kind="close", key="a.weight", expected="float32 [2]"))
    [suite] = suites_of(result(outcome(found)))
    [case] = suite
    assert case.result == []
    assert case.system_out is not None
    assert "close: within the tolerance" in case.system_out


def test_an_update_passes_what_it_accepts_and_nothing_else() -> None:
    changed = outcome(
        comparison(missing("a")),
        comparison(missing("a"), stage="load"),
        comparison(missing("a"), stage="outputs"),
        updated=True,
    )
    [suite] = suites_of(result(changed))
    assert [len(case.result) for case in suite] == [0, 1, 0]
    assert changed.exit_code == 1
    assert outcome(comparison(missing("a")), updated=True).exit_code == 0


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("diff", "a.pt and b.pt file"),
        ("roundtrip", "b.pt load"),
    ],
)
def test_every_command_has_names_that_stay(command: Any, name: str) -> None:
    expected = "a.pt" if command == "diff" else None
    error = GoldenError("x")
    for one in (
        outcome(comparison(stage=name.split()[-1]), expected=expected, actual="b.pt"),
        outcome(error=error, expected=expected, actual="b.pt"),
    ):
        [suite] = suites_of(result(one, command=command))
        assert [(case.classname, case.name) for case in suite] == [(f"harness.{command}", name)]


@given(st.sampled_from(HOSTILE) | st.text())
def test_any_name_is_valid_xml_and_reads_back_as_it_is_shown(name: str) -> None:
    error = GoldenError(name, hint=name)
    for stage, what in [
        (comparison(missing(name), name=name, notes=(name,)), "1 missing; first"),
        (diverged(name), "1 shape; first diverges"),
    ]:
        one = outcome(stage, expected=name or "x", error=error, next_steps=(name,))
        [suite] = suites_of(result(one))
        failed, ended = suite
        assert suite.name == escaped(name or "x")
        assert failed.result[0].message == f"3 identical, {what}: {printable(name)}"
        assert render_text(stage) in failed.result[0].text
        assert ended.result[0].message == escaped(name)


def test_two_thousand_tensors_stay_small() -> None:
    findings = [missing(f"{'x' * n}.weight") for n in range(2000)]
    text = render(result(outcome(comparison(*findings))))
    assert len(text) < 10_000
    assert "2,000 missing" in text
    assert "and 1,988 more" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('testsuite name="golden/nest.safetensors"', "testsuite"),
        (' tests="1"', ""),
        (' failures="1"', ' failures="one"'),
        (' type="different"', ' kind="different"'),
        ("<properties>", '<testcase name="x" /><properties>'),
        ("<properties>", "<properties>text"),
        ('<testcase classname="harness.verify"', '<testcase id="1"'),
    ],
)
def test_the_schema_refuses_what_is_no_junit(old: str, new: str) -> None:
    good = render(result(outcome(comparison(missing("a")))))
    assert SCHEMA.is_valid(good)
    assert old in good
    assert not SCHEMA.is_valid(good.replace(old, new))
