"""Markdown: rendered as GitHub does, names in code only, never too long, nothing hidden."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from harness.comparison.findings import Finding
from harness.errors import GoldenError
from harness.report.markdown import MAX_NBYTES, render
from harness.report.outcome import Outcome, Result
from harness.text.folding import escaped, printable
from tests.report.samples import GOLDEN, HOSTILE, comparison, diverged, missing, outcome, result

GITHUB = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class Page(HTMLParser):
    """What a browser makes of the text: tags, cells, code, and text outside of code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.code: list[str] = []
        self.summaries: list[str] = []
        self.text = ""
        self.feed(GITHUB.render(text))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "code":
            self.code.append("")
        if tag == "summary":
            self.summaries.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "code" in self.open:
            self.code[-1] += data
        else:
            self.text += data
        if "summary" in self.open:
            self.summaries[-1] += data


def fences(text: str) -> Iterator[Token]:
    return (token for token in GITHUB.parse(text) if token.type == "fence")


def test_the_table_holds_goldens_and_stages_worst_first() -> None:
    passed = outcome(comparison(), comparison(stage="load"))
    failed = outcome(comparison(missing("a")), expected="golden/other.safetensors")
    ended = outcome(error=GoldenError("x"), expected="golden/third.safetensors")
    page = Page(render(result(passed, failed, ended)))
    assert page.rows == [
        ["result", "golden", "file", "load"],
        ["! could not be checked", "golden/third.safetensors", "–", "–"],
        ["✗ differs", "golden/other.safetensors", "✗ different", "–"],
        ["✓ passes", GOLDEN, "✓ identical", "✓ identical"],
    ]
    assert page.text.startswith("harness verify: ! could not be checked")


def test_what_passes_is_a_table_and_no_more() -> None:
    assert render(result(outcome(comparison()))) == (
        "## harness verify: ✓ passes\n\n"
        "| result | golden | file |\n"
        "| --- | --- | --- |\n"
        f"| ✓ passes | `{GOLDEN}` | ✓ identical |\n\n"
    )


def test_findings_are_folded_away_by_kind_as_the_text_report_groups_them() -> None:
    found = comparison(
        *(missing(f"layers.{n}.weight") for n in range(3)),
        Finding(kind="alias", key="head", expected="tied to a", actual="separate"),
        notes=("a note",),
        num_nan=2,
    )
    text = render(result(outcome(found)))
    page = Page(text)
    assert page.summaries == [
        "missing: only in expected (3)",
        "alias: tied weights are now separate, or the reverse (1)",
    ]
    assert text.count("<details open>") == 1
    assert text.count("<details>") == 1
    assert [fence.content for fence in fences(text)] == [
        f"expected  {GOLDEN} (nemo)\n"
        "actual    models/nest.nemo (nemo)\n"
        "note: a note\n"
        "note: 2 expected tensors contain NaN\n",
        "layers.{0…2}.weight  float32 [2, 3]  (3 tensors)\n",
        "head\n  expected tied to a\n  actual   separate\n",
    ]
    assert "3 identical, 1 alias, 3 missing" in page.text


def test_the_first_module_that_departs_is_named() -> None:
    text = render(result(outcome(diverged("encoder.layers.0"))))
    assert "**First diverges: `encoder.layers.0`**" in text
    assert "encoder.layers.0:out: shape\n" in [*fences(text)][1].content


def test_the_next_step_is_a_block_that_holds_the_command_alone() -> None:
    steps = (
        'if this change is intended:  harness verify x --update-golden --reason "why"',
        "mend: the code",
    )
    text = render(result(outcome(comparison(missing("a")), next_steps=steps)))
    *_, command, prose = fences(text)
    assert (command.info, command.content) == (
        "sh",
        'harness verify x --update-golden --reason "why"\n',
    )
    assert prose.content == "mend: the code\n"
    assert "If this change is intended:" in Page(text).text


def test_an_error_is_shown_with_its_next_step() -> None:
    error = GoldenError("x: no golden there", hint="harness record x")
    [fence] = fences(render(result(outcome(error=error))))
    assert fence.content == "error: x: no golden there\n  next: harness record x\n"


def test_an_update_says_what_it_accepted() -> None:
    text = render(result(outcome(comparison(missing("a")), updated=True)))
    page = Page(text)
    assert page.rows[1] == ["✓ passes, updated", GOLDEN, "✗ different, accepted"]
    assert len(page.summaries) == 1


def named(name: str) -> Result:
    """A result in which a name stands wherever one can."""
    stages = (comparison(missing(name), name=name, notes=(name,)), diverged(name))
    error = GoldenError(name, hint=name)
    step = f"if this change is intended:  harness verify {shlex.quote(name)}"
    return result(outcome(*stages, expected=name, error=error, next_steps=(step,)))


@given(st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=9))
def test_no_name_is_ever_markup(name: str) -> None:
    page, plain = Page(render(named(name))), Page(render(named("a")))
    assert page.tags == plain.tags
    assert page.attributes == {"class", "open"}
    assert page.text.split() == plain.text.split()
    assert [len(row) for row in page.rows] == [4, 4]
    # A browser folds the spaces of code on a line.
    assert page.rows[1][1].split() == escaped(name).split()
    assert any(code.startswith(f"{printable(name)}  float32") for code in page.code)


def many(num_goldens: int, num_kinds: int, key: str) -> Result:
    kinds = ("missing", "unexpected", "shape", "dtype", "alias", "optimizer")[:num_kinds]

    def one(number: int) -> Outcome:
        findings = [
            Finding(kind=kind, key=f"{key}{'x' * n}", expected=f"e{n}", actual=f"a{n}")
            for kind in kinds
            for n in range(20)
        ]
        return outcome(
            comparison(*findings),
            expected=f"golden/{number}.safetensors",
            next_steps=(
                f"if this change is intended:  harness verify -g golden/{number}.safetensors",
            ),
        )

    return result(*map(one, range(num_goldens)))


@pytest.mark.parametrize(
    "found",
    [many(40, 6, "k"), many(1000, 1, "k"), many(3, 6, "k" * 9999), many(9, 6, "鍵" * 99)],
    ids=["kinds", "goldens", "keys", "wide"],
)
def test_it_fits_a_comment_and_says_what_it_leaves_out(found: Result) -> None:
    text = render(found)
    assert len(text.encode()) <= MAX_NBYTES
    page = Page(text)
    assert len(page.rows) <= 60
    if len(found.outcomes) > 3:
        assert re.search(r"… and [\d,]+ more parts, for which there is no room here", page.text)


def test_next_steps_come_before_details_where_there_is_no_room_for_both() -> None:
    text = render(many(40, 6, "k"))
    commands = [fence.content for fence in fences(text) if fence.info == "sh"]
    assert commands == [f"harness verify -g golden/{n}.safetensors\n" for n in range(40)]
    assert 0 < text.count("<details") < 40 * 6


def test_goldens_beyond_the_table_are_counted_by_result() -> None:
    passed = [outcome(comparison(), expected=f"golden/{n}.safetensors") for n in range(99)]
    failed = outcome(comparison(missing("a")))
    page = Page(render(result(*passed, failed)))
    assert page.rows[1][:2] == ["✗ differs", GOLDEN]
    assert page.rows[-1] == ["✓ passes", "… and 50 more", ""]
    assert len(page.rows) == 1 + 50 + 1
