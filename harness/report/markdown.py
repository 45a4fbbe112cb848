"""A result as Markdown."""

from __future__ import annotations

from harness.report.outcome import Result
from harness.report.text import render as render_text


def render(result: Result) -> str:
    """The whole report as a file."""
    stages = [stage for outcome in result.outcomes for stage in outcome.stages]
    return "\n".join(f"```text\n{render_text(stage)}\n```" for stage in stages) + "\n"
