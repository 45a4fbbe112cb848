"""Files behind URLs as sources: fetched in blocks, once, in parallel, and kept for a while.

In: a `RemotePath`. Out: a `RemoteSource`, and a copy of it on disk for scattered reads.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet, ref

from harness.checkpoint.sources import transport
from harness.checkpoint.sources.remote import RemotePath
from harness.checkpoint.sources.scratch import Scratch
from harness.checkpoint.sources.source import (
    Source,
    Stat,
    StoredSource,
    changed,
    check_range,
    reopened,
)
from harness.checkpoint.sources.transport import THREADS
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_LEAST_BLOCK_NBYTES = 1 << 14
_KEPT_NBYTES = 32 << 20
# What lies between two ranges is fetched with them where that takes less time than a request.
_MAX_GAP = 1 << 16


class RemoteSource(StoredSource):
    """A file behind a URL. Memory: the blocks of one read, and 32 MiB for all sources together."""

    def __init__(self, path: RemotePath) -> None:
        self.name = str(path)
        found = path.stat()
        if found is None:
            of_folders = ": that of a folder ends with a slash" if path.is_web else ""
            raise CheckpointError(f"{path}: no such file", hint=f"check the URL{of_folders}")
        if found.is_dir:
            raise CheckpointError(f"{path}: a folder, not a file", hint="give the file inside")
        self.nbytes = found.nbytes
        self.stat = Stat(found.nbytes, found.tag and f"tag {found.tag}")
        self.path = path
        self._found = found
        self.token = object()
        _blocks.sources.add(self)
        self._copy = _Copy(self)
        self._ahead: list[tuple[int, bytes]] = []

    @contextmanager
    def ahead(self, ranges: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Fetch ranges (start, end), in their order, all at once; reads inside of one are of it.

        For one thread. Memory: the ranges, and up to 64 KiB between two of them.
        """
        runs = _runs(ranges, self.nbytes)
        fetched = threads().map(lambda run: self._fetch(*run), runs)
        self._ahead = [(start, data) for (start, _), data in zip(runs, fetched, strict=True)]
        try:
            yield
        finally:
            self._ahead = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        index = bisect_right(self._ahead, offset, key=lambda run: run[0]) - 1
        if index >= 0:
            start, data = self._ahead[index]
            if offset - start + len(buffer) <= len(data):
                buffer[:] = data[offset - start : offset - start + len(buffer)]
                return
        # No more at a time than other threads leave of the pool.
        step = THREADS * transport.BLOCK_NBYTES
        for start in range(0, len(buffer), step):
            part = buffer[start : start + step]
            position = offset + start
            for first, answer in list(self._asked(position, position + len(part))):
                piece = memoryview(answer.result())[position - first :][: len(part)]
                part[: len(piece)] = piece
                part = part[len(piece) :]
                position += len(piece)

    def scattered(self) -> Source:
        """A copy on disk, of the blocks that were read."""
        return self._copy

    def is_local(self) -> bool:
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        # The connection stays here.
        return reopened, (RemoteSource, RemotePath(self.path.url), self.stat)

    def close(self) -> None:
        _blocks.drop(self)
        self._copy.close()

    def _asked(self, start: int, end: int) -> Iterator[tuple[int, Future[bytes]]]:
        """Ask for what holds a range, in order, each with where it starts.

        Blocks are kept, for what else is in them. Where they are small, those of which nothing is
        left are asked for together and not kept.
        """
        block = _blocks.block_nbytes()
        full = end if end == self.nbytes else end - end % block
        while start < end:
            first = start - start % block
            if block < transport.BLOCK_NBYTES and first == start < full:
                last = min(first + transport.BLOCK_NBYTES, full)
                yield first, threads().submit(self._fetch, first, last)
            else:
                last = min(first + block, self.nbytes)
                fetch = partial(self._fetch, first, last)
                yield first, _blocks.get(_Span(self.token, first, last), fetch)
            start = last

    def _fetch(self, start: int, end: int) -> bytes:
        path, found = self.path, self._found

        def fetch() -> bytes:
            data = path.transport.fetch(path.url, start, end, found)
            if len(data) != end - start:
                raise EOFError(f"{len(data)} bytes came in place of {end - start}")
            return data

        try:
            return path.ask(f"reading bytes {start} to {end}", fetch)
        except FileNotFoundError:
            raise changed(self.name, "is not there any more") from None


