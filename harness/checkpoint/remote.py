"""Files behind URLs, read in blocks by range requests through fsspec.

In: URLs of one file or folder each. Out: `RemotePath`, as much of a `pathlib.Path` as is used here,
and `RemoteSource`, which fetches the blocks that are asked for: once, in parallel, again where the
connection fails. Refused: what is missing or forbidden, servers that cannot send a range, files
that change while they are read, chained protocols (`a::b`).

What a URL may hold of secrets (a password, the signature of a presigned URL) is used to ask for the
file, and stands in no name, error or golden.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote
from weakref import WeakSet

from harness.checkpoint.sources import FileSource, Source, Version, check_range
from harness.errors import CheckpointError, HarnessError, UsageError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# What one request asks for: small enough that the structure of a file costs little, large enough
# that the bytes of its tensors come in few requests.
BLOCK_NBYTES = 1 << 20
_LEAST_BLOCK_NBYTES = 1 << 14
_KEPT_NBYTES = 32 << 20
THREADS = 16
# What lies between two ranges is fetched with them where that takes less time than a request.
_MAX_GAP = 1 << 16
# One more attempt after each, unless the library behind the protocol was patient itself.
RETRY_DELAYS = (0.2, 0.5, 1.0, 2.0)
PATIENCE_SECONDS = 30.0

_PACKAGES = {
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
}
# What stands before an @ is a container here, and a person or a password everywhere else.
_ADDRESSED = ("abfs", "abfss", "az", "adl", "hf")
# Where the file systems of fsspec say that a file is another one, the surest first.
_TAGS = (
    *("ETag", "etag", "blob_id", "sha", "md5"),
    *("mtime", "modify", "modificationTime", "LastModified", "last_modified", "updated", "created"),
)
_ANY_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_T = TypeVar("_T")


class Stat(NamedTuple):
    """What is at a URL; `tag` is another one when the content is, where the server has any."""

    is_dir: bool
    nbytes: int
    tag: str = ""


class Transport(Protocol):
    """How to ask for what is at a URL; raises whatever the protocol's library raises."""

    def stat(self, url: str) -> Stat: ...

    def fetch(self, url: str, start: int, end: int, expected: Stat) -> bytes: ...

    def names(self, url: str) -> list[str]: ...

    def put(self, url: str, data: bytes, *, overwrite: bool) -> None: ...


def without_secrets(url: str) -> str:
    """A URL without its query and fragment, and without who asks."""
    scheme, _, rest = url.partition("://")
    rest = rest.partition("?")[0]
    if scheme in ("http", "https"):
        rest = rest.partition("#")[0]
    netloc, slash, path = rest.partition("/")
    person, at, host = netloc.rpartition("@")
    if at and scheme in _ADDRESSED:
        netloc = f"{person.partition(':')[0]}@{host}"
    elif at:
        netloc = host
    return f"{scheme}://{netloc}{slash}{path}"


