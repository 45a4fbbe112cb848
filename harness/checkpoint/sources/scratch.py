"""Unlinked temporary files: bytes on disk that nobody else can change, for what memory is too dear.

Refused: what the disk has no room for.
"""

from __future__ import annotations

import mmap
import os
import threading

from harness.checkpoint.sources.source import Source, check_range, is_closed
from harness.errors import CheckpointError

_IN_MEMORY_NBYTES = 16 << 20
_STEP = 1 << 20


class Scratch(Source):
    """A temporary file without a name, made when it is first written; `nbytes` is how far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self.lock = threading.Lock()  # for those who write
        self._file: int | None = None

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write a range; raises CheckpointError where the disk is full."""
        left = memoryview(data)
        try:
            if self._file is None:
                from tempfile import TemporaryFile  # which few files need

                with TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
            while left:
                written = os.pwrite(self._file, left, offset)
                offset += written
                left = left[written:]
        except OSError as error:
            raise CheckpointError(
                f"{self.name}: no room for a copy in a temporary file: {error.strerror}",
                hint="point TMPDIR at a larger disk, or decompress or download the file first",
            ) from error
        self.nbytes = max(self.nbytes, offset)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        if buffer and self._file is None:
            raise is_closed(self.name)
        while buffer and self._file is not None:
            count = os.preadv(self._file, [buffer], offset)
            offset += count
            buffer = buffer[count:]

    def map(self) -> memoryview:
        """Map the whole file, read-only; the map outlives it."""
        if self._file is None:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._file, self.nbytes, access=mmap.ACCESS_READ))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    __del__ = close


def copied(source: Source, offset: int, nbytes: int) -> memoryview:
    """A copy of a part that nobody else changes: in memory, or on disk from 16 MiB on.

    Memory: at most 16 MiB. Raises CheckpointError.
    """
    check_range(source, offset, nbytes)
    if nbytes <= _IN_MEMORY_NBYTES:
        data = bytearray(nbytes)
        source.read_into(offset, memoryview(data))
        return memoryview(data).toreadonly()
    scratch = Scratch(source.name)
    try:
        for start in range(0, nbytes, _STEP):
            part = memoryview(bytearray(min(_STEP, nbytes - start)))
            source.read_into(offset + start, part)
            scratch.write(start, part)
        return scratch.map()
    finally:
        scratch.close()
