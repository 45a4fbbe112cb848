"""Zip archives as torch writes them: where each entry's bytes are, checked before it is believed.

In: a source that is a zip archive from its first byte to its last. Out: `Entry` values, each a
source of its own. Refused: duplicate names, entries that overlap or reach into the directory,
encryption, compression other than deflate, headers that contradict the directory. Format: PKWARE
APPNOTE 6.3.10 with zip64. The standard library's zipfile accepts most of what is refused here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from harness.checkpoint.sources import (
    InflatedSource,
    RangeSource,
    Source,
    Spool,
    is_local,
    read,
)
from harness.errors import CheckpointError

MAGIC = b"PK\x03\x04"
_EOCD = struct.Struct("<4s4H2LH")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY_NBYTES = 16 << 20
_MAX_ENTRIES = 100_000
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One file of the archive, before `limit`; `crc32` is 0 where the writer left it out."""

    name: str
    archive: Source
    header_offset: int
    compressed_nbytes: int
    nbytes: int
    method: int
    crc32: int
    spool: Spool
    limit: int = 0

    @cached_property
    def source(self) -> Source:
        """The entry's bytes, inflated on first use where they are compressed."""
        where = f"{self.archive.name}: {self.name}"
        stored = RangeSource(self.archive, self.start, self.compressed_nbytes, where)
        if self.method == _STORED:
            return stored
        return InflatedSource(
            stored,
            0,
            self.compressed_nbytes,
            where,
            wbits=-15,
            nbytes=self.nbytes,
            spool=self.spool,
        )

    def start(self) -> int:
        """Where the bytes start, which only the header right before them tells."""
        fields = _LOCAL.unpack(read(self.archive, self.header_offset, _LOCAL.size))
        if fields[0] != MAGIC or fields[3] != self.method:
            raise _damaged(self.archive, f"has no header for {self.name!r} at {self.header_offset}")
        start: int = self.header_offset + _LOCAL.size + fields[9] + fields[10]
        end = start + self.compressed_nbytes
        if end > self.limit:
            raise _damaged(
                self.archive, f"places the end of {self.name!r} at {end}, outside of its room"
            )
        return start


def read_zip(source: Source) -> dict[str, Entry]:
    """Read an archive's directory; raises CheckpointError for anything inconsistent."""
    count, directory, offset = _find_directory(source)
    entries: dict[str, Entry] = {}
    for entry in _entries(source, directory, count):
        if entry.name in entries:
            raise _damaged(source, f"holds two entries named {entry.name!r}")
        entries[entry.name] = entry
    return _laid_out(source, entries, offset)


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
            f"{source.name}: a zip archive without its directory, which stands at the end",
            hint="the file is truncated, or still being written: copy or download it again",
        )
    _, disk, _, _, count, nbytes, offset, comment = _EOCD.unpack_from(tail, index)
    end = source.nbytes - tail_nbytes + index
    if end + _EOCD.size + comment != source.nbytes:
        raise _damaged(source, "has bytes after its end")
    locator = end - _LOCATOR64.size
    if locator >= 0 and read(source, locator, 4) == b"PK\x06\x07":
        _, _, end, _ = _LOCATOR64.unpack(read(source, locator, _LOCATOR64.size))
        if end + _EOCD64.size > locator:
            raise _damaged(source, "has a zip64 record outside of the file")
        record = _EOCD64.unpack(read(source, end, _EOCD64.size))
        if record[0] != b"PK\x06\x06":
            raise _damaged(source, "has no zip64 record where its locator points")
        disk, count, nbytes, offset = record[4], record[7], record[8], record[9]
    if disk:
        raise _damaged(source, "is one part of a split archive")
    if nbytes > _MAX_DIRECTORY_NBYTES or offset + nbytes > end:
        raise _damaged(source, f"has a directory of {nbytes} bytes at {offset}, outside of it")
    if count > _MAX_ENTRIES:
        raise _damaged(source, f"announces {count} entries, more than {_MAX_ENTRIES}")
    return count, read(source, offset, nbytes), offset


def _entries(source: Source, directory: bytes, count: int) -> Iterator[Entry]:
    position = 0
    spool = Spool(source.name, source.nbytes)
    for _ in range(count):
        if position + _CENTRAL.size > len(directory):
            raise _damaged(source, f"announces {count} entries, but its directory ends early")
        fields = _CENTRAL.unpack_from(directory, position)
        if fields[0] != b"PK\x01\x02":
            raise _damaged(source, "has a broken directory")
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
            raise _damaged(source, f"has an encrypted entry, {name!r}")
        if method not in (_STORED, _DEFLATED):
            raise _damaged(
                source, f"compresses {name!r} by method {method}, which torch never does"
            )
        if method == _STORED and nbytes != compressed:
            raise _damaged(source, f"gives {name!r} two sizes, {compressed} and {nbytes} bytes")
        yield Entry(
            name=name,
            archive=source,
            header_offset=header,
            compressed_nbytes=compressed,
            nbytes=nbytes,
            method=method,
            crc32=crc32,
            spool=spool,
        )
    if position != len(directory):
        raise _damaged(source, f"announces {count} entries, but its directory holds more")


def _zip64(
    source: Source, extra: bytes, nbytes: int, compressed: int, header: int
) -> tuple[int, int, int]:
    values = [nbytes, compressed, header]
    wanted = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
    position = 0
    while wanted and position + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, position)
        if tag == 1:
            if size < 8 * len(wanted) or position + 4 + size > len(extra):
                raise _damaged(source, "has a short zip64 field")
            for slot, index in enumerate(wanted):
                (values[index],) = struct.unpack_from("<Q", extra, position + 4 + 8 * slot)
            break
        position += 4 + size
    return values[0], values[1], values[2]


def _laid_out(source: Source, entries: dict[str, Entry], directory_offset: int) -> dict[str, Entry]:
    """Give each entry its room, and check that no two share bytes (as zip bombs do).

    Their headers are spread over the file: where looking costs a round trip, each is checked when
    its entry is read.
    """
    limit = directory_offset
    found = {}
    for entry in sorted(entries.values(), key=lambda entry: entry.header_offset, reverse=True):
        if entry.header_offset + _LOCAL.size + entry.compressed_nbytes > limit:
            raise _damaged(
                source,
                f"places {entry.name!r} at {entry.header_offset}, outside of it"
                if limit == directory_offset
                else f"has entries that overlap at {entry.name!r}",
            )
        found[entry.name] = replace(entry, limit=limit)
        limit = entry.header_offset
        if is_local(source):
            found[entry.name].start()
    return {name: found[name] for name in entries}


def _damaged(source: Source, why: str) -> CheckpointError:
    return CheckpointError(
        f"{source.name}: the zip archive {why}",
        hint="the file is damaged: copy or download it again",
    )
