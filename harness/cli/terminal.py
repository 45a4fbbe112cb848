"""What the commands print: reports and errors, on a terminal, in a pipe, or as JSON.

In: comparisons, errors, and a `Result`. Out: lines on the terminal, report files, an exit code.
What a person typed is shown without the secrets of its URLs.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from harness.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from harness.checkpoint.sources.paths import AnyPath
    from harness.comparison.comparison import Comparison
    from harness.report.outcome import Outcome, Result
    from harness.text.fitting import Style


# Under which a command keeps whether the traceback of a failure is wanted.
TRACEBACK = "harness.traceback"
_PLAIN = {"−": "-", "×": "x", "·": "*", "‖": "|", "→": "->", "…": "..", "±": "+-"}


def show_plainly(stream: TextIO) -> TextIO:
    """A stream that shows signs that its encoding lacks in other words, and writes all or fails."""
    codecs.register_error("harness-plain", _plain)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = stream.buffer
    if isinstance(raw, io.FileIO):  # of PYTHONUNBUFFERED: loses what a full disk does not take
        whole = io.BufferedWriter(raw)
        stream = io.TextIOWrapper(whole, encoding=stream.encoding, line_buffering=True)
    stream.reconfigure(errors="harness-plain")
    return stream


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _PLAIN.get(error.object[error.start], "?"), error.start + 1


def echo_stage(comparison: Comparison, form: str, earlier: Sequence[Comparison] = ()) -> None:
    """Print the report of one stage, where text is asked for."""
    from harness.comparison.comparison import render

    if form == "text":
        click.echo(render(comparison, _style(), earlier=earlier))


def echo_changes(comparison: Comparison, *, table: bool, lists_unchanged: bool) -> None:
    """Print how much each tensor changed, and which did not."""
    from harness.report.changes import changes_lines, unchanged_lines

    style = _style()
    lines = list(changes_lines(comparison)) if table else []
    lines += unchanged_lines(comparison, style, lists_all=lists_unchanged)
    click.echo("\n" + "\n".join(lines))


def echo_steps(steps: Sequence[str], form: str) -> None:
    """Print the next steps, where text is asked for."""
    for step in steps if form == "text" else ():
        click.echo(f"\n  {step}")


def echo_total(outcomes: Sequence[Outcome]) -> None:
    """Print one line for many goldens: how many came to what, and which were replaced."""
    from harness.text.folding import escaped

    words = Counter(_word(outcome) for outcome in outcomes)
    counts = ", ".join(f"{words[word]:,} {word}" for word in _WORDS if words[word])
    click.echo(f"\ntotal: {len(outcomes):,} goldens: {counts}")
    replaced = [str(outcome.expected) for outcome in outcomes if outcome.updated]
    if replaced:
        shown = ", ".join(replaced[:_MAX_SHOWN])
        more = f" and {len(replaced) - _MAX_SHOWN:,} more" if len(replaced) > _MAX_SHOWN else ""
        click.echo(escaped(f"replaced {len(replaced):,} of {len(outcomes):,}: {shown}{more}"))


_WORDS = ("identical", "close", "updated", "undecided", "different", "not checked")
_MAX_SHOWN = 20


def _word(outcome: Outcome) -> str:
    if outcome.error is not None:
        return "not checked"
    if outcome.updated and outcome.exit_code == 0:
        return "updated"
    verdicts = {stage.verdict for stage in outcome.stages if not outcome.accepts(stage)}
    return next((word for word in reversed(_WORDS) if word in verdicts), "identical")


def told(error: HarnessError, form: str) -> HarnessError:
    """What ended an outcome early; printed at once in a text report."""
    if form == "text":
        echo_error(error)
    return error


def ended(
    error: HarnessError, form: str, *, expected: AnyPath | None, actual: AnyPath | None
) -> Outcome:
    """The outcome of what ended before anything was compared."""
    from harness.report.outcome import Outcome

    return Outcome(
        expected=None if expected is None else str(expected),
        actual=None if actual is None else str(actual),
        error=told(error, form),
    )


def finish(result: Result, form: str, reports: Sequence[Path]) -> int:
    """Print the JSON, write the reports, and give the exit code of all."""
    code = result.exit_code
    if form == "json":
        from harness.report.json import result_as_json

        echo_json(result_as_json(result))
    for path in reports:
        from harness.report.files import write_report

        try:
            write_report(result, path)
        except HarnessError as error:  # the others are still wanted
            echo_error(error)
            code = 2
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        from harness.report.files import append_step_summary
        from harness.text.folding import escaped

        try:
            append_step_summary(result, Path(summary))
        except HarnessError as error:  # no reason for a run to fail
            click.echo(escaped(f"note: {error}"), err=True)
    return code


def _style() -> Style:
    from harness.text.fitting import Style

    terminal = sys.stdout.isatty()
    color = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    width = None
    if terminal:
        from shutil import get_terminal_size  # which brings three modules of compression

        width = get_terminal_size().columns
    return Style(color=color, unicode=terminal and utf8, width=width)


def echo_traceback(error: HarnessError) -> None:
    """Print where an error came from, where a command is asked for that."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(TRACEBACK) and error.__cause__ is not None:
        click.echo("".join(traceback.format_exception(error.__cause__)), err=True)


def echo_error(error: HarnessError) -> None:
    """Print an error and its next step on the error stream."""
    from harness.text.folding import error_lines

    echo_traceback(error)
    for line in error_lines(error):
        click.echo(line, err=True)


def echo_json(data: Any) -> None:
    """Print JSON, indented."""
    click.echo(json.dumps(data, indent=2))


def failure(error: HarnessError | click.ClickException) -> dict[str, Any]:
    """The JSON of a command that came to no result."""
    from harness.report.json import error_as_json

    if isinstance(error, click.ClickException):
        error = UsageError(without_secrets(error.format_message()), hint="harness --help")
    found: dict[str, Any] = error_as_json(error)
    return found


def without_secrets(text: str) -> str:
    """What a person typed may hold a URL with a password or a signature."""
    from harness.checkpoint.sources.urls import redacted

    return redacted(text)


_REPORTING = ("--report", "--format")


def asked_again(arguments: Sequence[str], but: Sequence[str] = ()) -> list[str]:
    """The arguments of a command, without secrets, for a line that asks the same again.

    Left out is how to report, and the options in `but`; each of them takes a value.
    """
    from harness.cli.steps import without

    return [without_secrets(argument) for argument in without(arguments, (*_REPORTING, *but))]