def redacted(text: str) -> str:
    """A text in which every URL stands without its secrets."""
    return _ANY_URL.sub(lambda found: without_secrets(found[0]), text)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL; `str()` is the URL without secrets, `url` is the whole."""

    url: str = field(repr=False)

    def __str__(self) -> str:
        return without_secrets(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        return self._base.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        above = self._base.rstrip("/").rpartition("/")[0]
        return self._at(above + "/" * self.is_web)

    def __truediv__(self, name: str) -> RemotePath:
        # On the web a path is quoted; elsewhere a name is a name.
        plain = quote(name, errors="replace") if self.is_web else name
        return self._at(f"{self._base.rstrip('/')}/{plain}")

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def exists(self) -> bool:
        return self.stat() is not None

    def is_file(self) -> bool:
        found = self.stat()
        return found is not None and not found.is_dir

    def is_dir(self) -> bool:
        if self.is_web:  # known without asking, see WebFiles
            return self._base.endswith("/")
        found = self.stat()
        return found is not None and found.is_dir

    @property
    def is_listable(self) -> bool:
        """Whether a folder here can tell what is in it: web servers cannot."""
        return not self.is_web

    def iterdir(self) -> Iterator[RemotePath]:
        for name in self.ask("listing it", lambda: self.transport.names(self.url)):
            yield self / name

    def stat(self) -> Stat | None:
        """Ask what is there, None for nothing; raises CheckpointError."""
        try:
            return self.ask("looking at it", lambda: self.transport.stat(self.url))
        except FileNotFoundError:
            return None

    def write_bytes(self, data: bytes, *, overwrite: bool) -> None:
        """Put a whole file there; raises FileExistsError without `overwrite`, CheckpointError."""

        def put() -> None:
            self.transport.put(self.url, data, overwrite=overwrite)

        self.ask(f"writing {len(data)} bytes", put)

    @cached_property
    def transport(self) -> Transport:
        """How to ask; raises UsageError where the protocol's package is not installed."""
        if "::" in self.url and not self.is_web:  # there, it is of an address: http://[::1]/
            raise UsageError(f"{self}: is a chain of protocols", hint="give a URL of one protocol")
        if self.is_web:
            # Its own session, since fsspec takes a whole file for the range that it asked for.
            from harness.checkpoint.http import WebFiles

            return WebFiles(self._filesystem())
        return StoredFiles(self._filesystem())

    def _filesystem(self) -> Any:
        package = _PACKAGES.get(self.scheme)
        try:
            from fsspec.core import filesystem, url_to_fs

            return filesystem(self.scheme) if self.is_web else url_to_fs(self.url)[0]
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("fsspec"):
                raise UsageError(
                    f"{self}: a URL is read by fsspec, which is not installed",
                    hint="pip install 'checkpoint-harness[remote]'",
                ) from error
            raise self._no_package(package, error) from error
        except ImportError as error:
            raise self._no_package(package, error) from error
        except Exception as error:  # whatever the protocol's package raises
            if "Protocol not known" in str(error):
                raise UsageError(
                    f"{self}: there is no protocol {self.scheme}://",
                    hint="give a path of this machine, or an https://, s3://, gs:// or hf:// URL",
                ) from error
            raise self._failed("reaching it", error, 1) from self._cause(error)

    def _no_package(self, package: str | None, error: ImportError) -> UsageError:
        return UsageError(
            f"{self}: {self.scheme}:// takes {package or 'a package'}, which is not installed",
            hint=f"pip install {package}" if package else redacted(str(error)),
        )

    def ask(self, what: str, question: Callable[[], _T]) -> _T:
        """Ask, and ask again after a while where the connection or the server fails.

        Raises CheckpointError; FileNotFoundError and FileExistsError are the caller's to explain.
        """
        started = time.monotonic()
        for attempt, delay in enumerate((*RETRY_DELAYS, None), 1):
            try:
                return question()
            except (HarnessError, FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # whatever the protocol's package raises
                patient = time.monotonic() - started < PATIENCE_SECONDS
                if delay is None or not patient or _is_final(error):
                    raise self._failed(what, error, attempt) from self._cause(error)
            time.sleep(delay)
        raise AssertionError("unreachable")

    def _failed(self, what: str, error: Exception, attempts: int) -> CheckpointError:
        why = f"{type(error).__name__}: {redacted(str(error))[:300]}".rstrip(": ")
        if _is_denial(error):
            return CheckpointError(
                f"{self}: {what}: access is denied ({why})",
                hint=f"check your credentials for {self.scheme}://, or whether the URL has expired",
            )
        tried = f" {attempts} times" if attempts > 1 else ""
        return CheckpointError(
            f"{self}: {what} failed{tried}: {why}",
            hint="check the URL and the connection and run again, or download the file first",
        )

    def _cause(self, error: Exception) -> Exception | None:
        """What an error may be raised from: a traceback must not tell the secrets either."""
        return error if self.url == str(self) else None

    @property
    def is_web(self) -> bool:
        """Whether a server answers that knows files alone."""
        return self.scheme in ("http", "https")

    @property
    def _base(self) -> str:
        return self.url.partition("?")[0]

    def _at(self, base: str) -> RemotePath:
        _, mark, query = self.url.partition("?")
        path = RemotePath(base + mark + query)
        if "transport" in vars(self):  # else fsspec makes one on each thread, with its own session
            vars(path)["transport"] = self.transport
        return path


def _status(error: Exception) -> int | None:
    """The HTTP status that an error is about, as the libraries have it."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
                return int(value)
    return None


def _is_denial(error: Exception) -> bool:
    """Whether it matters who asks; every cloud has a class of its own for want of credentials."""
    nobody = "Credential" in type(error).__name__
    return nobody or isinstance(error, PermissionError) or _status(error) in (401, 403)


def _is_final(error: Exception) -> bool:
    """Whether to ask again is of no use: the answer was no, or the question was wrong."""
    if _is_denial(error):
        return True
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status not in (408, 425, 429)
    wrong = (IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError, TypeError)
    return isinstance(error, wrong)


class StoredFiles:
    """Files of any protocol, by what every file system of fsspec can do."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def stat(self, url: str) -> Stat:
        info = self._filesystem.info(url)
        if info["type"] == "directory":
            return Stat(is_dir=True, nbytes=0)
        if not isinstance(info.get("size"), int):
            raise NotImplementedError("it does not tell the size of the file")
        tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
        return Stat(is_dir=False, nbytes=info["size"], tag=tag)

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


class RemoteSource:
    """A file behind a URL. Memory: the blocks of one read, and 32 MiB for all sources together."""

    _mirror: Mirror | None = None

    def __init__(self, path: RemotePath) -> None:
        self.name = str(path)
        found = path.stat()
        if found is None:
            of_folders = ": that of a folder ends with a slash" if path.is_web else ""
            raise CheckpointError(f"{path}: no such file", hint=f"check the URL{of_folders}")
        if found.is_dir:
            raise CheckpointError(f"{path}: a folder, not a file", hint="give the file inside")
        self.nbytes = found.nbytes
        self.version = Version(found.nbytes, found.tag and f"tag {found.tag}")
        self.path = path
        self._found = found
        self.token = object()
        _blocks.sources.add(self)
        self._lock = threading.Lock()
        self._ahead: list[tuple[int, bytes]] = []

    @contextmanager
    def ahead(self, ranges: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Fetch ranges (start, end), in their order, all at once; reads inside of one are of it.

        For one thread. Memory: the ranges, and up to 64 KiB between two of them.
        """
        runs = list(_runs(ranges, self.nbytes))
        fetched = threads().map(lambda run: self._fetch(*run), runs)
        self._ahead = [(start, data) for (start, _), data in zip(runs, fetched, strict=True)]
        try:
            yield
        finally:
            self._ahead = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        index = bisect_right(self._ahead, offset, key=lambda run: run[0]) - 1
        if index >= 0:
            start, data = self._ahead[index]
            if offset - start + len(buffer) <= len(data):
                buffer[:] = data[offset - start : offset - start + len(buffer)]
                return
        # No more at a time than other threads leave of the pool.
        step = THREADS * BLOCK_NBYTES
        for start in range(0, len(buffer), step):
            part = buffer[start : start + step]
            position = offset + start
            for first, answer in list(self._asked(position, position + len(part))):
                piece = memoryview(answer.result())[position - first :][: len(part)]
                part[: len(piece)] = piece
                part = part[len(piece) :]
                position += len(piece)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Copy a part into an unlinked temporary file, and map that."""
        check_range(self, offset, nbytes)
        if nbytes == 0:
            return memoryview(b"")
        with self._lock:
            if self._mirror is None:
                self._mirror = Mirror(self)
            return self._mirror.view(offset, nbytes)

    def stamp(self) -> str | None:
        """None: few servers tell reliably whether a file has changed."""
        return None

    def close(self) -> None:
        _blocks.drop(self)
        if self._mirror is not None:
            self._mirror.close()

    def _asked(self, start: int, end: int) -> Iterator[tuple[int, Future[bytes]]]:
        """Ask for what holds a range, in order, each with where it starts.

        Blocks are kept, for what else is in them. Where they are small, those of which nothing is
        left are asked for together and not kept.
        """
        block = _blocks.block_nbytes()
        full = end if end == self.nbytes else end - end % block
        while start < end:
            first = start - start % block
            if block < BLOCK_NBYTES and first == start < full:
                last = min(first + BLOCK_NBYTES, full)
                yield first, threads().submit(self._fetch, first, last)
            else:
                last = min(first + block, self.nbytes)
                fetch = partial(self._fetch, first, last)
                yield first, _blocks.get(_Span(self.token, first, last), fetch)
            start = last

    def _fetch(self, start: int, end: int) -> bytes:
        path, found = self.path, self._found

        def fetch() -> bytes:
            data = path.transport.fetch(path.url, start, end, found)
            if len(data) != end - start:
                raise EOFError(f"{len(data)} bytes came in place of {end - start}")
            return data

        try:
            return path.ask(f"reading bytes {start} to {end}", fetch)
        except FileNotFoundError:
            raise changed(self.name, "is not there any more") from None


def _runs(ranges: Iterable[tuple[int, int]], nbytes: int) -> Iterator[tuple[int, int]]:
    """Join ranges of a file that are near each other, as far as one request brings."""
    run: tuple[int, int] | None = None
    for start, end in ranges:
        end = min(end, nbytes)
        if start >= end:
            continue
        if run and start - run[1] <= _MAX_GAP and end - run[0] <= BLOCK_NBYTES:
            run = run[0], max(run[1], end)
            continue
        if run:
            yield run
        run = start, end
    if run:
        yield run


def changed(name: str, how: str) -> CheckpointError:
    """The error of a file that became another one while it was read."""
    return CheckpointError(
        f"{name}: {how}: the file changed while it was read",
        hint="wait until it is written, and run again",
    )


class _Span(NamedTuple):
    """A block of a source; `token` stands for that, and does not keep it alive."""

    token: object
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class _Blocks:
    """The blocks last read, of all sources: what several threads ask for is fetched once.

    The tensors of a sharded checkpoint are read one after the other, each from all of its files. So
    that the rest of a block is still there when the next one is, blocks are the smaller, the more
    files are open: a few of each are kept.
    """

    def __init__(self) -> None:
        self.sources: WeakSet[RemoteSource] = WeakSet()
        self._lock = threading.Lock()
        self._found: OrderedDict[_Span, Future[bytes]] = OrderedDict()
        self._nbytes = 0

    def block_nbytes(self) -> int:
        nbytes = BLOCK_NBYTES
        while nbytes > _LEAST_BLOCK_NBYTES and 4 * len(self.sources) * nbytes > _KEPT_NBYTES:
            nbytes //= 2
        return nbytes

    def get(self, span: _Span, fetch: Callable[[], bytes]) -> Future[bytes]:
        with self._lock:
            found = self._found.get(span)
            if found is None:
                self._nbytes += span.nbytes
            if found is None or (found.done() and found.exception() is not None):
                found = self._found[span] = threads().submit(fetch)
            self._found.move_to_end(span)
            while self._nbytes > _KEPT_NBYTES:
                self._nbytes -= self._found.popitem(last=False)[0].nbytes
            return found

    def drop(self, source: RemoteSource) -> None:
        with self._lock:
            self.sources.discard(source)
            for span in [span for span in self._found if span.token is source.token]:
                self._nbytes -= span.nbytes
                self._found.pop(span).cancel()


_blocks = _Blocks()


@cache
def threads() -> ThreadPoolExecutor:
    """On which all waiting for servers is done."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(THREADS, thread_name_prefix="harness-remote")


class Mirror(FileSource):
    """An unlinked temporary file of a source's size, that holds the blocks that were viewed."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.nbytes = source.nbytes
        self._source = source
        self._filled: set[int] = set()
        try:
            with tempfile.TemporaryFile() as file:
                file.truncate(source.nbytes)
                self._fd = os.dup(file.fileno())
        except OSError as error:
            raise self._no_room(error) from error

    def view(self, offset: int, nbytes: int) -> memoryview:
        blocks = range(offset // BLOCK_NBYTES, -(-(offset + nbytes) // BLOCK_NBYTES))
        for start in range(0, len(blocks), THREADS):
            missing = [i for i in blocks[start : start + THREADS] if i not in self._filled]
            if missing:
                self._fill(missing[0] * BLOCK_NBYTES, (missing[-1] + 1) * BLOCK_NBYTES)
                self._filled.update(missing)
        return super().view(offset, nbytes)

    def _fill(self, start: int, end: int) -> None:
        data = memoryview(bytearray(min(end, self.nbytes) - start))
        self._source.read_into(start, data)
        try:
            while data:
                written = os.pwrite(self._fd, data, start)
                start += written
                data = data[written:]
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: no room for a part of it in a temporary file: {error.strerror}",
            hint="point TMPDIR at a larger disk, or download the file first",
        )
