"""Fingerprints as columns, the arrays of a golden file, and back.

In: fingerprints by the prefix of their values' names. Out: arrays, and rows that say whose they
are. Refused (ValueError): columns that do not fit the rows, values that do not make their digest.

    digest      U8  [N, 32]      stats  F64 [N, 9]     one row per tensor (stats: NaN where none)
    sketch      F64 [M, 16]      block_norm F64 [M]    one row per block, tensors in table order
    residue     U8  [bytes]      4 bits an element, each tensor from a whole byte on
    residue_digest  U8 [B, 8]    one row per 8192 elements
    value/KEY   the tensor's own dtype and shape (U8 where safetensors lacks the dtype)
    seal        U8  [32]         BLAKE3 of the description beside the columns, and of all above it
                                 but the values, which make digests (not there in old files)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, get_args

import numpy as np
from blake3 import blake3

from harness.checkpoint.dtypes import DTYPES, DType, numpy_dtype
from harness.checkpoint.keys import format_key
from harness.checkpoint.tensors import Tensor
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint, block_numel, digest_of
from harness.fingerprints.residues import DIGEST_NBYTES, Grid, Residues, num_residue_blocks
from harness.fingerprints.sketch import NUM_PROJECTIONS, MatrixDType, Sketch, num_blocks
from harness.fingerprints.stats import Stats
from harness.streaming.chunks import CHUNK_NBYTES, chunks

Array = np.ndarray[Any, np.dtype[Any]]

_NUM_STATS = len(fields(Stats))
_stats_of = attrgetter(*(field.name for field in fields(Stats)))
# What safetensors can write from numpy; everything else is stored as bytes.
_NATIVE = frozenset(
    {
        *("float64", "float32", "float16", "bfloat16", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    }
)
_SEALED = ("digest", "stats", "sketch", "block_norm", "residue", "residue_digest")


def columns_of(parts: Mapping[str, Fingerprint]) -> dict[str, Array]:
    """The arrays that hold fingerprints, but for what `rows_of` says of them."""
    tensors = [tensor for part in parts.values() for tensor in part.tensors.values()]
    originals = [tensor for tensor in tensors if tensor.alias_of is None]
    sketches = [t.sketch for t in originals if t.sketch is not None]
    digests = b"".join(tensor.digest or b"" for tensor in tensors)
    if len(digests) != 32 * len(tensors):
        raise ValueError("a golden needs a digest of every tensor")
    nothing = (float("nan"),) * _NUM_STATS
    stats = np.array([_stats_of(t.stats) if t.stats else nothing for t in tensors], "<f8")
    rows = np.concatenate([np.empty((0, NUM_PROJECTIONS)), *(s.projections for s in sketches)])
    norms = np.concatenate([np.empty(0), *(s.norms for s in sketches)])
    residues = [t.residues for t in originals if t.residues is not None]
    columns: dict[str, Array] = {
        "digest": np.frombuffer(digests, "|u1").reshape(-1, 32),
        "stats": stats.reshape(-1, _NUM_STATS),
        "sketch": rows,
        "block_norm": norms,
        "residue": np.concatenate([np.empty(0, "|u1"), *(r.packed for r in residues)]),
        "residue_digest": np.concatenate(
            [np.empty((0, DIGEST_NBYTES), "|u1"), *(r.digests for r in residues)]
        ),
    }
    for prefix, part in parts.items():
        for tensor in part.tensors.values():
            if tensor.values is not None and tensor.alias_of is None:
                columns[_value_name(prefix, tensor.key)] = _native(tensor)
    return columns


def seal_of(description: str, columns: Mapping[str, Array]) -> bytes:
    """What tells whether a bit of a golden has changed, which only digests and values tell else."""
    hasher = blake3(description.encode())
    for name in _SEALED:
        if name in columns:
            hasher.update(np.ascontiguousarray(columns[name]).reshape(-1).view("|u1").data)
    return hasher.digest()


def _native(tensor: TensorFingerprint) -> Array:
    """The values as safetensors can write them: as what they are, or as bytes."""
    values = np.frombuffer(tensor.values or b"", "|u1")
    if tensor.dtype.name not in _NATIVE:
        return values
    dtype = "?" if tensor.dtype.name == "bool" else numpy_dtype(tensor.dtype)
    return values.view(dtype).reshape(tensor.shape)


def rows_of(part: Fingerprint) -> list[list[Any]]:
    """The table of tensors: key, dtype, shape, alias, and what is kept of the values."""
    return [
        [
            t.key,
            t.dtype.name,
            list(t.shape),
            t.alias_of,
            _kept(t),
        ]
        for t in part.tensors.values()
    ]


def _kept(tensor: TensorFingerprint) -> str | None:
    """What the columns hold of a tensor: residues stand beside a sketch."""
    if tensor.values is not None:
        return "values"
    if tensor.sketch is None:
        return None
    return "sketch" if tensor.residues is None else "residues"


def _value_name(prefix: str, key: str) -> str:
    """The name of a tensor's values in the golden: lone surrogates have no UTF-8."""
    return f"{prefix}/" + key.encode("utf-8", "backslashreplace").decode()


