"""Reports as files, in the format that a file's suffix asks for.

In: a `Result` and a path. Out: the file, written whole. Refused: suffixes of no known format. The
one part of this folder that touches files.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from harness.errors import UsageError
from harness.report.outcome import Result
from harness.shell import quoted

_NAME = "report.html"
_RENDERERS = {".html": "html", ".md": "markdown", ".xml": "junit", ".json": "json"}


def check_report(path: Path) -> None:
    """Raise UsageError for a path that no report can be written to, before any work is done."""
    if path.is_dir():
        raise UsageError(
            f"--report {path}: is a folder", hint=f"--report {quoted(str(path / _NAME))}"
        )
    if path.suffix not in _RENDERERS:
        named = path.with_suffix(".html") if path.name != "-" else _NAME
        raise UsageError(
            f"--report {path}: a report is one of {', '.join(_RENDERERS)}, by its suffix",
            hint=f"--report {quoted(str(named))}",
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"--report {path}: there is no folder {path.parent}",
            hint=f"mkdir -p {quoted(str(path.parent))}",
        )


def write_report(result: Result, path: Path) -> None:
    """Write the report; raises UsageError where the file cannot be written."""
    text: str = import_module(f"harness.report.{_RENDERERS[path.suffix]}").render(result)
    _write(f"--report {path}", path, text, mode="w")


def append_step_summary(result: Result, path: Path) -> None:
    """Add the Markdown report to the summary of a GitHub Actions step; raises UsageError."""
    from harness.report.markdown import render

    _write(f"GITHUB_STEP_SUMMARY={path}", path, render(result) + "\n", mode="a")


def _write(what: str, path: Path, text: str, *, mode: str) -> None:
    try:
        with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(
            f"{what}: cannot be written: {error.strerror}", hint="check the folder's permissions"
        ) from error
