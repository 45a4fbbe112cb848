"""Opening sources: one at a time, many at once, and a pool that keeps few descriptors open."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness.checkpoint.sources.files import FileSource
from harness.checkpoint.sources.inflated import InflatedSource
from harness.checkpoint.sources.paths import AnyPath
from harness.checkpoint.sources.source import RangeSource, Source, read
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from harness.checkpoint.sources.blocks import RemoteSource

MAX_OPEN_FILES = 128
_Item = TypeVar("_Item")
_T = TypeVar("_T")


def open_source(path: AnyPath) -> FileSource | RemoteSource:
    """Open a file as a source; raises CheckpointError."""
    if isinstance(path, Path):
        return FileSource(path)
    from harness.checkpoint.sources.blocks import RemoteSource

    return RemoteSource(path)


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

    from harness.checkpoint.sources.transport import THREADS

    _ = folder.transport  # found here, and passed on to what is in the folder
    # Threads of its own: those that fetch are waited for.
    with ThreadPoolExecutor(THREADS, thread_name_prefix="harness-open") as own:
        yield from own.map(function, items)


class Pool:
    """Files of which only `MAX_OPEN_FILES` are open at a time: a checkpoint may have thousands.

    What is behind a URL holds nothing open, and is opened once.
    """

    def __init__(self) -> None:
        # What leaves the cache closes itself when the last read from it has ended.
        self.opened = lru_cache(maxsize=MAX_OPEN_FILES)(FileSource)

    def open(self, path: AnyPath) -> PooledSource | RemoteSource:
        """Open a file that is closed and opened again as need be; raises CheckpointError."""
        if isinstance(path, Path):
            return PooledSource(self, path)
        from harness.checkpoint.sources.blocks import RemoteSource

        return RemoteSource(path)


class PooledSource:
    """A whole file of a pool."""

    def __init__(self, pool: Pool, path: Path) -> None:
        self.name = str(path)
        self._pool = pool
        self.path = path
        self.version = pool.opened(path).version
        self.nbytes = self.version.nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._opened().read_into(offset, buffer)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return self._opened().view(offset, nbytes)

    def _opened(self) -> Source:
        found = self._pool.opened(self.path)
        if found.version != self.version:
            raise CheckpointError(
                f"{self.name}: was replaced: has {found.version}, had {self.version} when it was "
                "opened",
                hint="wait until the checkpoint is written, and run again",
            )
        return found

    def ahead(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """Nothing is to be done before ranges are read: they are near."""
        return nullcontext()

    def close(self) -> None:
        """Close the files of the whole pool."""
        self._pool.opened.cache_clear()


def is_local(source: Source) -> bool:
    """Whether to look at the bytes costs no round trip."""
    while isinstance(source, RangeSource):
        source = source.base
    return isinstance(source, (FileSource, PooledSource, InflatedSource))
