"""What a remote file system must offer."""

from __future__ import annotations

from typing import Any

from harness.checkpoint.sources.source import Stat

# What one request asks for: small enough that the structure of a file costs little, large enough
# that the bytes of its tensors come in few requests.
BLOCK_NBYTES = 1 << 20
THREADS = 16
# Where the file systems of fsspec say that a file is another one, the surest first.
_TAGS = (
    *("ETag", "etag", "blob_id", "sha", "md5"),
    *("mtime", "modify", "modificationTime", "LastModified", "last_modified", "updated", "created"),
)


class StoredFiles:
    """How to ask for what is at a URL, by what every file system of fsspec can do.

    Raises whatever the protocol's library raises.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def stat(self, url: str) -> Stat:
        info = self._filesystem.info(url)
        if info["type"] == "directory":
            return Stat(is_dir=True)
        if not isinstance(info.get("size"), int):
            raise NotImplementedError("it does not tell the size of the file")
        tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
        return Stat(info["size"], tag)

    def fetch(self, url: str, start: int, end: int, expected: Stat) -> bytes:
        data: bytes = self._filesystem.cat_file(url, start=start, end=end)
        return data

    def names(self, url: str) -> list[str]:
        found = self._filesystem.ls(url, detail=False)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def put(self, url: str, data: bytes, *, overwrite: bool) -> None:
        try:
            self._filesystem.pipe_file(url, data, mode="overwrite" if overwrite else "create")
        except NotImplementedError:
            # Few protocols can promise that nobody else writes in between.
            if not overwrite and self._filesystem.exists(url):
                raise FileExistsError(url) from None
            self._filesystem.pipe_file(url, data)
