"""Thousands of small archives in a row, each of which `torch.save` wrote of one tensor.

In: the range of a file that is one archive. Out: its object, as `read_torch_zip` returns it, at a
tenth of the cost where an archive of the same dtype and shape was read before. Refused: what
`read_torch_zip` refuses, and tensors that are no views of their storage.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace

from harness.checkpoint.formats.torchfile import TorchFile, read_torch_zip
from harness.checkpoint.formats.zips import read_zip
from harness.checkpoint.sources.source import RangeSource, Source, read
from harness.checkpoint.tensors import Checksum, Tensor, tensor_table
from harness.checkpoint.unpickling.opcodes import Budget

_HEAD_NBYTES = 1024
_TAIL_NBYTES = 2048
_KEY_NBYTES = 256  # the pickle, which says dtype and shape, or most of it
_MAX_TEMPLATES = 1024  # of about 4 KB each


def ends(start: int, nbytes: int) -> list[tuple[int, int]]:
    """The ranges of a file that are read of an archive like others before, in order."""
    end = start + nbytes
    return [(start, min(start + _HEAD_NBYTES, end)), (max(start, end - _TAIL_NBYTES), end)]


class TensorArchives:
    """Reads archives, and remembers what they look like."""

    def __init__(self, budget: Budget) -> None:
        """`budget` as for `read_torch_zip`."""
        self._budget = budget
        self._templates: dict[tuple[int, bytes], _Template] = {}

    def read(self, archive: Source) -> TorchFile:
        """Read one archive; raises CheckpointError."""
        nbytes = archive.nbytes
        head = read(archive, 0, min(_HEAD_NBYTES, nbytes))
        template = self._templates.get((nbytes, head[:_KEY_NBYTES]))
        if template is not None:
            alike = template.match(archive, head)
            if alike is not None:
                return alike
        file = read_torch_zip(archive, budget=self._budget)
        if isinstance(file.root, Tensor):
            tensor_table(archive.name, [file.root])  # checks that it is a view of its storage
        template = _template(archive, head, file)
        if template is not None and len(self._templates) < _MAX_TEMPLATES:
            self._templates[nbytes, head[:_KEY_NBYTES]] = template
        return file


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Template:
    """What surrounds the bytes of a tensor in an archive that was read in full.

    Archives of tensors of one dtype and shape differ in those bytes, their CRC-32 (at two places),
    and a serial number with its own. All else being equal, they say the same.
    """

    file: TorchFile
    tensor: Tensor
    head: bytes
    tail: bytes
    crc32_at: tuple[slice, slice]
    serial_at: tuple[slice, ...]

    def match(self, archive: Source, head: bytes) -> TorchFile | None:
        """Read another archive of as many bytes, which starts with `head`; None if it differs."""
        tail = read(archive, archive.nbytes - len(self.tail), len(self.tail))
        first, second = (tail[place] for place in self.crc32_at)
        if (
            first != second
            or not head.startswith(self.head)
            or _without(tail, self.crc32_at + self.serial_at) != self.tail
        ):
            return None
        start, nbytes = len(self.head), self.tensor.storage.nbytes
        source = RangeSource(archive, start, nbytes, archive.name)
        return replace(
            self.file,
            root=replace(self.tensor, storage=replace(self.tensor.storage, source=source)),
            checksums=(Checksum(source, 0, nbytes, int.from_bytes(first, "little")),),
        )


def _template(archive: Source, head: bytes, file: TorchFile) -> _Template | None:
    """Remember an archive as torch writes it today; None for any other."""
    entries = {name.partition("/")[2]: entry for name, entry in read_zip(archive).items()}
    data, serial = entries.get("data/0"), entries.get(".data/serialization_id")
    if data is None or serial is None or sum(name.startswith("data/") for name in entries) != 1:
        return None
    match file.root, data.source, serial.source:
        case Tensor() as tensor, RangeSource() as values, RangeSource() as number:
            start, end = values.locate(), values.locate() + data.nbytes
            place = number.locate() - end
        case _:
            return None
    if start > len(head) or archive.nbytes - end > _TAIL_NBYTES or place < 0:
        return None
    tail = read(archive, end, archive.nbytes - end)
    crc32s = (re.escape(struct.pack("<L", entry.crc32)) for entry in (data, serial))
    found = [[slice(*match.span()) for match in re.finditer(crc32, tail)] for crc32 in crc32s]
    if [len(places) for places in found] != [2, 2]:
        return None
    (first, second), of_serial = found
    serial_at = (*of_serial, slice(place, place + serial.nbytes))
    return _Template(
        file=file,
        tensor=tensor,
        head=head[:start],
        tail=_without(tail, (first, second, *serial_at)),
        crc32_at=(first, second),
        serial_at=serial_at,
    )


def _without(data: bytes, places: tuple[slice, ...]) -> bytes:
    rest = bytearray(data)
    for place in places:
        rest[place] = bytes(place.stop - place.start)
    return bytes(rest)
