"""`.nemo` archives: a tar of `model_config.yaml` and `model_weights.ckpt`.

In: a source that is a tar archive (PAX, GNU or plain POSIX; gzip is undone before). Out: its
members by name, each a source of its own; nothing is unpacked. Refused: absolute names and `..`,
links, devices, sparse members, duplicates, broken checksums, members that reach outside of the
file. Format: POSIX.1-2001 pax interchange format, and GNU tar's long names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from harness.checkpoint.sources.source import RangeSource, Source, damaged, read, too_many
from harness.errors import CheckpointError

_BLOCK = 512
_MAX_EXTENSION_NBYTES = 16 << 10
_MAX_CONFIG_NBYTES = 1 << 20
_MAX_EXTENSIONS_NBYTES = 2 << 20
_MAX_HEADERS = 4000
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
    for name, start, nbytes in _members(source):
        if name in members:
            raise damaged(source.name, f"the tar archive holds two members named {name!r}")
        members[name] = RangeSource(source, start, nbytes, f"{source.name}: {name}")
    return members


def _members(source: Source) -> Iterator[tuple[str, int, int]]:
    position = extended = 0
    override: dict[str, str] = {}
    for _ in range(_MAX_HEADERS):
        if position + _BLOCK > source.nbytes:
            raise CheckpointError(
                f"{source.name}: a tar archive that does not end, at byte {position}",
                hint="the file is truncated: copy or download it again",
            )
        header = read(source, position, _BLOCK)
        if not any(header):
            return
        _check_header(source, header, position)
        nbytes = _number(source, header[124:136])
        kind = header[156:157]
        start = position + _BLOCK
        if start + nbytes > source.nbytes:
            raise CheckpointError(
                f"{source.name}: ends inside of a member of {nbytes} bytes at {start}",
                hint="the file is truncated: copy or download it again",
            )
        position = start + -(-nbytes // _BLOCK) * _BLOCK
        if kind in b"xgLK":
            extended += nbytes
            if nbytes > _MAX_EXTENSION_NBYTES or extended > _MAX_EXTENSIONS_NBYTES:
                raise damaged(
                    source.name,
                    f"the tar archive has an extended header of {nbytes} bytes at {start}",
                )
            extension = read(source, start, nbytes)
            if kind == b"x":
                override |= _pax(source, extension)
            elif kind == b"L":
                override["path"] = _text(extension)
            elif kind == b"g" and "size" in _pax(source, extension):
                raise damaged(source.name, "the tar archive gives all its members one size")
            continue
        name = override.get("path") or _header_name(header)
        if "size" in override and override["size"] != str(nbytes):
            nbytes = _large_size(source, name, override["size"], start)
            position = start + -(-nbytes // _BLOCK) * _BLOCK
        sparse = "GNU.sparse" in override
        override = {}
        if kind == b"5":
            _safe_name(source, name)
            continue
        if kind not in (b"0", b"\0", b"7") or sparse:
            raise damaged(
                source.name,
                f"the tar archive holds {name!r}, which is a link, a device or a sparse file",
            )
        yield _safe_name(source, name), start, nbytes
    raise too_many(source.name, _MAX_HEADERS, "members of a tar archive")


def _large_size(source: Source, name: str, size: str, start: int) -> int:
    """A size beyond the octal field's 8 GiB, which a pax header gives in decimal."""
    if not size.isdecimal() or not size.isascii() or len(size) > 18:
        raise damaged(source.name, f"the tar archive gives {name!r} the size {size[:20]!r}")
    if start + int(size) > source.nbytes:
        raise damaged(
            source.name, f"the tar archive ends inside of {name!r}, a member of {size} bytes"
        )
    return int(size)


def _check_header(source: Source, header: bytes, position: int) -> None:
    expected = _number(source, header[148:156])
    actual = sum(header[:148]) + 8 * 32 + sum(header[156:])
    if actual != expected:
        raise damaged(
            source.name,
            f"the tar archive has a header at byte {position} with checksum {actual}, not "
            f"{expected}",
        )


def _number(source: Source, field: bytes) -> int:
    if field[0] == 0x80:  # GNU: base 256
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not all(48 <= digit < 56 for digit in digits):
        raise damaged(source.name, f"the tar archive has {field!r} where a number should be")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _header_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    posix = header[257:263] == b"ustar\0"
    return f"{prefix}/{name}" if posix and prefix else name


def _pax(source: Source, data: bytes) -> dict[str, str]:
    """The records that decide what a member is, of all that a pax header may hold."""
    records = {}
    position = 0
    while position < len(data):
        length, _, _ = data[position : position + 8].partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data) - position:
            raise damaged(source.name, "the tar archive has a broken pax header")
        record = data[position + len(length) + 1 : position + int(length) - 1]
        position += int(length)
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size"):
            records[_text(key)] = _text(value)
        elif key.startswith(b"GNU.sparse"):
            records["GNU.sparse"] = ""
    return records


def _safe_name(source: Source, name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name:
        raise damaged(
            source.name, f"the tar archive holds {name!r}, a name that points outside of it"
        )
    return "/".join(parts)
