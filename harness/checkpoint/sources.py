"""Where the bytes of a checkpoint are: ranges of files, read at an offset by any thread.

In: paths and URLs, or a compressed range of another source. Out: `Source` objects whose reads never
return less than asked. Refused: reads outside the range, files that shrink while they are read, and
compressed data that expands beyond `INFLATION_LIMIT` (a bomb). Nothing is written but one unlinked
temporary file per file with compressed data.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from harness.checkpoint.paths import AnyPath
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from harness.checkpoint.blocks import RemoteSource

# Trained weights deflate to 0.5-1 of their size, constant ones to 1/1000, as a bomb does.
INFLATION_LIMIT = 100
INFLATION_FREE_NBYTES = 64 << 20
MAX_OPEN_FILES = 128
_INFLATE_STEP = 1 << 18
_SETTLED_NS = 2_000_000_000
_Item = TypeVar("_Item")
_T = TypeVar("_T")


class Source(Protocol):
    """A readable range of bytes; `name` says to a person where it is."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; thread-safe; raises CheckpointError when it cannot."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Map a read-only view of a part: file pages, not anonymous memory."""

    def stamp(self) -> str | None:
        """Name these bytes and their state, for a cache; None where a change could go unseen."""

    def close(self) -> None: ...


def read(source: Source, offset: int, nbytes: int) -> bytes:
    """Read a small part into memory."""
    buffer = bytearray(nbytes)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


class Version(NamedTuple):
    """What there is to see of a file without reading it: a file that replaces it has another.

    `tag` is the time of a change, or what a server gives for it: empty where that is nothing.
    """

    nbytes: int
    tag: str

    def __str__(self) -> str:
        return f"{self.nbytes} bytes, {self.tag}" if self.tag else f"{self.nbytes} bytes"


class FileSource:
    """A whole file, read with `pread`: no shared position, so threads need no lock."""

    _fd = -1
    _map: mmap.mmap | None = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self._fd)
            self.nbytes = found.st_size
            seconds, ns = divmod(found.st_mtime_ns, 10**9)
            self.version = Version(found.st_size, f"modified at {seconds}.{ns:09}")
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened: {error.strerror}",
                hint="check the path and that you may read the file",
            ) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor(), [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.name}: reading {len(buffer)} bytes at {offset} failed: "
                    f"{error.strerror}",
                    hint="check the disk or the network share that holds the file",
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.name}: ends at byte {offset + done}, but was {self.nbytes} bytes long "
                    "when it was opened",
                    hint="the file is still being written: wait for it and run again",
                )
            done += count

    def view(self, offset: int, nbytes: int) -> memoryview:
        check_range(self, offset, nbytes)
        if nbytes == 0:
            return memoryview(b"")
        if self._map is None or len(self._map) < offset + nbytes:
            try:
                self._map = mmap.mmap(self._descriptor(), self.nbytes, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # the latter where it has shrunk
                raise CheckpointError(
                    f"{self.name}: its {self.nbytes} bytes cannot be mapped: {error}",
                    hint="the file may still be written, or memory is short: run again",
                ) from error
        return memoryview(self._map)[offset : offset + nbytes]

    def stamp(self) -> str | None:
        found = os.fstat(self._descriptor())
        # What was written a moment ago may be written again within the clock's resolution.
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
            return None
        return (
            f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
        )

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise CheckpointError(
                f"{self.name}: is closed", hint="open the checkpoint again, and read it before"
            )
        return self._fd

    def close(self) -> None:
        # The map, if any, lives as long as the arrays over it.
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    __del__ = close


def open_source(path: AnyPath) -> FileSource | RemoteSource:
    """Open a file as a source; raises CheckpointError."""
    if isinstance(path, Path):
        return FileSource(path)
    from harness.checkpoint.blocks import RemoteSource

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

    from harness.checkpoint.blocks import THREADS

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
        from harness.checkpoint.blocks import RemoteSource

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

    def stamp(self) -> str | None:
        return self._opened().stamp()

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


class RangeSource:
    """A part of another source: a tar member, a stored zip entry.

    `start` may be a function, which is asked before the first read: to find out where a part
    starts costs a round trip where the bytes are not local.
    """

    def __init__(
        self, base: Source, start: int | Callable[[], int], nbytes: int, name: str
    ) -> None:
        self.base = base
        self.nbytes = nbytes
        self.name = name
        self._start = start
        if isinstance(start, int):
            check_range(base, start, nbytes)

    def locate(self) -> int:
        """Find out where the part starts; raises CheckpointError where it cannot be there."""
        if not isinstance(self._start, int):
            start = self._start()
            check_range(self.base, start, self.nbytes)
            self._start = start
        return self._start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        self.base.read_into(self.locate() + offset, buffer)

    def view(self, offset: int, nbytes: int) -> memoryview:
        check_range(self, offset, nbytes)
        return self.base.view(self.locate() + offset, nbytes)

    def stamp(self) -> str | None:
        base = self.base.stamp()
        return None if base is None else f"{base}+{self.locate()}"

    def close(self) -> None:
        self.base.close()


class Spool(FileSource):
    """What is inflated of one file, piece after piece, in one unlinked temporary file."""

    def __init__(self, name: str, compressed_nbytes: int) -> None:
        self.name = name
        self.nbytes = 0
        self.lock = threading.Lock()
        self._compressed_nbytes = compressed_nbytes

    def stamp(self) -> str | None:
        return None

    def append(self, data: bytes) -> None:
        """Add to the end, up to what `compressed_nbytes` may expand to; hold the lock."""
        _check_expansion(self.name, self._compressed_nbytes, self.nbytes + len(data))
        try:
            if self._fd < 0:
                from tempfile import TemporaryFile

                with TemporaryFile() as file:
                    self._fd = os.dup(file.fileno())
            while data:
                written = os.pwrite(self._fd, data, self.nbytes)
                self.nbytes += written
                data = data[written:]
        except OSError as error:
            raise CheckpointError(
                f"{self.name}: no room for its decompressed bytes in a temporary file: "
                f"{error.strerror}",
                hint="point TMPDIR at a larger disk, or decompress the file first",
            ) from error


class InflatedSource:
    """A compressed range, inflated into a spool on first use."""

    def __init__(
        self,
        base: Source,
        start: int,
        compressed_nbytes: int,
        name: str,
        *,
        wbits: int,
        nbytes: int | None = None,
        spool: Spool | None = None,
    ) -> None:
        """`wbits` as in `zlib`: -15 raw deflate, 31 gzip. `nbytes`: the size if it is known."""
        check_range(base, start, compressed_nbytes)
        self.name = name
        self._base = base
        self._start = start
        self._compressed_nbytes = compressed_nbytes
        self._wbits = wbits
        self._declared = nbytes
        self._spool = spool or Spool(name, compressed_nbytes)
        self._place: RangeSource | None = None
        if nbytes is not None:
            _check_expansion(name, compressed_nbytes, nbytes)

    @property
    def nbytes(self) -> int:
        return self._inflated().nbytes if self._declared is None else self._declared

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._inflated().read_into(offset, buffer)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return self._inflated().view(offset, nbytes)

    def stamp(self) -> str | None:
        base = self._base.stamp()
        return None if base is None else f"{base}+{self._start}:{self._wbits}"

    def close(self) -> None:
        self._spool.close()
        self._base.close()

    def _inflated(self) -> RangeSource:
        with self._spool.lock:
            if self._place is None:
                start = self._spool.nbytes
                try:
                    self._inflate()
                except BaseException:
                    self._spool.nbytes = start
                    raise
                nbytes = self._spool.nbytes - start
                self._place = RangeSource(self._spool, start, nbytes, self.name)
            return self._place

    def _inflate(self) -> None:
        inflater = zlib.decompressobj(self._wbits)
        total = position = 0
        pending = data = b""
        while not inflater.eof:
            if not pending:
                count = min(_INFLATE_STEP, self._compressed_nbytes - position)
                if count == 0 and not data:  # else there may be more of what is taken already
                    raise CheckpointError(
                        f"{self.name}: its compressed data ends early, after {total} bytes",
                        hint="the file is truncated: copy or download it again",
                    )
                pending = read(self._base, self._start + position, count)
                position += count
            try:
                data = inflater.decompress(pending, _INFLATE_STEP * 4)
            except zlib.error as error:
                raise CheckpointError(
                    f"{self.name}: its compressed data is damaged after {total} bytes: {error}",
                    hint="copy or download the file again",
                ) from error
            pending = inflater.unconsumed_tail
            total += len(data)
            _check_expansion(self.name, self._compressed_nbytes, total)
            self._spool.append(data)
        if self._declared is not None and total != self._declared:
            raise CheckpointError(
                f"{self.name}: holds {total} bytes, but its header says {self._declared}",
                hint="the file is damaged: copy or download it again",
            )
        rest = len(inflater.unused_data) + self._compressed_nbytes - position
        if rest:
            raise CheckpointError(
                f"{self.name}: {rest} bytes follow the compressed data",
                hint="decompress the file by hand to see what it holds",
            )


def is_local(source: Source) -> bool:
    """Whether to look at the bytes costs no round trip."""
    while isinstance(source, RangeSource):
        source = source.base
    return isinstance(source, (FileSource, PooledSource, InflatedSource))


def _check_expansion(name: str, compressed_nbytes: int, nbytes: int) -> None:
    limit = INFLATION_FREE_NBYTES + INFLATION_LIMIT * compressed_nbytes
    if nbytes > limit:
        raise CheckpointError(
            f"{name}: {compressed_nbytes} compressed bytes expand to more than {limit}, as a "
            "decompression bomb does",
            hint="if you trust the file, decompress it yourself and verify the result",
        )


def check_range(source: Source, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > source.nbytes:
        raise CheckpointError(
            f"{source.name}: bytes {offset} to {offset + nbytes} are outside of its "
            f"{source.nbytes} bytes",
            hint="the file is truncated or damaged: copy or download it again",
        )
