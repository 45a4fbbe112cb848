"""Zip archives as torch writes them: where each entry's bytes are, checked before it is believed.

In: a source that is a zip archive from its first byte to its last. Out: `Entry` values, each a
source of its own. Refused: duplicate names, entries that overlap or reach into the directory,
encryption, compression other than deflate, headers that contradict the directory. Format: PKWARE
APPNOTE 6.3.10 with zip64. The standard library's zipfile accepts most of what is refused here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from harness.checkpoint.limits import MAX_TENSORS
from harness.checkpoint.sources.inflated import InflatedSource
from harness.checkpoint.sources.scratch import Scratch
from harness.checkpoint.sources.source import RangeSource, Source, damaged, read, too_many
from harness.errors import CheckpointError

MAGIC = b"PK\x03\x04"
_EOCD = struct.Struct("<4s4H2LH")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY_NBYTES = 256 << 20
_STORED, _DEFLATED = 0, 8
_ELSEWHERE = 0xFFFFFFFF  # the number is in the zip64 field


class Entry(NamedTuple):
    """One file of the archive; `crc32` is 0 where the writer left it out."""

    name: str
    nbytes: int
    crc32: int
    source: Source


class _Row(NamedTuple):
    """What the directory says of an entry."""

    name: str
    header_offset: int
    compressed_nbytes: int
    nbytes: int
    method: int
    crc32: int


def read_zip(source: Source) -> dict[str, Entry]:
    """Read an archive's directory; raises CheckpointError for anything inconsistent.

    The entries' headers are spread over the file: where looking costs a round trip, each is
    checked when its entry is read.
    """
    count, directory, offset = _find_directory(source)
    rows = {}
    for row in _rows(source, directory, count):
        if row.name in rows:
            raise _broken(source, f"holds two entries named {row.name!r}")
        rows[row.name] = row
    limits = _limits(source, rows.values(), offset)
    scratch, local = Scratch(source.name), source.is_local()
    entries = {}
    for row in rows.values():
        find = partial(_start, source, row, limits[row.name])
        start = find() if local else find
        entries[row.name] = Entry(
            row.name, row.nbytes, row.crc32, _bytes_of(source, row, start, scratch)
        )
    return entries


def _find_directory(source: Source) -> tuple[int, bytes, int]:
    """Return the number of entries, the directory's bytes and its offset."""
    # The longest comment makes the longest tail; torch writes none.
    for comment in (0, 0xFFFF):
        tail_nbytes = min(source.nbytes, _EOCD.size + comment)
        tail = read(source, source.nbytes - tail_nbytes, tail_nbytes)
        index = tail.rfind(b"PK\x05\x06")
        if index == 0:
            break
    if index < 0 or len(tail) - index < _EOCD.size:
        raise CheckpointError(
            f"{source.name}: a zip archive without its directory, which is at the end of the file",
            hint="the file is truncated, or still being written: copy or download it again",
        )
    _, disk, _, _, count, nbytes, offset, comment = _EOCD.unpack_from(tail, index)
    end = source.nbytes - tail_nbytes + index
    if end + _EOCD.size + comment != source.nbytes:
        raise _broken(source, "has bytes after its end")
    locator = end - _LOCATOR64.size
    if locator >= 0 and read(source, locator, 4) == b"PK\x06\x07":
        _, _, end, _ = _LOCATOR64.unpack(read(source, locator, _LOCATOR64.size))
        if end + _EOCD64.size > locator:
            raise _broken(source, "has a zip64 record outside of the file")
        record = _EOCD64.unpack(read(source, end, _EOCD64.size))
        if record[0] != b"PK\x06\x06":
            raise _broken(source, "has no zip64 record where its locator points")
        disk, count, nbytes, offset = record[4], record[7], record[8], record[9]
    if disk:
        raise _broken(source, "is one part of a split archive")
    if offset + nbytes > end:
        raise _broken(source, f"has a directory of {nbytes} bytes at {offset}, outside of it")
    if nbytes > _MAX_DIRECTORY_NBYTES:
        raise too_many(source.name, _MAX_DIRECTORY_NBYTES, "bytes of a zip archive's directory")
    # Each takes some bytes of the directory.
    if count > MAX_TENSORS:
        raise too_many(source.name, MAX_TENSORS, "entries of a zip archive")
    return count, read(source, offset, nbytes), offset


