"""A progress bar on a terminal, for work that takes longer than a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.text.folding import printable

if TYPE_CHECKING:
    from harness.checkpoint.sources.paths import AnyPath
    from harness.streaming.workers import Progress


@contextmanager
def progress_bar(path: AnyPath | None) -> Iterator[Progress | None]:
    """Show a bar on a terminal, for work that takes longer than a second."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = _Bar(path)
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    """The bytes that were read, of those that are to be read as far as that is known by now."""

    def __init__(self, path: AnyPath | None) -> None:
        self._path = path
        self._started = time.monotonic()
        self._done = self._total = 0
        self._lock = threading.Lock()
        self._shown: Any = None

    def expect(self, nbytes: int) -> None:
        with self._lock:
            self._total += nbytes

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._shown is None and time.monotonic() - self._started > 1:
                self._shown = _start_bar(self._path)
            if self._shown is not None:
                self._shown.update(0, completed=self._done, total=self._total)

    def stop(self) -> None:
        if self._shown is not None:
            self._shown.stop()


def _start_bar(path: AnyPath | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(printable(path.name) if path else "", total=None)
    bar.start()
    return bar
