"""Whether bytes still are those that were saved: the checksums that containers have of themselves.

In: an open `Checkpoint`. Out: which of its tensors are damaged (`damages`); or an error where a
golden would be made of damaged bytes (`refuse_damaged`). Zip archives have a CRC-32 of each entry,
safetensors files have none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from zlib_ng import zlib_ng

from harness.checkpoint.tensors import Checkpoint, Checksum, Tensor
from harness.errors import CheckpointError
from harness.streaming import Chunk, Progress, buffers, chunks, map_chunks


class Damage(NamedTuple):
    """Bytes at `where`, in a file or a part of one, that do not have their CRC-32."""

    where: str
    expected: int
    actual: int


def checksums_of_tensors(
    checksums: Iterable[Checksum], tensors: Iterable[Tensor]
) -> dict[str, Checksum]:
    """The checksums of bytes that are just those of one tensor, by its key."""
    by_place = {(id(c.source), c.offset, c.nbytes): c for c in checksums}
    found = {}
    for tensor in tensors:
        storage = tensor.storage
        start = storage.offset + tensor.offset * tensor.dtype.itemsize
        checksum = by_place.get((id(storage.source), start, tensor.nbytes))
        changed = storage.big_endian or tensor.conjugate or tensor.negative
        if checksum and tensor.is_contiguous and not changed:
            found[tensor.key] = checksum
    return found


def others(checksums: Iterable[Checksum], known: Iterable[Checksum]) -> list[Checksum]:
    """The checksums of bytes that are to be read for them alone."""
    done = {id(checksum) for checksum in known}
    return [checksum for checksum in checksums if id(checksum) not in done]


def refuse_damaged(
    known: Iterable[tuple[Checksum, Sequence[int]]],
    rest: Sequence[Checksum],
    jobs: int | None,
    progress: Progress | None,
) -> None:
    """Raise CheckpointError unless every byte is as its container says.

    `known` are checksums of bytes that were read already, with the CRC-32s of their chunks; the
    rest is read now, which advances `progress`.
    """
    for checksum, crc32s in known:
        _refuse(checksum, _joined(checksum, crc32s))
    for checksum, actual in _crc32s(rest, jobs, progress):
        _refuse(checksum, actual)


def damages(
    checkpoint: Checkpoint,
    keys: Iterable[str],
    jobs: int | None,
    progress: Progress | None = None,
) -> dict[str, Damage]:
    """The first damage of each of these tensors that has one; their bytes are read once more."""
    by_source: dict[int, list[Checksum]] = defaultdict(list)
    for checksum in checkpoint.checksums:
        by_source[id(checksum.source)].append(checksum)
    of_key = {key: list(_of_tensor(by_source, checkpoint.tensors[key])) for key in keys}
    unique = {id(checksum): checksum for some in of_key.values() for checksum in some}
    wanted = [*unique.values()]
    if progress is not None:
        progress.expect(sum(checksum.nbytes for checksum in wanted))
    found = {
        id(checksum): Damage(checksum.source.name, checksum.crc32, actual)
        for checksum, actual in _crc32s(wanted, jobs, progress)
        if actual != checksum.crc32
    }
    first = {
        key: next((found[id(one)] for one in some if id(one) in found), None)
        for key, some in of_key.items()
    }
    return {key: damage for key, damage in first.items() if damage is not None}


def _of_tensor(by_source: Mapping[int, Sequence[Checksum]], tensor: Tensor) -> Iterator[Checksum]:
    from harness.checkpoint.assembled import stored_parts  # not before something differs

    for part in stored_parts(tensor):
        storage = part.storage
        for one in by_source.get(id(storage.source), ()):
            if (
                one.offset < storage.offset + storage.nbytes
                and storage.offset < one.offset + one.nbytes
            ):
                yield one


def _crc32s(
    checksums: Sequence[Checksum], jobs: int | None, progress: Progress | None
) -> list[tuple[Checksum, int]]:
    found = map_chunks(checksums, _of_chunk, jobs=jobs, progress=progress)
    return [(one, _joined(one, parts)) for one, parts in zip(checksums, found, strict=True)]


def _of_chunk(checksum: Checksum, chunk: Chunk) -> int:
    data = buffers.get("chunk", chunk.nbytes)
    checksum.source.read_into(checksum.offset + chunk.start, data.data)
    return int(zlib_ng.crc32(data.data))


def _joined(checksum: Checksum, crc32s: Sequence[int]) -> int:
    """The CRC-32 of the whole from those of its chunks."""
    joined = 0
    for chunk, crc32 in zip(chunks(checksum.nbytes), crc32s, strict=True):
        joined = zlib_ng.crc32_combine(joined, crc32, chunk.nbytes)
    return joined


def _refuse(entry: Checksum, actual: int) -> None:
    if actual != entry.crc32:
        raise CheckpointError(
            f"{entry.source.name}: its CRC-32 is {actual:08x}, but the archive says "
            f"{entry.crc32:08x}",
            hint="the bytes have changed since they were saved: get the file again",
        )
