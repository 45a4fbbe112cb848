"""Fingerprint a checkpoint: a digest per tensor, and stats, values or a sketch where asked for.

In: an open `Checkpoint`. Out: a frozen `Fingerprint`. Refused: tensors without values (meta), and,
with `check_integrity`, bytes that contradict the container's own checksums.

digest = BLAKE3 over dtype, shape and the BLAKE3 digests of the 4 MiB chunks of logical bytes;
root = BLAKE3 over the sorted (key, digest) rows. Neither depends on container, order or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3

from harness.checkpoint.dtypes import Array, DType, numpy_dtype
from harness.checkpoint.formats.nemo import CONFIG
from harness.checkpoint.sources.source import Source, read
from harness.checkpoint.tensors import Checkpoint, Checksum, Tensor
from harness.fingerprints.arithmetic import as_floats, moments_of_runs
from harness.fingerprints.fingerprint import (
    MAX_KEPT_NUMEL,
    Fingerprint,
    TensorFingerprint,
    block_numel,
    digest_of,
    of_value,
)
from harness.fingerprints.hashes import ChunkHashes, can_be_hashed, hash_chunk, join_hashes
from harness.fingerprints.integrity import (
    Run,
    check_undamaged,
    crc32s_of,
    crc32s_of_runs,
    cuts_of,
    cuts_within,
    others,
    runs_of_tensors,
)
from harness.fingerprints.residues import DEFAULT_TOLERANCE, Bits, Grid, Residues, encode
from harness.fingerprints.sketch import DEFAULT_BLOCK_NBYTES, Sketch, sketch_values
from harness.fingerprints.stats import (
    Moments,
    NonFinite,
    Stats,
    extremes_of,
    moments_of,
    stats_of,
    take_out_nonfinite,
)
from harness.streaming.chunks import Chunk, buffers, chunks, map_chunks
from harness.streaming.workers import ALL_CORES, Workers

# Elements of a part, 2 MiB as float32. On two threads float32 took 0.174 ns a byte, bfloat16 0.29;
# with an eighth of it 0.28 and 0.62, for projections want many rows, and threads waited for each
# other; with twice as much 0.176 and 0.29: it leaves the cache between the passes.
_PART_NUMEL = 1 << 19


Wanted = Callable[[Tensor], bool]


def fingerprint(
    checkpoint: Checkpoint,
    *,
    details: Wanted = lambda tensor: True,
    keep_values: Wanted = lambda tensor: tensor.numel <= MAX_KEPT_NUMEL,
    block_nbytes: int = DEFAULT_BLOCK_NBYTES,
    tolerance: tuple[float, float] = DEFAULT_TOLERANCE,
    bits: Bits | None = None,
    hashes: bool = False,
    digests: bool = True,
    sketches: bool = True,
    check_integrity: bool = False,
    workers: Workers = ALL_CORES,
) -> Fingerprint:
    """Fingerprint every tensor: digests of all, stats and values or sketch where `details` says.

    Beside sketches, residues of so many `bits` are kept for a `tolerance` (atol, rtol), and
    `hashes`, where they are asked for. Without `digests`, or `sketches`, there are none, and it
    takes less time. Memory: 20 MB a thread, plus what is kept. Raises CheckpointError.
    """
    originals = [t for t in checkpoint.tensors.values() if t.alias_of is None]
    prints = {tensor.key: of_value(tensor) for tensor in originals if tensor.dtype.is_value}
    originals = [tensor for tensor in originals if not tensor.dtype.is_value]
    runs: dict[str, list[Run]] = {}
    rest: list[Checksum] = []
    if check_integrity:
        runs = runs_of_tensors(checkpoint.checksums, originals)
        rest = others(checkpoint.checksums, (run.checksum for of in runs.values() for run in of))

    scans = []
    for tensor in originals:
        wants = details(tensor)
        keeps = wants and keep_values(tensor)
        is_sketched = sketches and wants and not keeps and tensor.dtype.is_floating
        block = block_nbytes if is_sketched else None
        # Large values are read again, where they are kept: another rank need not send them.
        carries = keeps and tensor.numel <= MAX_KEPT_NUMEL
        cuts = cuts_of(runs[tensor.key]) if tensor.key in runs else None
        grid = None if bits is None or block is None else Grid.of(tensor.dtype, *tolerance, bits)
        hashed = hashes and block is not None and can_be_hashed(tensor.dtype)
        scans.append(_Scan(tensor, cuts, wants, carries, block, grid, hashed, digests))
    workers.expect(sum(scan.nbytes for scan in scans) + sum(entry.nbytes for entry in rest))
    scanned = map_chunks(scans, _scan_chunk, workers)
    if check_integrity:
        known = [
            checked
            for tensor, parts in zip(originals, scanned, strict=True)
            if tensor.key in runs
            for checked in crc32s_of_runs(
                runs[tensor.key], tensor.nbytes, [crc32 for part in parts for crc32 in part.crc32s]
            )
        ]
        check_undamaged(known, rest, workers)
    for tensor, scan, parts in zip(originals, scans, scanned, strict=True):
        joined = _join(scan, parts)
        if joined.values is None and details(tensor) and keep_values(tensor):
            kept = bytearray(tensor.nbytes)
            tensor.read_into(0, memoryview(kept))
            joined = replace(joined, values=bytes(kept))
        prints[tensor.key] = joined
        parts.clear()  # the sketches of a large checkpoint are not held twice
    table = {}
    for key, tensor in checkpoint.tensors.items():
        if tensor.alias_of is None:
            table[key] = prints[key]
        else:
            table[key] = replace(prints[tensor.alias_of], key=key, alias_of=tensor.alias_of)
    return Fingerprint(
        name=checkpoint.name,
        container=checkpoint.container,
        section=checkpoint.section,
        tensors=table,
        unread=checkpoint.unread,
        others=checkpoint.others,
        keeps_aliases=checkpoint.keeps_aliases,
        block_nbytes=block_nbytes,
        tolerance=tolerance,
        bits=bits,
    )


def with_digests(outlined: Fingerprint, part: Checkpoint, workers: Workers) -> Fingerprint:
    """Add the digests of the tensors in a part of the checkpoint, which are read."""
    known = fingerprint(part, details=lambda tensor: False, workers=workers).tensors
    tensors = {
        key: replace(tensor, digest=known[key].digest) if key in known else tensor
        for key, tensor in outlined.tensors.items()
    }
    return replace(outlined, tensors=tensors)


def with_settings(
    found: Fingerprint, checkpoint: Checkpoint, known: Fingerprint | None = None
) -> Fingerprint:
    """Add what a checkpoint carries beside its weights: the configuration, digests of files.

    The text of a configuration that is `known` is not parsed again.
    """
    members = {name: _of_member(source) for name, source in checkpoint.members.items()}
    if known is not None and CONFIG in members and members[CONFIG] == known.members.get(CONFIG):
        return replace(found, config=known.config, members=members)
    return replace(found, config=checkpoint.config, members=members)


def _of_member(source: Source) -> str:
    hasher = blake3()
    for chunk in chunks(source.nbytes):
        hasher.update(read(source, chunk.start, chunk.nbytes))
    return f"{source.nbytes:,} bytes, digest {hasher.hexdigest()[:16]}"


def statistics(
    tensors: Sequence[Tensor | TensorFingerprint],
    workers: Workers = ALL_CORES,
) -> list[Stats]:
    """The stats of tensors whose values can be read. Memory: 20 MB a thread."""
    scans = [_Scan(tensor, None, True, False, None) for tensor in tensors]
    scanned = map_chunks(scans, _scan_chunk, workers)
    return [stats_of([m for part in parts for m in part.moments]) for parts in scanned]


def residues_of(tensor: Tensor, grid: Grid) -> Residues | None:
    """The residues of a tensor, which is read; None where it reaches beyond the grid."""
    found = []
    for chunk in chunks(tensor.nbytes):
        data = buffers.get("chunk", chunk.nbytes)
        tensor.read_into(chunk.start, data.data)
        parts = _parts(data, tensor.dtype, None)
        found += [encode(as_floats(part, tensor.dtype), grid) for part in parts]
    return Residues.joined(found)


@dataclass(frozen=True, slots=True)
class _ChunkPrint:
    digest: bytes
    crc32s: tuple[int, ...] = ()
    moments: tuple[Moments, ...] = ()
    sketches: tuple[Sketch, ...] = ()
    residues: tuple[Residues | None, ...] = ()
    hashes: ChunkHashes | None = None
    values: bytes = b""


@dataclass(frozen=True, slots=True)
class _Scan:
    """What is asked of one tensor, beside its digest, as work for `map_chunks`.

    `cuts` are where a chunk is cut into pieces that have a CRC-32 each; None wants none.
    """

    tensor: Tensor | TensorFingerprint
    cuts: Sequence[int] | None
    wants_stats: bool
    carries_values: bool
    block_nbytes: int | None
    grid: Grid | None = None
    wants_hashes: bool = False
    wants_digest: bool = True

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def part(self, chunk: Chunk) -> _Scan:
        tensor = self.tensor.part(chunk.start, chunk.nbytes)
        return replace(self, tensor=tensor, cuts=self.cuts and cuts_within(self.cuts, chunk))


def _scan_chunk(scan: _Scan, chunk: Chunk) -> _ChunkPrint:
    tensor, block_nbytes = scan.tensor, scan.block_nbytes
    data = buffers.get("chunk", chunk.nbytes)
    tensor.read_into(chunk.start, data.data)
    digest = blake3(data.data).digest() if scan.wants_digest else b""
    crc32s = () if scan.cuts is None else crc32s_of(data, chunk, scan.cuts)
    if not scan.wants_stats:
        return _ChunkPrint(digest, crc32s)
    moments, sketches, residues = [], [], []
    # Of the whole chunk at once, where it is all finite: fewer calls let threads wait less.
    of_chunk = extremes_of(data.view(numpy_dtype(tensor.dtype))) if _is_ieee(tensor.dtype) else None
    for part in _parts(data, tensor.dtype, block_nbytes):
        values = as_floats(part, tensor.dtype)
        if scan.grid is not None:
            residues.append(encode(values, scan.grid))
        finite, nonfinite = values, NonFinite()
        extremes = of_chunk if of_chunk and of_chunk.are_finite else extremes_of(values)
        if not extremes.are_finite:
            values = values.copy()  # which may be the data itself
            finite, nonfinite = take_out_nonfinite(values)
            extremes = extremes_of(finite)
        # Runs of the same length whatever the blocks are, for stats of the same last bits.
        run = block_numel(tensor.dtype, DEFAULT_BLOCK_NBYTES)
        runs = moments_of_runs(values, run)
        if block_nbytes is not None:
            numel = block_numel(tensor.dtype, block_nbytes)
            squares = _joined(runs.squares, numel // run) if numel % run == 0 else None
            sketches.append(sketch_values(values, numel, squares))
        moments.append(moments_of(finite, runs, extremes, nonfinite))
    hashes = None
    if scan.wants_hashes:
        is_finite = of_chunk is not None and of_chunk.are_finite
        hashes = hash_chunk(data, tensor.dtype, may_be_nan=not is_finite)
    kept = data.tobytes() if scan.carries_values else b""
    return _ChunkPrint(
        digest, crc32s, tuple(moments), tuple(sketches), tuple(residues), hashes, kept
    )


def _joined(squares: Array, count: int) -> Array:
    """Sums of `count` neighbours each, the last perhaps of fewer."""
    return np.add.reduceat(squares, np.arange(0, len(squares), count))


def _parts(data: Array, dtype: DType, block_nbytes: int | None) -> Iterator[Array]:
    """Cut a chunk near every _PART_NUMEL elements, where a block ends."""
    block = 1 if block_nbytes is None else block_numel(dtype, block_nbytes)
    step = max(1, _PART_NUMEL // block) * block * dtype.component_nbytes
    return (data[start : start + step] for start in range(0, data.size, step))


def _is_ieee(dtype: DType) -> bool:
    """Whether its numbers are ordered as their bits are, and NaN and infinity have the greatest."""
    return dtype.is_floating and dtype.component_nbytes > 1


def _join(scan: _Scan, parts: Sequence[_ChunkPrint]) -> TensorFingerprint:
    tensor = scan.tensor
    sketches = [sketch for part in parts for sketch in part.sketches]
    return TensorFingerprint(
        key=tensor.key,
        dtype=tensor.dtype,
        shape=tensor.shape,
        digest=digest_of(tensor.dtype, tensor.shape, [part.digest for part in parts])
        if scan.wants_digest
        else None,
        stats=stats_of([m for part in parts for m in part.moments]) if scan.wants_stats else None,
        values=b"".join(part.values for part in parts) if scan.carries_values else None,
        sketch=Sketch(
            projections=np.concatenate([sketch.projections for sketch in sketches]),
            norms=np.concatenate([sketch.norms for sketch in sketches]),
        )
        if sketches
        else None,
        residues=Residues.joined([one for part in parts for one in part.residues]),
        hashes=join_hashes([part.hashes for part in parts if part.hashes is not None])
        if scan.wants_hashes
        else None,
    )
