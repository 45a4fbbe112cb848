"""URLs of files and folders, asked for ranges through fsspec.

In: URLs of one file or folder each. Out: `RemotePath`, as much of a `pathlib.Path` as is used here,
which asks again where the connection fails. Refused: what is missing or forbidden, servers that
cannot send a range, files that change while they are read, chained protocols (`a::b`).

What a URL may hold of secrets (a password, the signature of a presigned URL) is used to ask for the
file, and stands in no name, error or golden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote

from harness.checkpoint.sources.source import Stat
from harness.checkpoint.sources.transport import StoredFiles, WebFiles
from harness.checkpoint.sources.urls import redacted, without_secrets
from harness.errors import CheckpointError, HarnessError, UsageError

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
_T = TypeVar("_T")


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
    def transport(self) -> StoredFiles:
        """How to ask; raises UsageError where the protocol's package is not installed."""
        if "::" in self.url and not self.is_web:  # there, it is of an address: http://[::1]/
            raise UsageError(f"{self}: chains protocols", hint="give a URL of one protocol")
        # Of its own, since fsspec takes a whole file for the range that it asked for.
        return (WebFiles if self.is_web else StoredFiles)(self._filesystem())

    def _filesystem(self) -> Any:
        package = _PACKAGES.get(self.scheme)
        try:
            from fsspec.core import filesystem, url_to_fs

            return filesystem(self.scheme) if self.is_web else url_to_fs(self.url)[0]
        except ImportError as error:
            is_missing = isinstance(error, ModuleNotFoundError)
            if is_missing and (error.name or "").startswith("fsspec"):
                raise UsageError(
                    f"{self}: URLs need fsspec, which is not installed",
                    hint="pip install 'checkpoint-harness[remote]'",
                ) from error
            raise UsageError(
                f"{self}: {self.scheme}:// needs {package or 'a package'}, which is not installed",
                hint=f"pip install {package}" if package else redacted(str(error)),
            ) from error
        except Exception as error:  # whatever the protocol's package raises
            if "Protocol not known" in str(error):
                raise UsageError(
                    f"{self}: unknown protocol {self.scheme}://",
                    hint="give a local path, or an https://, s3://, gs:// or hf:// URL",
                ) from error
            raise self._failed("reaching it", error, 1) from self._cause(error)

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
                f"{self}: {what}: access denied ({why})",
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
        """Whether a server answers that knows files alone, and lists no folder."""
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
