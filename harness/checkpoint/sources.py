"""Where the bytes of a checkpoint are: ranges of files, read at an offset by any thread.

In: paths, or a compressed range of another source. Out: `Source` objects whose reads never return
less than asked. Refused: reads outside the range, files that shrink while they are read, and
compressed data that expands beyond `INFLATION_LIMIT` (a bomb). Nothing is written but an unlinked
temporary file for data that is compressed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Protocol

from harness.errors import CheckpointError

# Trained weights deflate to 0.5-1 of their size, constant ones to 1/1000, as a bomb does.
INFLATION_LIMIT = 100
INFLATION_FREE_NBYTES = 64 << 20
_INFLATE_STEP = 1 << 18


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


class FileSource:
    """A whole file, read with `pread`: no shared position, so threads need no lock."""

    def __init__(self, path: Path, *, fd: int | None = None, name: str | None = None) -> None:
        self.name = name or str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
            self.nbytes = os.fstat(self._fd).st_size
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened: {error.strerror}",
                hint="check the path and that you may read the file",
            ) from error
        self._map: mmap.mmap | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        _check_range(self, offset, len(buffer))
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
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
        _check_range(self, offset, nbytes)
        if nbytes == 0:
            return memoryview(b"")
        if self._map is None:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return memoryview(self._map)[offset : offset + nbytes]

    def close(self) -> None:
        # The map, if any, lives as long as the arrays over it.
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RangeSource:
    """A part of another source: a tar member, a stored zip entry."""

    def __init__(self, base: Source, start: int, nbytes: int, name: str) -> None:
        _check_range(base, start, nbytes)
        self._base = base
        self._start = start
        self.nbytes = nbytes
        self.name = name

    def read_into(self, offset: int, buffer: memoryview) -> None:
        _check_range(self, offset, len(buffer))
        self._base.read_into(self._start + offset, buffer)

    def view(self, offset: int, nbytes: int) -> memoryview:
        _check_range(self, offset, nbytes)
        return self._base.view(self._start + offset, nbytes)

    def close(self) -> None:
        self._base.close()


class InflatedSource:
    """A compressed range, inflated on first use into an unlinked temporary file."""

    def __init__(
        self,
        base: Source,
        start: int,
        compressed_nbytes: int,
        name: str,
        *,
        wbits: int,
        nbytes: int | None = None,
    ) -> None:
        """`wbits` as in `zlib`: -15 raw deflate, 31 gzip. `nbytes`: the size if it is known."""
        _check_range(base, start, compressed_nbytes)
        self.name = name
        self._base = base
        self._start = start
        self._compressed_nbytes = compressed_nbytes
        self._wbits = wbits
        self._declared = nbytes
        self._lock = threading.Lock()
        self._file: FileSource | None = None
        if nbytes is not None:
            self._check_expansion(nbytes)

    @property
    def nbytes(self) -> int:
        return self._inflated().nbytes if self._declared is None else self._declared

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._inflated().read_into(offset, buffer)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return self._inflated().view(offset, nbytes)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._base.close()

    def _inflated(self) -> FileSource:
        with self._lock:
            if self._file is None:
                self._file = self._inflate()
            return self._file

    def _inflate(self) -> FileSource:
        with tempfile.TemporaryFile() as file:
            total = 0
            inflater = zlib.decompressobj(self._wbits)
            position = 0
            pending = b""
            while not inflater.eof:
                if not pending:
                    count = min(_INFLATE_STEP, self._compressed_nbytes - position)
                    if count == 0:
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
                self._check_expansion(total)
                try:
                    file.write(data)
                except OSError as error:
                    raise CheckpointError(
                        f"{self.name}: no room for its decompressed bytes in "
                        f"{tempfile.gettempdir()}: {error.strerror}",
                        hint="point TMPDIR at a larger disk, or decompress the file first",
                    ) from error
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
            file.flush()
            return FileSource(Path(self.name), fd=os.dup(file.fileno()), name=self.name)

    def _check_expansion(self, nbytes: int) -> None:
        limit = INFLATION_FREE_NBYTES + INFLATION_LIMIT * self._compressed_nbytes
        if nbytes > limit:
            raise CheckpointError(
                f"{self.name}: {self._compressed_nbytes} compressed bytes expand to more than "
                f"{limit}, as a decompression bomb does",
                hint="if you trust the file, decompress it yourself and verify the result",
            )


def _check_range(source: Source, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > source.nbytes:
        raise CheckpointError(
            f"{source.name}: bytes {offset} to {offset + nbytes} are outside of its "
            f"{source.nbytes} bytes",
            hint="the file is truncated or damaged: copy or download it again",
        )
