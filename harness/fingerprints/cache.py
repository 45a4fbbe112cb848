"""Digests of tensors that were read before, so that an untouched file is not read again.

In: tensors of an open checkpoint. Out: the digests of those whose files are what they were when
the digest was made: the same device, inode, size, and times of modification and of change to the
nanosecond. Refused (UsageError): a cache that cannot be read or written.

Whoever can write to the cache decides what a checkpoint passes for: it saves time, and is off
unless it is asked for. One SQLite file, which several processes may use at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from harness.checkpoint.sources.paths import is_file
from harness.checkpoint.tensors import Tensor
from harness.errors import UsageError
from harness.text.shell import quoted

if TYPE_CHECKING:
    import sqlite3


_SCHEMA = """CREATE TABLE IF NOT EXISTS digests
    (place BLOB PRIMARY KEY, digest BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID"""
# SQLite keeps values of any type and length in a column.
_SELECT = """SELECT digest FROM digests
    WHERE place = ? AND typeof(digest) = 'blob' AND length(digest) = 32"""
_FORGET_AFTER_DAYS = 90
_WAIT_SECONDS = 30.0


def default_cache() -> Path:
    """The cache of this user: $XDG_CACHE_HOME/checkpoint-harness, by default below ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "checkpoint-harness" / "digests.sqlite"


class DigestCache:
    """A cache file, which is made on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, bytes] = {}

    def known(self, tensors: Iterable[Tensor]) -> dict[str, bytes]:
        """The digests of those tensors whose files are as they were, by key."""
        now = {tensor.key: place for tensor in tensors if (place := _place(tensor)) is not None}
        self._places.update(now)
        found = {}
        with self._database() as database:
            for key, place in now.items():
                for (digest,) in database.execute(_SELECT, (place,)):
                    found[key] = digest
            today = _today()
            database.executemany(
                "UPDATE digests SET used = ? WHERE place = ? AND used < ?",
                [(today, now[key], today) for key in found],
            )
        return found

    def keep(self, tensors: Iterable[Tensor], digests: Mapping[str, bytes]) -> None:
        """Remember digests, but for those of files that changed since `known` was called."""
        rows = [
            (place, digests[tensor.key], _today())
            for tensor in tensors
            if (place := _place(tensor)) is not None and place == self._places.get(tensor.key)
        ]
        with self._database() as database:
            database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)
            old = _today() - _FORGET_AFTER_DAYS
            database.execute("DELETE FROM digests WHERE used < ?", (old,))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction; errors of SQLite and of the folder become UsageError."""
        import sqlite3

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as connection:
                connection.execute(_SCHEMA)
                with connection:
                    yield connection
        except (sqlite3.Error, OSError) as error:
            remedy = (
                f"remove it (rm {quoted(str(self.path))})"
                if is_file(self.path)
                else "set XDG_CACHE_HOME to a folder that can be written"
            )
            raise UsageError(
                f"{self.path}: the cache cannot be used: {error}",
                hint=f"{remedy}, or leave out --cache",
            ) from error


def _place(tensor: Tensor) -> bytes | None:
    """Where a tensor's bytes are and how they are read, as long as their file is what it is."""
    stamp = tensor.stamp()
    return None if stamp is None else blake3(f"1 {stamp}".encode()).digest()


def _today() -> int:
    return int(time.time() // 86400)