def _rows(source: Source, directory: bytes, count: int) -> Iterator[_Row]:
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(directory):
            raise _broken(source, f"claims {count} entries, but its directory ends early")
        fields = _CENTRAL.unpack_from(directory, position)
        if fields[0] != b"PK\x01\x02":
            raise _broken(source, "has a broken directory")
        flags, method, crc32, compressed, nbytes = fields[3], fields[4], *fields[7:10]
        name_nbytes, extra_nbytes, comment_nbytes, header = *fields[10:13], fields[16]
        position += _CENTRAL.size
        raw_name = directory[position : position + name_nbytes]
        extra = directory[position + name_nbytes : position + name_nbytes + extra_nbytes]
        position += name_nbytes + extra_nbytes + comment_nbytes
        nbytes, compressed, header = _zip64(source, extra, nbytes, compressed, header)
        try:
            name = raw_name.decode()
        except UnicodeDecodeError:
            name = raw_name.decode("cp437")
        if flags & 0x1:
            raise _broken(source, f"has an encrypted entry, {name!r}")
        if method not in (_STORED, _DEFLATED):
            raise _broken(source, f"compresses {name!r} by method {method}, which torch never does")
        if method == _STORED and nbytes != compressed:
            raise _broken(source, f"gives {name!r} two sizes, {compressed} and {nbytes} bytes")
        yield _Row(name, header, compressed, nbytes, method, crc32)
    if position != len(directory):
        raise _broken(source, f"claims {count} entries, but its directory holds more")


def _zip64(
    source: Source, extra: bytes, nbytes: int, compressed: int, header: int
) -> tuple[int, int, int]:
    values = [nbytes, compressed, header]
    if _ELSEWHERE not in values:
        return nbytes, compressed, header
    wanted = [index for index, value in enumerate(values) if value == _ELSEWHERE]
    position = 0
    while wanted and position + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, position)
        if tag == 1:
            if size < 8 * len(wanted) or position + 4 + size > len(extra):
                raise _broken(source, "has a short zip64 field")
            for slot, index in enumerate(wanted):
                (values[index],) = struct.unpack_from("<Q", extra, position + 4 + 8 * slot)
            break
        position += 4 + size
    return values[0], values[1], values[2]


def _limits(source: Source, rows: Iterable[_Row], directory_offset: int) -> dict[str, int]:
    """Where each entry has to end, by name: no two share bytes, as they do in zip bombs."""
    limit = directory_offset
    limits = {}
    for row in sorted(rows, key=attrgetter("header_offset"), reverse=True):
        if row.header_offset + _LOCAL.size + row.compressed_nbytes > limit:
            raise _broken(
                source,
                f"places {row.name!r} at {row.header_offset}, outside of it"
                if limit == directory_offset
                else f"has entries that overlap at {row.name!r}",
            )
        limits[row.name] = limit
        limit = row.header_offset
    return limits


def _start(source: Source, row: _Row, limit: int) -> int:
    """Where an entry's bytes start, which only the header right before them tells."""
    fields = _LOCAL.unpack(read(source, row.header_offset, _LOCAL.size))
    if fields[0] != MAGIC or fields[3] != row.method:
        raise _broken(source, f"has no header for {row.name!r} at {row.header_offset}")
    start: int = row.header_offset + _LOCAL.size + fields[9] + fields[10]
    end = start + row.compressed_nbytes
    if end > limit:
        raise _broken(source, f"places the end of {row.name!r} at {end}, outside of its room")
    return start


def _bytes_of(
    source: Source, row: _Row, start: int | Callable[[], int], scratch: Scratch
) -> Source:
    """An entry's bytes, inflated on first use where they are compressed."""
    where = f"{source.name}: {row.name}"
    stored = RangeSource(source, start, row.compressed_nbytes, where)
    if row.method == _STORED:
        return stored
    return InflatedSource(stored, where, wbits=-15, nbytes=row.nbytes, scratch=scratch)


def _broken(source: Source, why: str) -> CheckpointError:
    return damaged(source.name, f"the zip archive {why}")
