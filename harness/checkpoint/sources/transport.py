"""How file systems behind URLs are asked: those of fsspec, and servers of the web.

In: a file system of fsspec. Out: a transport. That of the web asks for ranges alone, by the session
of fsspec, whose settings apply, and never for a whole file, unless that is no larger than a block.
It refuses servers that answer with the whole file, with another range or compressed, and files
that become others in between (by size, ETag, date).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from harness.checkpoint.sources.source import Stat, changed
from harness.checkpoint.sources.urls import without_secrets
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from aiohttp import ClientResponse

# What one request asks for: small enough that the structure of a file costs little, large enough
# that the bytes of its tensors come in few requests.
BLOCK_NBYTES = 1 << 20
THREADS = 16
# Where the file systems of fsspec say that a file is another one, the surest first.
_TAGS = (
    *("ETag", "etag", "blob_id", "sha", "md5"),
    *("mtime", "modify", "modificationTime", "LastModified", "last_modified", "updated", "created"),
)


# Of silence, not of a whole answer.
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 20.0
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


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


class WebFiles(StoredFiles):
    """Files on web servers, which have no folders but by a URL that ends in a slash."""

    def stat(self, url: str) -> Stat:
        if url.partition("?")[0].endswith("/"):
            return Stat(is_dir=True)
        found, _ = self._get(url, 0, 1)
        return found

    def fetch(self, url: str, start: int, end: int, expected: Stat) -> bytes:
        found, data = self._get(url, start, end)
        if found != expected:
            what = "size" if found.nbytes != expected.nbytes else "ETag or date"
            raise changed(without_secrets(url), f"has another {what} than before")
        return data

    def names(self, url: str) -> list[str]:
        raise NotImplementedError("a web server does not list its files")

    def put(self, url: str, data: bytes, *, overwrite: bool) -> None:
        raise NotImplementedError("a web server takes no files")

    def _get(self, url: str, start: int, end: int) -> tuple[Stat, bytes]:
        from fsspec.asyn import sync

        found: tuple[Stat, bytes] = sync(self._filesystem.loop, self._answer, url, start, end)
        return found

    async def _answer(self, url: str, start: int, end: int) -> tuple[Stat, bytes]:
        """Ask for bytes `start` to `end`, of which a file may have fewer."""
        from aiohttp import ClientTimeout

        settings = dict(self._filesystem.kwargs)
        headers = {
            **settings.pop("headers", {}),
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        settings.setdefault(
            "timeout", ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        )
        session = await self._filesystem.set_session()
        address = self._filesystem.encode_url(url)
        async with session.get(address, headers=headers, **settings) as answer:
            nbytes, first, count = _promised(answer, without_secrets(url), start, end)
            data = await answer.content.readexactly(count)
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            return Stat(nbytes, tag), data[start - first : end - first]


def _promised(answer: ClientResponse, name: str, start: int, end: int) -> tuple[int, int, int]:
    """The size of the whole file, and which bytes of it the answer brings: from where, how many."""
    if answer.status in (404, 410):
        raise FileNotFoundError(name)
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status == 416 and found is not None:
        return int(found[3]), start, 0  # it ends before, as an empty file does
    if answer.status >= 400:
        answer.raise_for_status()
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _unfit(name, "compresses what it sends")
    if answer.status != 206:
        length, limit = answer.content_length, BLOCK_NBYTES
        if answer.status == 200 and length is not None and length <= limit:
            return length, 0, length
        raise _unfit(name, f"answers a request for {end - start} bytes with the whole file")
    if found is None or found[1] is None:
        raise _unfit(name, "does not say which bytes it sends, of how many")
    first, last, nbytes = int(found[1]), int(found[2]), int(found[3])
    if first != start or last + 1 != min(end, nbytes):
        raise _unfit(name, f"sends bytes {first} to {last + 1} in place of {start} to {end}")
    return nbytes, first, last + 1 - first


def _unfit(name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: the server {why}, so that the file cannot be read in parts",
        hint=f"download it first: curl -LO '{name}'",
    )
