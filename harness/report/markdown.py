"""A result as Markdown, fit for a comment on a pull request and for GitHub's step summary.

First a table of what was verified, by stages; then, for each stage that does not pass, its findings
as in the text report, folded away by kind; then the next step. What comes from a checkpoint stands
in code only, where nothing of it is markup. The text is never longer than `MAX_NBYTES`: what there
is no room for is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from harness.comparison.comparison import (
    SYMBOLS,
    Comparison,
    chance_note,
    counts_of,
    divergence_section,
    finding_sections,
    nan_note,
    sides,
)
from harness.comparison.words import Section
from harness.report.outcome import Outcome, Result
from harness.text.fitting import Style, fit, shorten
from harness.text.folding import error_lines, escaped

# GitHub takes 65,536 characters for a comment, and 1 MiB for the summary of a step.
MAX_NBYTES = 60_000
_NOTE_NBYTES = 200
_MAX_ROWS = 50
_MAX_NAME = 120
_STYLE = Style(unicode=True, width=160)
# By exit code, worst first.
_RESULTS = {2: "! could not be checked", 1: "✗ differs", 3: "? undecided", 0: "✓ passes"}


class _Part(NamedTuple):
    """Text that is shown whole or not at all; details give way to all that is none."""

    text: str
    is_detail: bool = False


def render(result: Result) -> str:
    """The whole report as a file."""
    outcomes = sorted(result.outcomes, key=lambda o: [*_RESULTS].index(o.exit_code))
    parts = [
        _Part(f"## harness {result.command}: {_RESULTS[result.exit_code]}\n\n"),
        _Part("".join(f"{row}\n" for row in _table(result, outcomes)) + "\n"),
        *(part for outcome in outcomes for part in _parts(result, outcome)),
    ]
    return _within(parts, MAX_NBYTES - _NOTE_NBYTES)


def _within(parts: list[_Part], nbytes: int) -> str:
    kept: set[int] = set()
    for is_detail in (False, True):
        for place, part in enumerate(parts):
            size = len(part.text.encode(errors="backslashreplace"))  # in the file
            if part.is_detail is is_detail and size <= nbytes:
                kept.add(place)
                nbytes -= size
    text = "".join(part.text for place, part in enumerate(parts) if place in kept)
    left_out = len(parts) - len(kept)
    more = f"… and {left_out:,} more parts, for which there is no room here.\n" if left_out else ""
    return text + more


def _table(result: Result, outcomes: list[Outcome]) -> Iterator[str]:
    stages = list(dict.fromkeys(s.stage for outcome in outcomes for s in outcome.stages))
    yield _row(["result", "checkpoints" if result.command == "diff" else "golden", *stages])
    yield _row(["---"] * (2 + len(stages)))
    for outcome in outcomes[:_MAX_ROWS]:
        found = {stage.stage: _cell(outcome, stage) for stage in outcome.stages}
        updated = "" if outcome.updated is None else ", updated" if outcome.updated else ", kept"
        yield _row(
            [
                _RESULTS[outcome.exit_code] + updated,
                _code(result.title(outcome)),
                *(found.get(stage, "–") for stage in stages),
            ]
        )
    more = Counter(_RESULTS[outcome.exit_code] for outcome in outcomes[_MAX_ROWS:])
    for said, count in more.items():
        yield _row([said, f"… and {count:,} more", *([""] * len(stages))])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(outcome: Outcome, stage: Comparison) -> str:
    accepted = ", accepted" if not stage.ok and outcome.accepts(stage) else ""
    return f"{SYMBOLS[stage.verdict]} {stage.verdict}{accepted}"


def _parts(result: Result, outcome: Outcome) -> Iterator[_Part]:
    """What is to be said of one outcome below the table."""
    title = _code(result.title(outcome))
    for stage in outcome.stages:
        if not stage.ok:
            yield _Part(f"### {title} {stage.stage}: {_cell(outcome, stage)}\n\n")
            yield _Part(f"{counts_of(stage)}\n\n{_fenced(_head(stage))}")
            yield from _details(stage)
    if outcome.error is not None:
        yield _Part(f"### {title}: could not be checked\n\n{_fenced(error_lines(outcome.error))}")
    for step in outcome.next_steps:
        yield _Part(_step(step))


def _head(stage: Comparison) -> Iterator[str]:
    yield from sides(stage)
    yield from (f"note: {escaped(note)}" for note in stage.notes)
    yield from (f"note: {note}" for note in (nan_note(stage), chance_note(stage)) if note)


def _details(stage: Comparison) -> Iterator[_Part]:
    diverged = divergence_section(stage)
    if stage.divergence is not None and diverged is not None:
        yield _Part(f"**First diverges: {_code(stage.divergence.place)}**\n\n{_section(diverged)}")
    for place, section in enumerate(finding_sections(stage, _STYLE)):
        is_open = " open" if place == 0 else ""
        yield _Part(
            f"<details{is_open}>\n<summary>{section.heading}</summary>\n\n"
            f"{_section(section)}</details>\n\n",
            is_detail=True,
        )


def _section(section: Section) -> str:
    return _fenced(line.removeprefix("    ") for line in section.lines)


def _step(step: str) -> str:
    """A next step: prose, or what it is for, a colon, two spaces or more, and a command."""
    purpose, _, command = step.partition(":  ")
    if not command:
        return _fenced([step])
    return f"{purpose[:1].upper()}{purpose[1:]}:\n\n{_block(command.strip(), 'sh')}"


def _fenced(lines: Iterable[str]) -> str:
    fitted = [part for line in lines for part in fit(line, _STYLE.width)]
    return _block("\n".join(fitted), "text")


def _block(text: str, language: str) -> str:
    """A block of code, whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}\n\n"


def _code(name: str) -> str:
    """A name as code on a line or in a cell, where a bar, a backtick or a backslash may not be."""
    text = shorten(escaped(name), _MAX_NAME)
    if not re.search(r"[`|\\]|^ | $|^$", text):
        return f"`{text}`"
    return f"<code>{''.join(c if c.isalnum() else f'&#{ord(c)};' for c in text)}</code>"
