"""Bytes of a regular file, read in place."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from harness.checkpoint.sources.source import Version, check_range
from harness.errors import CheckpointError


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
