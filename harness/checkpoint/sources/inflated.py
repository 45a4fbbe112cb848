"""Bytes of a compressed file, inflated once into an unlinked temporary file.

Refused: what expands beyond the limits below.
"""

from __future__ import annotations

import zlib

from harness.checkpoint.sources.scratch import Scratch
from harness.checkpoint.sources.source import RangeSource, Source, damaged, read
from harness.errors import CheckpointError

# Trained weights deflate to 0.5-1 of their size, constant ones to 1/1000, as a bomb does.
INFLATION_LIMIT = 100
INFLATION_FREE_NBYTES = 64 << 20
_INFLATE_STEP = 1 << 18


class InflatedSource(Source):
    """What a source holds compressed, in a temporary file: at once where its size is unknown."""

    def __init__(
        self,
        base: Source,
        name: str,
        *,
        wbits: int,
        nbytes: int | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """`wbits` as in `zlib`: -15 raw deflate, 31 gzip. `nbytes`: the size if it is known.

        `scratch` is shared by all ranges of one file.
        """
        self.name = name
        self._base = base
        self._wbits = wbits
        self._declared = nbytes
        self._scratch = scratch or Scratch(name)
        self._place: RangeSource | None = None
        if nbytes is not None:
            _check_expansion(name, base.nbytes, nbytes)
        self.nbytes = self._inflated().nbytes if nbytes is None else nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._inflated().read_into(offset, buffer)

    def close(self) -> None:
        self._scratch.close()
        self._base.close()

    def _inflated(self) -> RangeSource:
        with self._scratch.lock:
            if self._place is None:
                start = self._scratch.nbytes
                try:
                    self._inflate()
                except BaseException:
                    self._scratch.nbytes = start
                    raise
                nbytes = self._scratch.nbytes - start
                self._place = RangeSource(self._scratch, start, nbytes, self.name)
            return self._place

    def _inflate(self) -> None:
        inflater = zlib.decompressobj(self._wbits)
        total = position = 0
        pending = data = b""
        while not inflater.eof:
            if not pending:
                count = min(_INFLATE_STEP, self._base.nbytes - position)
                if count == 0 and not data:  # else there may be more of what is taken already
                    raise damaged(self.name, f"its compressed data ends early, after {total} bytes")
                pending = read(self._base, position, count)
                position += count
            try:
                data = inflater.decompress(pending, _INFLATE_STEP * 4)
            except zlib.error as error:
                why = f"its compressed data is damaged after {total} bytes: {error}"
                raise damaged(self.name, why) from error
            pending = inflater.unconsumed_tail
            total += len(data)
            _check_expansion(self.name, self._base.nbytes, total)
            self._scratch.write(self._scratch.nbytes, data)
        if self._declared is not None and total != self._declared:
            raise damaged(self.name, f"holds {total} bytes, but its header says {self._declared}")
        rest = len(inflater.unused_data) + self._base.nbytes - position
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
