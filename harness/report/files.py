"""Reports as files, in the format that a file's suffix asks for.

In: a `Result` and a path. Out: the file, written whole. Refused: suffixes of no known format, and
files that are there and are no reports, such as an index of shards. The one part of this folder
that touches files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from harness.comparison.comparison import Comparison
from harness.errors import UsageError
from harness.golden.atomic import write_whole
from harness.report.outcome import Outcome, Result
from harness.text.shell import quoted

_NAME = "report.html"
_RENDERERS = {".html": "html", ".md": "markdown", ".xml": "junit", ".json": "json"}
# A report of any format begins with one of these, or has the last in its head.
_STARTS = (
    *(b"## harness ", b'{\n  "exit_code": '),
    b'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="harness ',
)
_GENERATOR = b'<meta name="generator" content="checkpoint-harness '
_HEAD_NBYTES = 2048


def check_report(path: Path, option: str = "--report ") -> None:
    """Raise UsageError for a path that no report can be written to, before any work is done.

    `option` is what stands before the path where it was given.
    """
    if path.is_dir():
        inside = quoted(str(path / _NAME))
        raise UsageError(f"{option}{path}: is a folder", hint=f"{option}{inside}")
    if path.suffix.lower() not in _RENDERERS:
        is_stream = path.name == "-" or (path.exists() and not path.is_file())
        named = _NAME if is_stream else path.with_suffix(".html")
        raise UsageError(
            f"{option}{path}: unknown format; a report is one of {', '.join(_RENDERERS)}",
            hint=f"{option}{quoted(str(named))}",
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"{option}{path}: no such folder: {path.parent}",
            hint=f"mkdir -p {quoted(str(path.parent))}",
        )
    if path.is_file() and not _may_be_replaced(path):
        other = path.with_name(f"report{path.suffix}")
        raise UsageError(
            f"{option}{path}: exists, and is not a report",
            hint=f"give it another name: {option}{quoted(str(other))}"
            if path.name != other.name
            else f"if it is not needed: rm {quoted(str(path))}",
        )


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is a report, or empty, or cannot be read, which writing it will show."""
    try:
        with path.open("rb") as file:
            start = file.read(_HEAD_NBYTES)
    except OSError:
        return True
    return not start or start.startswith(_STARTS) or _GENERATOR in start


def write_report(result: Result, path: Path, option: str = "--report ") -> None:
    """Write the report; raises UsageError where the file cannot be written."""
    text: str = import_module(f"harness.report.{_RENDERERS[path.suffix.lower()]}").render(result)
    with _writing(f"{option}{path}"):
        if path.is_file() or not path.exists():
            write_whole(path.resolve(), _encoded(text), overwrite=True)  # a link stays one
        else:  # a pipe
            path.write_bytes(_encoded(text))


def write_comparison(comparison: Comparison, location: str | os.PathLike[str]) -> None:
    """Write the report of one comparison; raises UsageError as `check_report` does, too."""
    path = Path(location)
    check_report(path, option="")
    names = (side.name for side in (comparison.expected, comparison.actual))
    outcome = Outcome(expected=next(names), actual=next(names), stages=(comparison,))
    write_report(Result(command="verify", outcomes=(outcome,)), path, option="")


def append_step_summary(result: Result, path: Path) -> None:
    """Add the Markdown report to the summary of a GitHub Actions step; raises UsageError."""
    from harness.report.markdown import render

    with _writing(f"GITHUB_STEP_SUMMARY={path}"), path.open("ab", buffering=0) as file:
        before, data = file.tell(), _encoded(render(result) + "\n")
        if file.write(data) < len(data):  # the disk is full
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{what}: cannot be written: {error.strerror}", hint="check permissions, and free space"
        ) from error


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")
