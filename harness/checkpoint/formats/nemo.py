"""`.nemo` archives: a tar of `model_config.yaml` and `model_weights.ckpt`.

In: a source that is a tar archive (PAX, GNU or plain POSIX; gzip is undone before). Out: its
members by name, each a source of its own; nothing is unpacked. Refused: absolute names and `..`,
links, devices, sparse members, duplicates, broken checksums, members that reach outside of the
file. The headers are read by the standard library's tarfile, which ends in silence where one is
broken: what follows the last has to be the end of the archive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, NamedTuple, cast

from harness.checkpoint.sources.source import RangeSource, Source, damaged, read, too_many
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from tarfile import TarInfo

_BLOCK = 512
_MAX_HEADER_NBYTES = 16 << 10
_MAX_HEADERS_NBYTES = 4 << 20
_MAX_CONFIG_NBYTES = 1 << 20
_MAX_MEMBERS = 4000
WEIGHTS = "model_weights.ckpt"
CONFIG = "model_config.yaml"


def is_tar(head: bytes) -> bool:
    """Whether a file's first 512 bytes are a tar header."""
    return head[257:262] == b"ustar"


class Nemo(NamedTuple):
    """The weights, the text of the configuration if there is one, and all but the weights."""

    weights: Source
    config: bytes | None
    members: Mapping[str, Source]


def read_nemo(source: Source) -> Nemo:
    """Find what is in an archive.

    Raises CheckpointError for a tar archive that holds no model.
    """
    members = read_tar(source)
    weights = members.get(WEIGHTS)
    if weights is None:
        found = ", ".join(sorted(members)[:5]) or "nothing"
        old = {"pickle", "storages", "tensors"} <= set(members)
        raise CheckpointError(
            f"{source.name}: a tar archive without {WEIGHTS} (it holds {found})",
            hint="torch wrote this before version 0.1.10: load and save it with a newer torch"
            if old
            else "give a .nemo archive, or unpack the checkpoint that is in this one",
        )
    config = members.get(CONFIG)
    rest = {name: member for name, member in members.items() if name != WEIGHTS}
    if config is None:
        return Nemo(weights, None, rest)
    if config.nbytes > _MAX_CONFIG_NBYTES:
        raise too_many(source.name, _MAX_CONFIG_NBYTES, f"bytes of {CONFIG}")
    return Nemo(weights, read(config, 0, config.nbytes), rest)


def read_tar(source: Source) -> dict[str, Source]:
    """List the regular files of a tar archive by name, without a leading `./`."""
    members: dict[str, Source] = {}
    for member in _members(source):
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if member.name.startswith("/") or ".." in parts or "\\" in member.name:
            why = f"the tar archive holds {member.name!r}, a name that points outside of it"
            raise damaged(source.name, why)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            why = f"the tar archive holds {member.name!r}, a link, a device or a sparse file"
            raise damaged(source.name, why)
        if member.pax_headers.get("size", str(member.size)) != str(member.size):
            why = f"the tar archive gives {member.name!r} the size {member.pax_headers['size']!r}"
            raise damaged(source.name, why)
        name = "/".join(parts)
        if name in members:
            raise damaged(source.name, f"the tar archive holds two members named {name!r}")
        if member.offset_data + member.size > source.nbytes:
            raise CheckpointError(
                f"{source.name}: ends inside of a member of {member.size} bytes at "
                f"{member.offset_data}",
                hint="the file is truncated: copy or download it again",
            )
        where = f"{source.name}: {name}"
        members[name] = RangeSource(source, member.offset_data, member.size, where)
    return members


def _members(source: Source) -> Iterator[TarInfo]:
    import tarfile  # 5 ms that only archives should cost

    try:
        headers = cast("IO[bytes]", _Headers(source))
        archive = tarfile.TarFile(fileobj=headers, encoding="utf-8")
        for _ in range(_MAX_MEMBERS):
            member = archive.next()
            if member is None:
                break
            yield member
        else:
            raise too_many(source.name, _MAX_MEMBERS, "members of a tar archive")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise damaged(source.name, f"the tar archive has a broken header: {error}") from error
    if "size" in archive.pax_headers:
        raise damaged(source.name, "the tar archive gives all its members one size")
    end = archive.offset
    if end + _BLOCK > source.nbytes:
        raise CheckpointError(
            f"{source.name}: a tar archive that does not end, at byte {end}",
            hint="the file is truncated: copy or download it again",
        )
    if any(read(source, end, _BLOCK)):
        raise damaged(source.name, f"the tar archive has a broken header at byte {end}")


class _Headers:
    """A source as the file that tarfile takes, of which only headers are read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0
        self._left = _MAX_HEADERS_NBYTES

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, nbytes: int) -> bytes:
        source, start = self._source, self._position
        self._left -= nbytes
        if not 0 <= nbytes <= _MAX_HEADER_NBYTES or self._left < 0:
            raise damaged(
                source.name, f"the tar archive has an extended header of {nbytes} bytes at {start}"
            )
        self._position = min(start + nbytes, source.nbytes)
        return read(source, start, self._position - start) if self._position > start else b""
