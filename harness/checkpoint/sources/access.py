"""Opening sources: one at a time, or many at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from harness.checkpoint.sources.blocks import RemoteSource
from harness.checkpoint.sources.files import FileSource
from harness.checkpoint.sources.paths import AnyPath
from harness.checkpoint.sources.source import read
from harness.checkpoint.sources.transport import THREADS

_Item = TypeVar("_Item")
_T = TypeVar("_T")


class _Closable(Protocol):
    def close(self) -> None: ...


def open_source(path: AnyPath) -> FileSource | RemoteSource:
    """Open a file as a source; raises CheckpointError."""
    return FileSource(path) if isinstance(path, Path) else RemoteSource(path)


@contextmanager
def closed_on_error(opened: Iterable[_Closable]) -> Iterator[None]:
    """Close what was opened by then where the rest fails."""
    try:
        yield
    except BaseException:
        for one in opened:
            one.close()
        raise


def read_file(path: AnyPath) -> bytes:
    """Read a whole small file into memory; raises CheckpointError."""
    with closing(open_source(path)) as source:
        return read(source, 0, source.nbytes)


def at_once(
    folder: AnyPath, function: Callable[[_Item], _T], items: Sequence[_Item]
) -> Generator[_T, None, None]:
    """Map over what is in a folder, in order; many at once where each costs round trips.

    Who stops before the end closes it, or the rest would still be asked for.
    """
    if isinstance(folder, Path):
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor

    _ = folder.transport  # found here, and passed on to what is in the folder
    # Threads of its own: those that fetch are waited for.
    with ThreadPoolExecutor(THREADS, thread_name_prefix="harness-open") as own:
        yield from own.map(function, items)
