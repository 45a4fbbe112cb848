"""Bytes of a compressed file, inflated once into an unlinked temporary file.

Refused: what expands beyond the limits below.
"""

from __future__ import annotations

import os
import threading
import zlib

from harness.checkpoint.sources.files import FileSource
from harness.checkpoint.sources.source import RangeSource, Source, check_range, read
from harness.errors import CheckpointError

# Trained weights deflate to 0.5-1 of their size, constant ones to 1/1000, as a bomb does.
INFLATION_LIMIT = 100
INFLATION_FREE_NBYTES = 64 << 20
_INFLATE_STEP = 1 << 18


class Spool(FileSource):
    """What is inflated of one file, piece after piece, in one unlinked temporary file."""

    def __init__(self, name: str, compressed_nbytes: int) -> None:
        self.name = name
        self.nbytes = 0
        self.lock = threading.Lock()
        self._compressed_nbytes = compressed_nbytes

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


def _check_expansion(name: str, compressed_nbytes: int, nbytes: int) -> None:
    limit = INFLATION_FREE_NBYTES + INFLATION_LIMIT * compressed_nbytes
    if nbytes > limit:
        raise CheckpointError(
            f"{name}: {compressed_nbytes} compressed bytes expand to more than {limit}, as a "
            "decompression bomb does",
            hint="if you trust the file, decompress it yourself and verify the result",
        )
