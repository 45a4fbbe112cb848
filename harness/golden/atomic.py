"""Files that are written whole or not at all, whatever else writes to them or is killed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one who writes in a folder, where all who write there ask; may raise OSError.

    The folder itself is locked: no file is left behind, and a kill gives the lock back. Where the
    file system has no locks, nobody waits.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes | bytearray, *, overwrite: bool) -> None:
    """Write a file beside the target, and rename it; raises FileExistsError, and OSError.

    A kill leaves the old file or the new one, never a part. What it leaves beside them is hidden,
    and the next write removes what no living writer holds locked.
    """
    # A name may have 255 bytes.
    beside = f".{os.fsdecode(os.fsencode(path.name)[:200])}."
    for left in path.parent.glob(f"{glob.escape(beside)}*.tmp"):
        _remove_unlocked(left)
    temporary = path.parent / f"{beside}{os.urandom(4).hex()}.tmp"
    with contextlib.ExitStack() as stack:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        file = stack.enter_context(open(temporary, "xb"))
        stack.callback(temporary.unlink, missing_ok=True)
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.flock(file, fcntl.LOCK_EX)
        if not os.fstat(file.fileno()).st_nlink:  # removed before it was locked
            write_whole(path, data, overwrite=overwrite)
            return
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _rename_new(temporary, path)
        os.fsync(folder)


def _rename_new(path: Path, target: Path) -> None:
    """Give a file another name; raises FileExistsError where something has that."""
    try:
        target.hardlink_to(path)
    except FileExistsError:
        raise
    except OSError:  # not every file system has links
        path.replace(target)


def _remove_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