def _runs(ranges: Iterable[tuple[int, int]], nbytes: int) -> list[tuple[int, int]]:
    """Join ranges of a file that are near each other, as far as one request brings."""
    from fsspec.utils import merge_offset_ranges

    inside = [(start, min(end, nbytes)) for start, end in ranges if start < min(end, nbytes)]
    starts, ends = ([run[side] for run in inside] for side in (0, 1))
    names, most = [""] * len(inside), transport.BLOCK_NBYTES
    _, starts, ends = merge_offset_ranges(names, starts, ends, _MAX_GAP, most, sort=False)
    return list(zip(starts, ends, strict=True))


class _Span(NamedTuple):
    """A block of a source; `token` stands for that, and does not keep it alive."""

    token: object
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class _Blocks:
    """The blocks last read, of all sources: what several threads ask for is fetched once.

    The tensors of a sharded checkpoint are read one after the other, each from all of its files. So
    that the rest of a block is still there when the next one is, blocks are the smaller, the more
    files are open: a few of each are kept.
    """

    def __init__(self) -> None:
        self.sources: WeakSet[RemoteSource] = WeakSet()
        self._lock = threading.Lock()
        self._found: OrderedDict[_Span, Future[bytes]] = OrderedDict()
        self._nbytes = 0

    def block_nbytes(self) -> int:
        nbytes = transport.BLOCK_NBYTES
        while nbytes > _LEAST_BLOCK_NBYTES and 4 * len(self.sources) * nbytes > _KEPT_NBYTES:
            nbytes //= 2
        return nbytes

    def get(self, span: _Span, fetch: Callable[[], bytes]) -> Future[bytes]:
        with self._lock:
            found = self._found.get(span)
            if found is None:
                self._nbytes += span.nbytes
            if found is None or (found.done() and found.exception() is not None):
                found = self._found[span] = threads().submit(fetch)
            self._found.move_to_end(span)
            while self._nbytes > _KEPT_NBYTES:
                self._nbytes -= self._found.popitem(last=False)[0].nbytes
            return found

    def drop(self, source: RemoteSource) -> None:
        with self._lock:
            self.sources.discard(source)
            for span in [span for span in self._found if span.token is source.token]:
                self._nbytes -= span.nbytes
                self._found.pop(span).cancel()


_blocks = _Blocks()


@cache
def threads() -> ThreadPoolExecutor:
    """On which all waiting for servers is done."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(THREADS, thread_name_prefix="harness-remote")


class _Copy(Scratch):
    """What was read of a remote source, in blocks in a temporary file."""

    def __init__(self, source: RemoteSource) -> None:
        super().__init__(source.name)
        self.nbytes = source.nbytes
        self._source = ref(source)
        self._filled: set[int] = set()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        size = transport.BLOCK_NBYTES
        blocks = range(offset // size, -(-(offset + len(buffer)) // size))
        with self.lock:
            for start in range(0, len(blocks), THREADS):
                missing = [i for i in blocks[start : start + THREADS] if i not in self._filled]
                if missing:
                    self._fill(missing[0] * size, (missing[-1] + 1) * size)
                    self._filled.update(missing)
        super().read_into(offset, buffer)

    def _fill(self, start: int, end: int) -> None:
        data = memoryview(bytearray(min(end, self.nbytes) - start))
        source = self._source()
        assert source is not None
        source.read_into(start, data)
        self.write(start, data)
