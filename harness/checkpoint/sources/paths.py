"""Where files are: paths of this machine, and URLs.

In: what a person gives (text, a path). Out: `Path`, or `RemotePath` for a URL of any protocol that
fsspec knows. What reads files uses `path / name`, `name`, `parent`, `exists()`, `is_file()`,
`is_dir()`, `iterdir()`, `str(path)` and `access.open_source(path)`, which both have. Nothing of
fsspec is imported before a URL is looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from harness.checkpoint.sources.remote import RemotePath
from harness.errors import UsageError

AnyPath: TypeAlias = Path | RemotePath
Location: TypeAlias = str | os.PathLike[str] | RemotePath

# In a folder of torch.distributed.checkpoint: its index, and the suffix of what that places.
METADATA = ".metadata"
DISTCP = ".distcp"
_MAX_FILES = 100_000  # of a glob

# Anything else with a colon in it is a file's name, or a drive of Windows. A chain of protocols
# (`simplecache::s3://…`) is a URL, too, though one that is refused.
_URL = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*)://")


def to_path(location: Location) -> AnyPath:
    """Take a URL for what it is, and `file://` for the path that it names; raises UsageError."""
    if isinstance(location, RemotePath):
        return location
    if not isinstance(location, (str, os.PathLike)):
        raise UsageError(
            f"a {type(location).__name__} is not a path or URL",
            hint="give the path of a file; verify, record, update and fingerprint take as their "
            "first argument also what is in memory",
        )
    url = location if isinstance(location, str) else ""
    if found := _URL.match(url):
        if found[1].lower() not in ("file", "local"):
            return RemotePath(found[1].lower() + url[found.end(1) :])
        host, slash, path = url[found.end() :].partition("/")
        if host not in ("", "localhost"):
            raise UsageError(
                f"{location}: file:// cannot reach another machine ({host!r})",
                hint=f"for a path on this machine: {found[0]}/{host}{slash}{path}",
            )
        location = unquote(slash + path)
    try:
        possible = b"\0" not in os.fsencode(location)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UsageError(f"{location}: not a valid file name", hint="check the path")
    return Path(os.fsdecode(location))


def is_file(path: AnyPath) -> bool:
    """Whether a file is there; False for a name that no file can have."""
    return os.path.isfile(path) if isinstance(path, Path) else path.is_file()  # noqa: PTH113


def is_url(text: str) -> bool:
    """Whether a text is a URL, of any protocol."""
    return _URL.match(text) is not None


def to_local(location: Location, what: str) -> Path:
    """A path of this machine; UsageError for a URL, which `what` cannot be."""
    path = to_path(location)
    if isinstance(path, Path):
        return path
    raise UsageError(
        f"{path}: {what} must be on this machine", hint="give a local path: download the file first"
    )


def is_there(path: AnyPath) -> bool:
    """Whether something is at a path, or fits a glob; False for what cannot even be looked at."""
    try:
        return path.exists() or bool(files_of(path))
    except OSError:
        return False


def files_of(glob: AnyPath) -> Sequence[AnyPath]:
    """The files that a glob stands for, "*" or "?" in the last part of a path."""
    if not isinstance(glob, Path) or not any(sign in glob.name for sign in "*?["):
        return []
    return sorted(islice(glob.parent.glob(glob.name), _MAX_FILES))


def path_of(subject: object) -> AnyPath | None:
    """The path or URL that a subject is, None for what is open or in memory."""
    if isinstance(subject, (str, os.PathLike)):
        return to_path(subject)
    return subject if isinstance(subject, RemotePath) else None
