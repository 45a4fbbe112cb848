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
    """Write a file without a name, lock it, and name it; raises FileExistsError, and OSError.

    A kill leaves the old file or the new one, never a part. What overwrites is named beside the
    target and renamed over it, for no system call puts a file without a name over another: a kill
    in between leaves the new one under both names, and the next write removes what no living writer
    holds locked.
    """
    # A name may have 255 bytes.
    beside = f".{os.fsdecode(os.fsencode(path.name)[:200])}."
    for left in path.parent.glob(f"{glob.escape(beside)}*.tmp"):
        _remove_unlocked(left)
    temporary = path.parent / f"{beside}{os.urandom(4).hex()}.tmp"
    with contextlib.ExitStack() as stack:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        descriptor = -1
        if hasattr(os, "O_TMPFILE"):
            with contextlib.suppress(OSError):  # not every file system can
                descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
        nameless = descriptor >= 0
        if not nameless:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(temporary.unlink, missing_ok=True)
        file = stack.enter_context(os.fdopen(descriptor, "wb"))
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.flock(file, fcntl.LOCK_EX)
        if not nameless and not os.fstat(descriptor).st_nlink:  # removed before it was locked
            write_whole(path, data, overwrite=overwrite)
            return
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if nameless:
            # With a directory's descriptor Python calls linkat, which follows the link in /proc.
            name = temporary.name if overwrite else path.name
            os.link(f"/proc/self/fd/{file.fileno()}", name, dst_dir_fd=folder)
        if overwrite:
            temporary.replace(path)
        elif not nameless:
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
