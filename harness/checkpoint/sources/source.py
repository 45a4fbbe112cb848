"""Where the bytes of a checkpoint are: ranges of files, read at an offset by any thread.

In: paths and URLs, or a compressed range of another source. Out: `Source` objects whose reads never
return less than asked. Refused: reads outside the range, files that shrink while they are read, and
compressed data that expands beyond `INFLATION_LIMIT` (a bomb). Nothing is written but one unlinked
temporary file per file with compressed data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from harness.errors import CheckpointError


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

    def close(self) -> None:
        self.base.close()


def check_range(source: Source, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > source.nbytes:
        raise CheckpointError(
            f"{source.name}: bytes {offset} to {offset + nbytes} are outside of its "
            f"{source.nbytes} bytes",
            hint="the file is truncated or damaged: copy or download it again",
        )
