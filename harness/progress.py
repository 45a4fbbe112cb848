"""A progress bar on a terminal, for work that takes longer than a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.report.folding import printable

if TYPE_CHECKING:
    from harness.checkpoint.paths import AnyPath


@contextmanager
def progress_bar(path: AnyPath | None) -> Iterator[Callable[[int], None] | None]:
    """Show a bar on a terminal, for work that takes longer than a second."""
    if not sys.stderr.isatty():
        yield None
        return
    started = time.monotonic()
    bar: Any = None
    done = 0
    total = path.stat().st_size if isinstance(path, Path) and path.is_file() else None

    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal bar, done
        with lock:
            done += nbytes
            if bar is None and time.monotonic() - started > 1:
                bar = _start_bar(path, total)
            if bar is not None:
                bar.update(0, completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _start_bar(path: AnyPath | None, total: int | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(printable(path.name) if path else "", total=total)
    bar.start()
    return bar
