"""Whether bytes still are those that were saved: the checksums that containers have of themselves.

In: an open `Checkpoint`. Out: which of its tensors are damaged (`damages`); or an error where a
golden would be made of damaged bytes (`check_undamaged`). Zip archives have a CRC-32 of each entry,
safetensors files have none.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from zlib_ng import zlib_ng

from harness.checkpoint.dtypes import Array
from harness.checkpoint.tensors import Checkpoint, Checksum, Tensor
from harness.errors import CheckpointError
from harness.streaming.chunks import Chunk, buffers, chunks, map_chunks
from harness.streaming.workers import ALL_CORES, Workers


class Damage(NamedTuple):
    """Bytes at `where`, in a file or a part of one, that do not have their CRC-32."""

    where: str
    expected: int
    actual: int


class Run(NamedTuple):
    """Logical bytes of a tensor, from `start` on, that are just those that have the checksum."""

    start: int
    checksum: Checksum

    @property
    def stop(self) -> int:
        return self.start + self.checksum.nbytes


def runs_of_tensors(
    checksums: Iterable[Checksum], tensors: Iterable[Tensor]
) -> dict[str, list[Run]]:
    """By key, the runs of a tensor's logical bytes that have checksums, in order.

    Who goes through the tensor has them on the way: its bytes need not be read for them again.
    """
    from harness.checkpoint.formats.assembled import stored_runs

    by_place = {(id(c.source), c.offset, c.nbytes): c for c in checksums}
    found: dict[str, list[Run]] = {}
    for tensor in tensors if by_place else ():
        for start, part in stored_runs(tensor):
            storage = part.storage
            place = storage.offset + part.offset * part.dtype.itemsize
            checksum = by_place.get((id(storage.source), place, part.nbytes))
            changed = storage.big_endian or part.conjugate or part.negative
            if checksum and part.is_contiguous and not changed:
                found.setdefault(tensor.key, []).append(Run(start, checksum))
    return found


def cuts_of(runs: Iterable[Run]) -> tuple[int, ...]:
    """Where the logical bytes are to be cut so that each run is whole pieces."""
    return tuple(sorted({place for run in runs for place in (run.start, run.stop)}))


def cuts_within(cuts: Sequence[int], chunk: Chunk) -> Sequence[int]:
    return cuts[bisect_right(cuts, chunk.start) : bisect_left(cuts, chunk.start + chunk.nbytes)]


def crc32s_of(data: Array, chunk: Chunk, cuts: Sequence[int]) -> tuple[int, ...]:
    """The CRC-32 of each piece of a chunk, whose bytes are `data`."""
    inside = cuts_within(cuts, chunk)
    if not inside:
        return (zlib_ng.crc32(data.data),)
    edges = [0, *(cut - chunk.start for cut in inside), chunk.nbytes]
    return tuple(zlib_ng.crc32(data[start:stop].data) for start, stop in pairwise(edges))


def crc32s_of_runs(
    runs: Sequence[Run], nbytes: int, crc32s: Iterable[int]
) -> Iterator[tuple[Checksum, int]]:
    """The runs' checksums, each with what it is now, from those of all pieces of a tensor."""
    edges = sorted({*cuts_of(runs), *(chunk.start for chunk in chunks(nbytes)), nbytes})
    left = iter([*zip(pairwise(edges), crc32s, strict=True)])
    for run in runs:
        joined = 0
        for (start, stop), crc32 in left:
            if start >= run.start:
                joined = zlib_ng.crc32_combine(joined, crc32, stop - start)
            if stop == run.stop:
                break
        yield run.checksum, joined


def others(checksums: Iterable[Checksum], known: Iterable[Checksum]) -> list[Checksum]:
    """The checksums of bytes that are to be read for them alone."""
    done = {id(checksum) for checksum in known}
    return [checksum for checksum in checksums if id(checksum) not in done]


def check_undamaged(
    known: Iterable[tuple[Checksum, int]],
    rest: Sequence[Checksum],
    workers: Workers,
) -> None:
    """Raise CheckpointError unless every byte is as its container says.

    `known` are checksums of bytes that were read already, with what they are now; the rest is read
    now.
    """
    for checksum, actual in (*known, *_crc32s(rest, workers)):
        _refuse(checksum, actual)


def damages(
    checkpoint: Checkpoint,
    keys: Iterable[str],
    workers: Workers = ALL_CORES,
) -> dict[str, Damage]:
    """The first damage of each of these tensors that has one; their bytes are read once more."""
    by_source: dict[int, list[Checksum]] = defaultdict(list)
    for checksum in checkpoint.checksums:
        by_source[id(checksum.source)].append(checksum)
    of_key = {key: list(_of_tensor(by_source, checkpoint.tensors[key])) for key in keys}
    unique = {id(checksum): checksum for some in of_key.values() for checksum in some}
    wanted = [*unique.values()]
    workers.expect(sum(checksum.nbytes for checksum in wanted))
    found = {
        id(checksum): Damage(checksum.source.name, checksum.crc32, actual)
        for checksum, actual in _crc32s(wanted, workers)
        if actual != checksum.crc32
    }
    first = {
        key: next((found[id(one)] for one in some if id(one) in found), None)
        for key, some in of_key.items()
    }
    return {key: damage for key, damage in first.items() if damage is not None}


def _of_tensor(by_source: Mapping[int, Sequence[Checksum]], tensor: Tensor) -> Iterator[Checksum]:
    from harness.checkpoint.formats.assembled import stored_parts  # not before something differs

    for part in stored_parts(tensor):
        storage = part.storage
        for one in by_source.get(id(storage.source), ()):
            if (
                one.offset < storage.offset + storage.nbytes
                and storage.offset < one.offset + one.nbytes
            ):
                yield one


def _crc32s(checksums: Sequence[Checksum], workers: Workers) -> list[tuple[Checksum, int]]:
    found = map_chunks(checksums, _of_chunk, workers)
    return [
        (checksum, crc32)
        for one, crc32s in zip(checksums, found, strict=True)
        for checksum, crc32 in crc32s_of_runs([Run(0, one)], one.nbytes, crc32s)
    ]


def _of_chunk(checksum: Checksum, chunk: Chunk) -> int:
    data = buffers.get("chunk", chunk.nbytes)
    checksum.source.read_into(checksum.offset + chunk.start, data.data)
    return int(zlib_ng.crc32(data.data))


def _refuse(entry: Checksum, actual: int) -> None:
    if actual != entry.crc32:
        raise CheckpointError(
            f"{entry.source.name}: its CRC-32 is {actual:08x}, but the archive says "
            f"{entry.crc32:08x}",
            hint="the bytes have changed since they were saved: get the file again",
        )
