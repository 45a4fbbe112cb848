"""Where the bytes of a checkpoint are: ranges of files, read at an offset by any thread.

In: paths and URLs, or a compressed range of another source. Out: `Source` objects whose reads never
return less than asked. Refused: reads outside the range, files that change while they are read, and
compressed data that expands beyond `INFLATION_LIMIT` (a bomb). Nothing is mapped that others can
change, and nothing is written but unlinked temporary files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from harness.errors import CheckpointError

COPY_AGAIN = "the file is truncated or damaged: copy or download it again"


class Source:
    """A range of bytes; `name` says to a person where it is."""

    name: str
    nbytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; thread-safe; raises CheckpointError when it cannot."""
        raise NotImplementedError

    def part(self, offset: int, nbytes: int) -> Source:
        """The same range for one who reads these bytes alone: what is sent to another process."""
        return self

    def scattered(self) -> Source:
        """The same bytes, for many small reads in any order."""
        return self

    def ahead(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """Fetch ranges (start, end) at once where each read costs a round trip."""
        return nullcontext()

    def is_local(self) -> bool:
        """Whether to look at the bytes costs no round trip."""
        return True

    def close(self) -> None:
        """Close what is open for this range; by default nothing is."""


def read(source: Source, offset: int, nbytes: int) -> bytes:
    """Read a small part into memory."""
    buffer = bytearray(nbytes)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


class Stat(NamedTuple):
    """What there is to see of a file without reading it: a file that replaces it has another.

    `tag` is the time of a change, or what a server gives for it: empty where that is nothing.
    """

    nbytes: int = 0
    tag: str = ""
    is_dir: bool = False

    def __str__(self) -> str:
        return f"{self.nbytes} bytes, {self.tag}" if self.tag else f"{self.nbytes} bytes"


class StoredSource(Source):
    """A whole file; `stat` is what was seen of it when it was opened."""

    stat: Stat


_Path = TypeVar("_Path")
_Stored = TypeVar("_Stored", bound=StoredSource)


@lru_cache(maxsize=4096)
def reopened(kind: Callable[[_Path], _Stored], path: _Path, stat: Stat) -> _Stored:
    """Open what another process has open; raises CheckpointError where it is another file here."""
    source = kind(path)
    if source.stat != stat:
        raise CheckpointError(
            f"{source.name}: was replaced, or is another file here: has {source.stat}, but rank 0 "
            f"sees {stat}",
            hint="all ranks must see the same files: wait until they are written and the shared "
            "storage agrees, then run again",
        )
    return source


class RangeSource(Source):
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

    def scattered(self) -> Source:
        base = self.base.scattered()
        return self if base is self.base else RangeSource(base, self._start, self.nbytes, self.name)

    def is_local(self) -> bool:
        return self.base.is_local()

    def close(self) -> None:
        self.base.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return RangeSource, (self.base, self.locate(), self.nbytes, self.name)


def check_range(source: Source, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > source.nbytes:
        raise CheckpointError(
            f"{source.name}: bytes {offset} to {offset + nbytes} are outside of its "
            f"{source.nbytes} bytes",
            hint=COPY_AGAIN,
        )


def damaged(where: str, why: str, hint: str = COPY_AGAIN) -> CheckpointError:
    """The error of a file that contradicts itself or its format."""
    return CheckpointError(f"{where}: {why}", hint=hint)


def too_many(where: str, limit: int, what: str) -> CheckpointError:
    """The error of a file that may be whole, but is beyond what is read."""
    return CheckpointError(
        f"{where}: more than {limit:,} {what}: not read",
        hint="save the weights by themselves, or in more files",
    )


def is_closed(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: is closed", hint="open the checkpoint again, and read it before"
    )


def changed(name: str, how: str) -> CheckpointError:
    """The error of a file that became another one while it was read."""
    return CheckpointError(
        f"{name}: {how}: the file changed while it was read",
        hint="wait until it is written, then run again",
    )
