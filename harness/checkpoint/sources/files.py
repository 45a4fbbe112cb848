"""Bytes of regular files, read in place, of which only some are open at a time.

Refused: what is no regular file (a FIFO would be waited for, a device may do anything when it is
opened), and files that change, shrink or are replaced while they are read.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from harness.checkpoint.sources.source import (
    Stat,
    StoredSource,
    changed,
    check_range,
    is_closed,
    reopened,
)
from harness.errors import CheckpointError

MAX_OPEN_FILES = 128


def open_regular(path: Path) -> int:
    """Open a regular file for reading; raises CheckpointError, and OSError where there is none.

    It is looked at first, since to open some devices changes them, and again when it is open.
    """
    _check_regular(path, path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file"
        raise CheckpointError(f"{path}: {what}", hint="give a file, or a copy in a regular file")


class _Descriptor:
    """An open file, closed when the last read of it has ended."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)  # known here, since modules go first when Python ends


class FileSource(StoredSource):
    """A whole file, read with `pread`: no shared position, so threads need no lock."""

    _is_closed = True
    # The files last read: a checkpoint may have more than a process may open. Held by the class,
    # since modules go first when Python ends.
    _open: ClassVar = OrderedDict[int, _Descriptor]()
    _lock = threading.RLock()  # a file that is forgotten in here closes itself

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self.path = path.absolute()  # the code of a user may change the folder
            descriptor = _Descriptor(open_regular(path))
            found = os.fstat(descriptor.number)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened: {error.strerror}",
                hint="check the path and that you may read the file",
            ) from error
        self.nbytes = found.st_size
        self.stat = _stat(found)
        self._seen = _seen(found)
        self._is_closed = False
        self._keep(descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        descriptor = self._opened()
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(descriptor.number, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{self.name}: ends at byte {offset + done}, but was {self.nbytes} bytes "
                        "long when it was opened",
                        hint="the file is still being written: wait for it and run again",
                    )
                done += count
            found = os.fstat(descriptor.number)
        except OSError as error:
            raise CheckpointError(
                f"{self.name}: reading {len(buffer)} bytes at {offset} failed: {error.strerror}",
                hint="check the disk or the network share that holds the file",
            ) from error
        if _seen(found) != self._seen:
            raise changed(self.name, f"has {_stat(found)}, had {self.stat} when it was opened")

    def __reduce__(self) -> tuple[Any, ...]:
        return reopened, (FileSource, self.path, self.stat)

    def _opened(self) -> _Descriptor:
        if self._is_closed:
            raise is_closed(self.name)
        with self._lock:
            known = self._open.get(id(self))
            if known is not None:
                self._open.move_to_end(id(self))
                return known
        try:
            descriptor = _Descriptor(open_regular(self.path))
            found = os.fstat(descriptor.number)
        except OSError as error:
            raise changed(self.name, f"cannot be opened again: {error.strerror}") from error
        if _seen(found) != self._seen:
            raise changed(
                self.name, f"was replaced: has {_stat(found)}, had {self.stat} when it was opened"
            )
        self._keep(descriptor)
        return descriptor

    def _keep(self, descriptor: _Descriptor) -> None:
        with self._lock:
            self._open[id(self)] = descriptor
            while len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            with self._lock:
                self._open.pop(id(self), None)

    __del__ = close


def _seen(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _stat(found: os.stat_result) -> Stat:
    seconds, ns = divmod(found.st_mtime_ns, 10**9)
    return Stat(found.st_size, f"modified at {seconds}.{ns:09}")
