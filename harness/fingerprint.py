"""Fingerprint a checkpoint: a digest per tensor, and stats, values or a sketch where asked for.

In: an open `Checkpoint`. Out: a frozen `Fingerprint`. Refused: tensors without values (meta), and,
with `check_integrity`, bytes that contradict the container's own checksums.

digest = BLAKE3 over dtype, shape and the BLAKE3 digests of the 4 MiB chunks of logical bytes;
root = BLAKE3 over the sorted (key, digest) rows. Neither depends on container, order or threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numkong
import numpy as np
from blake3 import blake3
from zlib_ng import zlib_ng

from harness.arithmetic import Runs, moments_of_runs
from harness.cache import DigestCache
from harness.checkpoint.tensors import Checkpoint, DType, Tensor, numpy_dtype
from harness.integrity import checksums_of_tensors, others, refuse_damaged
from harness.sketch import (
    DEFAULT_BLOCK_NBYTES,
    MatrixDType,
    Sketch,
    sketch_values,
    total_squares,
)
from harness.streaming import (
    Chunk,
    Progress,
    buffers,
    map_chunks,
)

Array = np.ndarray[Any, np.dtype[Any]]

MAX_KEPT_NUMEL = 4096
# Elements of a part, 2 MiB as float32. On two threads float32 took 0.174 ns a byte, bfloat16 0.29;
# with an eighth of it 0.28 and 0.62, for projections want many rows, and threads waited for each
# other; with twice as much 0.176 and 0.29: it leaves the cache between the passes.
_PART_NUMEL = 1 << 19


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """float64 statistics over the finite elements (both components of complex ones), and counts.

    int64 beyond 2**53 is rounded; packed types count their bytes.
    """

    min: float
    max: float
    mean: float
    std: float
    l2: float
    num_zero: int
    num_nan: int
    num_posinf: int
    num_neginf: int

    @property
    def num_nonfinite(self) -> int:
        return self.num_nan + self.num_posinf + self.num_neginf

    @property
    def absmax(self) -> float:
        """The greatest magnitude among the finite elements."""
        return max(abs(self.min), abs(self.max))


@dataclass(frozen=True, kw_only=True)
class TensorPrint:
    """The fingerprint of one tensor; `values` are its logical bytes where they are kept."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    digest: bytes | None
    alias_of: str | None = None
    stats: Stats | None = None
    values: bytes | None = None
    sketch: Sketch | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with logical bytes from `start`, if the values are kept."""
        if self.values is None:
            raise ValueError(f"the values of {self.key!r} are not kept")
        buffer[:] = self.values[start : start + len(buffer)]

    def part(self, start: int, nbytes: int) -> TensorPrint:
        """The same, with these values alone."""
        values = None if self.values is None else self.values[start : start + nbytes]
        return _Excerpt(**{**vars(self), "values": values}, first=start)


@dataclass(frozen=True, kw_only=True)
class _Excerpt(TensorPrint):
    """What a large tensor's values, from byte `first` on, are to another process."""

    first: int

    def read_into(self, start: int, buffer: memoryview) -> None:
        super().read_into(start - self.first, buffer)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What is known of a checkpoint; `name` says where it came from.

    `num_cached` tensors were not read: a cache knew their digests.
    """

    name: str
    container: str
    section: str
    tensors: Mapping[str, TensorPrint]
    keeps_aliases: bool = True
    block_nbytes: int = DEFAULT_BLOCK_NBYTES
    config: Mapping[str, Any] | None = None
    num_cached: int = 0

    @property
    def matrix(self) -> MatrixDType:
        """The P of its sketches: all that were made together have the same."""
        sketches = (t.sketch for t in self.tensors.values() if t.sketch is not None)
        return next((sketch.matrix for sketch in sketches), "float32")

    @cached_property
    def root(self) -> bytes:
        """One name of 32 bytes for the whole model, the same in every container."""
        hasher = blake3(b"checkpoint-harness root 1\n")
        rows = ((key.encode("utf-8", "surrogatepass"), t.digest) for key, t in self.tensors.items())
        for key, digest in sorted(rows, key=lambda row: row[0]):
            if digest is None:
                raise ValueError("a fingerprint without digests has no root")
            hasher.update(len(key).to_bytes(8, "little") + key + digest)
        return hasher.digest()


Wanted = Callable[[Tensor], bool]


def fingerprint(
    checkpoint: Checkpoint,
    *,
    details: Wanted = lambda tensor: True,
    keep_values: Wanted = lambda tensor: tensor.numel <= MAX_KEPT_NUMEL,
    block_nbytes: int = DEFAULT_BLOCK_NBYTES,
    matrix: MatrixDType = "float32",
    check_integrity: bool = False,
    cache: DigestCache | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Fingerprint:
    """Fingerprint every tensor: digests of all, stats and values or sketch where `details` says.

    What `cache` knows and `details` does not ask for is not read. Memory: 20 MB a thread, plus
    what is kept. Raises CheckpointError, and UsageError for a cache that cannot be used.
    """
    originals = [t for t in checkpoint.tensors.values() if t.alias_of is None]
    prints = _cached(originals, details, cache)
    num_cached = len(prints)
    originals = [t for t in originals if t.key not in prints]
    checksums = checksums_of_tensors(checkpoint.checksums, originals) if check_integrity else {}
    rest = others(checkpoint.checksums, checksums.values()) if check_integrity else []

    scans = []
    for tensor in originals:
        wants = details(tensor)
        keeps = wants and keep_values(tensor)
        block = block_nbytes if wants and not keeps and tensor.dtype.is_floating else None
        # Large values are read again, where they are kept: another rank need not send them.
        carries = keeps and tensor.numel <= MAX_KEPT_NUMEL
        scans.append(_Scan(tensor, tensor.key in checksums, wants, carries, block, matrix))
    if progress is not None:
        progress.expect(sum(scan.nbytes for scan in scans) + sum(entry.nbytes for entry in rest))
    scanned = map_chunks(scans, _scan_chunk, jobs=jobs, progress=progress)
    if check_integrity:
        known = [
            (checksums[tensor.key], [part.crc32 for part in parts])
            for tensor, parts in zip(originals, scanned, strict=True)
            if tensor.key in checksums
        ]
        refuse_damaged(known, rest, jobs, progress)
    for tensor, scan, parts in zip(originals, scans, scanned, strict=True):
        joined = _join(scan, parts)
        if joined.values is None and details(tensor) and keep_values(tensor):
            kept = bytearray(tensor.nbytes)
            tensor.read_into(0, memoryview(kept))
            joined = replace(joined, values=bytes(kept))
        prints[tensor.key] = joined
        parts.clear()  # the sketches of a large checkpoint are not held twice
    if cache is not None:
        digests = {key: t.digest for key, t in prints.items() if t.digest is not None}
        cache.keep(originals, digests)
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
        keeps_aliases=checkpoint.keeps_aliases,
        block_nbytes=block_nbytes,
        num_cached=num_cached,
    )


def _cached(
    tensors: Sequence[Tensor], details: Wanted, cache: DigestCache | None
) -> dict[str, TensorPrint]:
    """What need not be read, by key."""
    if cache is None:
        return {}
    wanted = [tensor for tensor in tensors if not details(tensor)]
    known = cache.known(wanted)
    return {
        t.key: TensorPrint(key=t.key, dtype=t.dtype, shape=t.shape, digest=known[t.key])
        for t in wanted
        if t.key in known
    }


def outline(checkpoint: Checkpoint) -> Fingerprint:
    """The keys, dtypes and shapes alone: nothing is read but the structure."""
    return Fingerprint(
        name=checkpoint.name,
        container=checkpoint.container,
        section=checkpoint.section,
        keeps_aliases=checkpoint.keeps_aliases,
        tensors={
            key: TensorPrint(
                key=key, dtype=t.dtype, shape=t.shape, digest=None, alias_of=t.alias_of
            )
            for key, t in checkpoint.tensors.items()
        },
    )


def statistics(
    tensors: Sequence[Tensor | TensorPrint],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> list[Stats]:
    """The stats of tensors whose values can be read. Memory: 20 MB a thread."""
    scans = [_Scan(tensor, False, True, False, None) for tensor in tensors]
    scanned = map_chunks(scans, _scan_chunk, jobs=jobs, progress=progress)
    return [_stats([m for part in parts for m in part.moments]) for parts in scanned]


def block_numel(dtype: DType, block_nbytes: int) -> int:
    """Elements of one sketch block; complex elements count as two."""
    return max(1, block_nbytes // _component_nbytes(dtype))


def digest_of(dtype: DType, shape: tuple[int, ...], chunk_digests: list[bytes]) -> bytes:
    """Join the digests of a tensor's chunks into the tensor's."""
    sizes = ", ".join(map(str, shape))
    header = f'["checkpoint-harness tensor 1", "{dtype.name}", [{sizes}]]\n'
    return blake3(header.encode() + b"".join(chunk_digests)).digest()


@dataclass(frozen=True, slots=True)
class _Moments:
    """Statistics of a part, to be joined (Chan, Golub & LeVeque 1979)."""

    count: int
    min: float
    max: float
    mean: float
    m2: float
    sum_squares: float
    num_zero: int
    num_nan: int
    num_posinf: int
    num_neginf: int


@dataclass(frozen=True, slots=True)
class _ChunkPrint:
    digest: bytes
    crc32: int = 0
    moments: tuple[_Moments, ...] = ()
    sketches: tuple[Sketch, ...] = ()
    values: bytes = b""


@dataclass(frozen=True, slots=True)
class _Scan:
    """What is asked of one tensor, beside its digest, as work for `map_chunks`."""

    tensor: Tensor | TensorPrint
    wants_crc32: bool
    wants_stats: bool
    carries_values: bool
    block_nbytes: int | None
    matrix: MatrixDType = "float32"

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def part(self, chunk: Chunk) -> _Scan:
        return replace(self, tensor=self.tensor.part(chunk.start, chunk.nbytes))


def _scan_chunk(scan: _Scan, chunk: Chunk) -> _ChunkPrint:
    tensor, block_nbytes = scan.tensor, scan.block_nbytes
    data = buffers.get("chunk", chunk.nbytes)
    tensor.read_into(chunk.start, data.data)
    digest = blake3(data.data).digest()
    crc32 = zlib_ng.crc32(data.data) if scan.wants_crc32 else 0
    if not scan.wants_stats:
        return _ChunkPrint(digest, crc32)
    moments, sketches = [], []
    # Of the whole chunk at once, where it is all finite: fewer calls let threads wait less.
    of_chunk = _extremes(data.view(numpy_dtype(tensor.dtype))) if _is_ieee(tensor.dtype) else None
    for part in _parts(data, tensor.dtype, block_nbytes):
        values = as_floats(part, tensor.dtype)
        finite, nonfinite = values, _NonFinite()
        extremes = of_chunk if of_chunk and of_chunk.are_finite else _extremes(values)
        if not extremes.are_finite:
            values = values.copy()  # which may be the data itself
            finite, nonfinite = _take_out_nonfinite(values)
            extremes = _extremes(finite)
        # Runs of the same length whatever the blocks are, for stats of the same last bits.
        run = block_numel(tensor.dtype, DEFAULT_BLOCK_NBYTES)
        runs = moments_of_runs(values, run)
        if block_nbytes is not None:
            numel = block_numel(tensor.dtype, block_nbytes)
            squares = _joined(runs.squares, numel // run) if numel % run == 0 else None
            sketches.append(sketch_values(values, numel, squares, scan.matrix))
        moments.append(_moments(finite, runs, extremes, nonfinite))
    kept = data.tobytes() if scan.carries_values else b""
    return _ChunkPrint(digest, crc32, tuple(moments), tuple(sketches), kept)


def _joined(squares: Array, count: int) -> Array:
    """Sums of `count` neighbours each, the last perhaps of fewer."""
    return np.add.reduceat(squares, np.arange(0, len(squares), count))


def _parts(data: Array, dtype: DType, block_nbytes: int | None) -> Iterator[Array]:
    """Cut a chunk near every _PART_NUMEL elements, where a block ends."""
    block = 1 if block_nbytes is None else block_numel(dtype, block_nbytes)
    step = max(1, _PART_NUMEL // block) * block * _component_nbytes(dtype)
    return (data[start : start + step] for start in range(0, data.size, step))


def _component_nbytes(dtype: DType) -> int:
    return dtype.itemsize // (2 if dtype.kind == "complex" else 1)


def as_floats(data: Array, dtype: DType, scratch: str = "values") -> Array:
    """Logical bytes as float32 values, or as float64 where float32 cannot hold them all.

    Components of complex numbers are side by side. In scratch of this name, or the data itself.
    """
    stored = data.view(numpy_dtype(dtype))
    if stored.dtype in (np.float32, np.float64):
        return stored
    if not dtype.is_floating:
        values = buffers.get(scratch, stored.size, "<f8")
        np.copyto(values, stored, casting="unsafe")
        return values
    values = buffers.get(scratch, stored.size, "<f4")
    if dtype.name.startswith("float8"):
        # Without a check of the range, which no byte can leave: eight times as fast.
        np.take(_float8_values(dtype), data, out=values, mode="clip")
    else:
        numkong.astype(stored, "f32", out=values)
    return values


_FLOAT8: dict[str, Array] = {}


def _float8_values(dtype: DType) -> Array:
    table = _FLOAT8.get(dtype.name)
    if table is None:
        codes = np.arange(256, dtype="|u1").view(numpy_dtype(dtype))
        table = _FLOAT8[dtype.name] = codes.astype("<f4")
    return table


def _is_ieee(dtype: DType) -> bool:
    """Whether its numbers are ordered as their bits are, and NaN and infinity have the greatest."""
    return dtype.is_floating and _component_nbytes(dtype) > 1


class _NonFinite(NamedTuple):
    """How much of a part is not a number, by kind."""

    num_nan: int = 0
    num_posinf: int = 0
    num_neginf: int = 0


def _take_out_nonfinite(values: Array) -> tuple[Array, _NonFinite]:
    """Set what is not finite to 0 in place, as sketches want it; return the others and a count."""
    where = ~np.isfinite(values)
    num_nan = int(np.count_nonzero(np.isnan(values)))
    num_posinf = int(np.count_nonzero(values == np.inf))
    num_neginf = int(np.count_nonzero(values == -np.inf))
    values[where] = 0.0
    return values[~where], _NonFinite(num_nan, num_posinf, num_neginf)


class _Extremes(NamedTuple):
    """The least and the greatest of some numbers; either is not finite where any number is not."""

    min: float = 0.0
    max: float = 0.0
    has_zero: bool = False

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.min) and math.isfinite(self.max)


def _extremes(numbers: Array) -> _Extremes:
    """Find the extremes of IEEE numbers by their bits, as integers, which are compared faster.

    Numbers of one sign are ordered as their bits are, NaN beyond infinity. Negative ones are the
    greatest of all as unsigned integers, and as signed ones they are below 0, -0.0 least of all.
    """
    if not numbers.size:
        return _Extremes()
    unsigned, signed = (numbers.view(f"<{kind}{numbers.itemsize}") for kind in "ui")
    low, high, lowest, highest = unsigned.min(), unsigned.max(), signed.min(), signed.max()
    bits = [high if lowest < 0 else low, highest if highest >= 0 else low]
    with np.errstate(invalid="ignore"):  # signalling NaN
        ends = np.array(bits, unsigned.dtype).view(numbers.dtype).astype("<f8") + 0.0  # no -0.0
    has_zero = bool(low == 0 or lowest == np.iinfo(signed.dtype).min)
    return _Extremes(float(ends[0]), float(ends[1]), has_zero)


def _moments(values: Array, runs: Runs, extremes: _Extremes, nonfinite: _NonFinite) -> _Moments:
    """Statistics of finite values; `runs` are sums of all of theirs."""
    count = values.size
    if count == 0:
        return _Moments(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, *nonfinite)
    num_zero = 0
    if extremes.has_zero:
        # Several times as fast as counting the non-zero numbers themselves.
        is_zero = np.equal(values, 0.0, out=buffers.get("is zero", count, "?"))
        num_zero = int(np.count_nonzero(is_zero))
    with np.errstate(invalid="ignore", over="ignore"):
        mean, squares = float(runs.sums.sum()) / count, float(runs.squares.sum())
        m2 = squares - count * mean * mean
        if not m2 >= squares / 2:  # the mean is no small part of the values: digits cancel
            wide = buffers.get("centred", count, "<f8")
            centred = np.subtract(values, mean, out=wide, dtype="<f8")
            m2 = float(moments_of_runs(centred, 4096).squares.sum())
    return _Moments(count, extremes.min, extremes.max, mean, m2, squares, num_zero, *nonfinite)


def _join(scan: _Scan, parts: Sequence[_ChunkPrint]) -> TensorPrint:
    tensor = scan.tensor
    sketches = [sketch for part in parts for sketch in part.sketches]
    return TensorPrint(
        key=tensor.key,
        dtype=tensor.dtype,
        shape=tensor.shape,
        digest=digest_of(tensor.dtype, tensor.shape, [part.digest for part in parts]),
        stats=_stats([m for part in parts for m in part.moments]) if scan.wants_stats else None,
        values=b"".join(part.values for part in parts) if scan.carries_values else None,
        sketch=Sketch(
            projections=np.concatenate([sketch.projections for sketch in sketches]),
            norms=np.concatenate([sketch.norms for sketch in sketches]),
            matrix=scan.matrix,
        )
        if sketches
        else None,
    )


def _stats(parts: Sequence[_Moments]) -> Stats:
    finite = [part for part in parts if part.count]
    count, mean, m2 = 0, 0.0, 0.0
    for part in finite:
        total = count + part.count
        delta = part.mean - mean
        mean += delta * part.count / total
        m2 += part.m2 + delta * delta * count * part.count / total
        count = total
    return Stats(
        min=min([part.min for part in finite], default=0.0),
        max=max([part.max for part in finite], default=0.0),
        mean=mean,
        std=math.sqrt(m2 / count) if count else 0.0,
        l2=math.sqrt(total_squares(part.sum_squares for part in finite)),
        num_zero=sum([part.num_zero for part in parts]),
        num_nan=sum([part.num_nan for part in parts]),
        num_posinf=sum([part.num_posinf for part in parts]),
        num_neginf=sum([part.num_neginf for part in parts]),
    )