def _mapped(column: Tensor, dtype: str = "float64") -> Array:
    """A column as file pages, which are never copied."""
    if column.dtype.name != dtype:
        raise ValueError(f"{column.key} is {column.dtype}, not {dtype}")
    return np.frombuffer(_bytes(column), numpy_dtype(column.dtype)).reshape(column.shape)


def _bytes(column: Tensor) -> memoryview:
    place = column.storage
    if place.source is None:
        raise ValueError(f"{column.key} has no values")
    return place.source.view(place.offset, place.nbytes)


class Columns:
    """Takes the rows of the columns in order, as the tables of tensors need them."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self._columns = columns
        self._digests, stats = columns["digest"].array(), columns["stats"].array()
        self._sketch, self._norms = _mapped(columns["sketch"]), _mapped(columns["block_norm"])
        self._residues = np.empty(0, "|u1")
        self._residue_digests = np.empty((0, DIGEST_NBYTES), "|u1")
        if "residue" in columns:  # else of a version that kept none
            self._residues = _mapped(columns["residue"], "uint8")
            self._residue_digests = _mapped(columns["residue_digest"], "uint8")
        widths = [c.shape[1:] for c in (self._digests, stats, self._residue_digests)]
        if widths != [(32,), (_NUM_STATS,), (DIGEST_NBYTES,)] or self._residues.ndim != 1:
            raise ValueError("the columns have other widths")
        self._stats: list[list[float]] = stats.tolist()
        self._row = self._block = self._residue = self._residue_block = 0

    def check_seal(self, description: str) -> None:
        """Raise ValueError where a bit has changed since the file was written."""
        if "seal" not in self._columns:
            return  # of a version that wrote none
        there = {
            name: np.frombuffer(_bytes(self._columns[name]), "|u1")
            for name in _SEALED
            if name in self._columns
        }
        if seal_of(description, there) != bytes(_bytes(self._columns["seal"])):
            raise ValueError("its parts do not make its seal")

    def check_used_up(self) -> None:
        rows, blocks = {len(self._digests), len(self._stats)}, {len(self._sketch), len(self._norms)}
        if rows != {self._row} or blocks != {self._block}:
            raise ValueError(f"{self._row} tensors, but {sorted(rows)} rows in the columns")
        ends = self._residue, self._residue_block
        if ends != (len(self._residues), len(self._residue_digests)):
            raise ValueError("more residues than tensors have")

    def prints(
        self,
        prefix: str,
        table: list[Any],
        block_nbytes: int,
        matrix: MatrixDType,
        tolerance: tuple[float, float],
    ) -> Iterator[tuple[str, TensorFingerprint]]:
        """Read the fingerprints of one table of tensors."""
        if not 0 < block_nbytes <= CHUNK_NBYTES:
            raise ValueError(f"blocks of {block_nbytes} bytes")
        if matrix not in get_args(MatrixDType):
            raise ValueError(f"projections by {matrix}")
        known: dict[str, TensorFingerprint] = {}
        for name, dtype_name, sizes, alias_of, kept in table:
            if self._row >= min(len(self._digests), len(self._stats)):
                raise ValueError("the columns end early")
            key, dtype, shape = str(name), DTYPES[dtype_name], tuple(int(size) for size in sizes)
            digest, stats = self._digests[self._row].tobytes(), _stats(self._stats[self._row])
            self._row += 1
            values, sketch, residues = None, None, None
            if alias_of is not None:
                original = known[alias_of]
                values, sketch, residues = original.values, original.sketch, original.residues
            elif kept == "values":
                values = self._values(prefix, key, dtype, shape, digest)
            elif kept in ("sketch", "residues"):
                sketch = self._take_sketch(key, dtype, shape, block_nbytes, matrix)
            if kept == "residues" and alias_of is None:
                residues = self._take_residues(key, dtype, math.prod(shape), tolerance)
            if key in known:
                raise ValueError(f"two tensors have the key {key!r}")
            known[key] = tensor = TensorFingerprint(
                key=key,
                dtype=dtype,
                shape=shape,
                digest=digest,
                alias_of=alias_of,
                stats=stats,
                values=values,
                sketch=sketch,
                residues=residues,
            )
            yield key, tensor

    def _values(
        self, prefix: str, key: str, dtype: DType, shape: tuple[int, ...], digest: bytes
    ) -> bytes:
        # The reader of safetensors files lists its tensors under formatted keys.
        values = bytes(_bytes(self._columns[format_key((_value_name(prefix, key),))]))
        if len(values) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the values of {key!r} do not fit its shape {shape}")
        # Else a comparison with them could pass what the digest refuses.
        digests = [
            blake3(values[c.start : c.start + c.nbytes]).digest() for c in chunks(len(values))
        ]
        if digest_of(dtype, shape, digests) != digest:
            raise ValueError(f"the values of {key!r} do not make its digest")
        return values

    def _take_sketch(
        self,
        key: str,
        dtype: DType,
        shape: tuple[int, ...],
        block_nbytes: int,
        matrix: MatrixDType,
    ) -> Sketch:
        numel = math.prod(shape) * (2 if dtype.kind == "complex" else 1)
        count = num_blocks(numel, block_numel(dtype, block_nbytes))
        rows = slice(self._block, self._block + count)
        self._block += count
        if self._block > min(len(self._sketch), len(self._norms)):
            raise ValueError(f"the sketch ends before {key!r}")
        return Sketch(projections=self._sketch[rows], norms=self._norms[rows], matrix=matrix)

    def _take_residues(
        self, key: str, dtype: DType, numel: int, tolerance: tuple[float, float]
    ) -> Residues:
        grid = Grid.of(dtype, *tolerance)
        if grid is None:
            raise ValueError(f"residues of {key!r}, of which there can be none")
        packed = slice(self._residue, self._residue + -(-numel // 2))
        digests = slice(self._residue_block, self._residue_block + num_residue_blocks(numel))
        self._residue, self._residue_block = packed.stop, digests.stop
        if packed.stop > len(self._residues) or digests.stop > len(self._residue_digests):
            raise ValueError(f"the residues end before {key!r}")
        return Residues(
            grid=grid, packed=self._residues[packed], digests=self._residue_digests[digests]
        )


def _stats(row: Sequence[float]) -> Stats | None:
    low, high, mean, std, l2, *counts = row
    if math.isnan(low) and all(map(math.isnan, row)):
        return None
    zero, nan, posinf, neginf = map(int, counts)
    return Stats(
        min=low,
        max=high,
        mean=mean,
        std=std,
        l2=l2,
        num_zero=zero,
        num_nan=nan,
        num_posinf=posinf,
        num_neginf=neginf,
    )
