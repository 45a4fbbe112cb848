"""Fingerprints as columns, the arrays of a golden file, and back.

In: fingerprints by the name of their part. Out: arrays, and rows that say whose they are. Refused
(ValueError): columns that do not fit the rows, values that do not make their digest.

`FIELDS` is the one list of what a golden keeps of a tensor. A new field of `TensorFingerprint` is
kept by one entry there: its columns, how many rows of each a tensor takes, the way there and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from harness.checkpoint.dtypes import DTYPES, Array, DType
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint, block_numel, digest_of
from harness.fingerprints.hashes import HASH_NBYTES, NARROWER, UNORDERED_NBYTES, Hashes
from harness.fingerprints.residues import (
    DIGEST_NBYTES,
    Bits,
    Grid,
    Residues,
    num_residue_blocks,
    num_residue_bytes,
)
from harness.fingerprints.sketch import NUM_PROJECTIONS, Sketch, num_blocks
from harness.fingerprints.stats import Stats
from harness.golden.golden import PartName
from harness.golden.header import Part, Row
from harness.streaming.chunks import chunks

_STATS = tuple(field.name for field in fields(Stats))
_stats_of = attrgetter(*_STATS)


class Form(NamedTuple):
    """What says how many rows a tensor takes, and how they are to be understood."""

    dtype: DType
    shape: tuple[int, ...]
    part: Part
    stats: Stats | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def bits(self) -> Bits:
        """Of each residue."""
        if self.part.bits is None:
            raise ValueError("residues of no bits")
        return self.part.bits

    @property
    def num_blocks(self) -> int:
        """Blocks of a sketch; the elements of complex tensors count as two."""
        numel = self.numel * self.dtype.num_components
        return num_blocks(numel, block_numel(self.dtype, self.part.block_nbytes))


class Column(NamedTuple):
    """An array of rows of one dtype and shape, of which each tensor takes some in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_rows: Callable[[Form], int]


class Field(NamedTuple):
    """A field of `TensorFingerprint` that is kept, where it is not None.

    `to_rows` makes its rows, one array per column; `from_rows` takes the form and those back.
    """

    name: str
    columns: tuple[Column, ...]
    to_rows: Callable[[Any], tuple[Array, ...]]
    from_rows: Callable[..., Any]


def _residues(form: Form, packed: NDArray[np.uint8], digests: NDArray[np.uint8]) -> Residues:
    atol, rtol = form.part.tolerance
    if form.part.rel:
        if form.stats is None:
            raise ValueError("residues of a tensor without statistics")
        atol += form.part.rel * form.stats.rms(form.numel)
    grid = Grid.of(form.dtype, atol, rtol, form.bits)
    if grid is None:
        raise ValueError(f"residues of {form.dtype}, of which there can be none")
    return Residues(grid=grid, packed=packed, digests=digests)


def _stats(form: Form, row: Array) -> Stats:
    named = zip(_STATS, row[0].tolist(), strict=True)
    return Stats(**{name: int(v) if name.startswith("num_") else v for name, v in named})


def _one(form: Form) -> int:
    return 1


FIELDS = (
    Field(
        "digest",
        (Column("digest", "|u1", (32,), _one),),
        lambda digest: (np.frombuffer(digest, "|u1").reshape(1, 32),),
        lambda form, rows: rows.tobytes(),
    ),
    Field(
        "stats",
        (Column("stats", "<f8", (len(_STATS),), _one),),
        lambda stats: (np.array([_stats_of(stats)], "<f8"),),
        _stats,
    ),
    Field(
        "values",
        (Column("value", "|u1", (), lambda form: form.nbytes),),
        lambda values: (np.frombuffer(values, "|u1"),),
        lambda form, rows: rows.tobytes(),
    ),
    Field(
        "sketch",
        (
            Column("sketch", "<f8", (NUM_PROJECTIONS,), lambda form: form.num_blocks),
            Column("block_norm", "<f8", (), lambda form: form.num_blocks),
        ),
        lambda sketch: (sketch.projections, sketch.norms),
        lambda form, projections, norms: Sketch(projections=projections, norms=norms),
    ),
    Field(
        "residues",
        (
            Column("residue", "|u1", (), lambda form: num_residue_bytes(form.numel, form.bits)),
            Column(
                "residue_digest",
                "|u1",
                (DIGEST_NBYTES,),
                lambda form: num_residue_blocks(form.numel),
            ),
        ),
        lambda residues: (residues.packed, residues.digests),
        _residues,
    ),
    Field(
        "hashes",
        (
            Column(
                "rounded",
                "|u1",
                (HASH_NBYTES,),
                lambda form: len(NARROWER.get(form.dtype.name, ())),
            ),
            Column("unordered", "|u1", (UNORDERED_NBYTES,), _one),
        ),
        lambda hashes: (
            np.frombuffer(hashes.rounded, "|u1").reshape(-1, HASH_NBYTES),
            np.frombuffer(hashes.unordered, "|u1").reshape(1, UNORDERED_NBYTES),
        ),
        lambda form, *rows: Hashes(rounded=rows[0].tobytes(), unordered=rows[1].tobytes()),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The arrays that make a column, one after the other: made anew each time they are asked for.

    Thousands of small ones take more memory than the column.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Iterator[Array]]

    def num_rows(self) -> int:
        return sum(map(len, self.make()))

    def fill(self, column: Array) -> None:
        """Write them into an array that has as many rows."""
        start = 0
        for piece in self.make():
            column[start : start + len(piece)] = piece
            start += len(piece)


def one_piece(array: Array) -> Pieces:
    """A column that is there already."""
    return Pieces(dtype=array.dtype, shape=array.shape[1:], make=lambda: iter((array,)))


def pieces_of(parts: Mapping[PartName, Fingerprint]) -> dict[str, Pieces]:
    """What makes each column: part by part in order of their names. Nothing is copied."""
    tensors = [
        tensor
        for _, part in sorted(parts.items())
        for tensor in part.tensors.values()
        if tensor.alias_of is None
    ]
    if any(tensor.digest is None for tensor in tensors):
        raise ValueError("a golden needs a digest of every tensor")

    def rows(field: Field, index: int) -> Iterator[Array]:
        kept = (value for t in tensors if (value := getattr(t, field.name)) is not None)
        return (field.to_rows(value)[index] for value in kept)

    return {
        column.name: Pieces(
            dtype=np.dtype(column.dtype), shape=column.shape, make=partial(rows, field, index)
        )
        for field in FIELDS
        for index, column in enumerate(field.columns)
    }


def nbytes_of(tensor: TensorFingerprint) -> int:
    """The bytes of its rows."""
    kept = ((field, getattr(tensor, field.name)) for field in FIELDS)
    return sum(a.nbytes for field, v in kept if v is not None for a in field.to_rows(v))


def rows_of(part: Fingerprint) -> tuple[Row, ...]:
    """The rows of the table of tensors."""
    return tuple(
        Row(
            key=t.key,
            dtype=t.dtype.name,
            shape=t.shape,
            keeps=tuple(f.name for f in FIELDS if getattr(t, f.name) is not None)
            if t.alias_of is None
            else (),
            alias_of=t.alias_of,
        )
        for t in part.tensors.values()
    )


def seal_of(header: str, columns: Mapping[str, Array]) -> bytes:
    """What tells whether any bit of a golden has changed: BLAKE3 of the header and the columns."""
    hasher = blake3(header.encode())
    for name in sorted(columns):
        hasher.update(np.ascontiguousarray(columns[name]).reshape(-1).view("|u1").data)
    return hasher.digest()


def tensors_of(
    parts: Mapping[PartName, Part],
    rows: Mapping[PartName, tuple[Row, ...]],
    columns: Mapping[str, Array],
) -> dict[PartName, dict[str, TensorFingerprint]]:
    """The fingerprints in the columns, by part and key; raises ValueError."""
    if parts.keys() != rows.keys():
        raise ValueError(f"it has the parts {sorted(parts)}, and rows of {sorted(rows)}")
    reader = _Reader(columns)
    found = {name: reader.part(parts[name], rows[name]) for name in sorted(parts)}
    reader.check_used_up()
    return found


class _Reader:
    """Takes the rows of the columns in order, as the tables of tensors need them."""

    def __init__(self, columns: Mapping[str, Array]) -> None:
        self._columns = columns
        self._taken: dict[str, int] = {}
        for column in (column for field in FIELDS for column in field.columns):
            if column.name not in columns:
                raise ValueError(f"it has no column {column.name}")
            array = columns[column.name]
            if array.dtype != column.dtype or array.shape[1:] != column.shape or not array.ndim:
                raise ValueError(
                    f"its column {column.name} has rows of {array.dtype} {array.shape[1:]}, "
                    f"not of {np.dtype(column.dtype)} {column.shape}"
                )
            self._taken[column.name] = 0

    def check_used_up(self) -> None:
        for name, taken in self._taken.items():
            if taken != len(self._columns[name]):
                raise ValueError(
                    f"its tensors have {taken} rows in the column {name}, which has "
                    f"{len(self._columns[name])}"
                )

    def part(self, part: Part, rows: tuple[Row, ...]) -> dict[str, TensorFingerprint]:
        known: dict[str, TensorFingerprint] = {}
        for row in rows:
            if row.key in known:
                raise ValueError(f"two tensors have the key {row.key!r}")
            if row.dtype not in DTYPES:
                raise ValueError(f"{row.key!r} has the dtype {row.dtype!r}")
            form = Form(DTYPES[row.dtype], row.shape, part)
            if row.alias_of is None:
                known[row.key] = self._original(row, form)
                continue
            original = known.get(row.alias_of)
            if original is None or (original.dtype, original.shape) != form[:2] or row.keeps:
                raise ValueError(f"{row.key!r} is no alias of {row.alias_of!r}")
            known[row.key] = replace(original, key=row.key, alias_of=row.alias_of)
        return known

    def _original(self, row: Row, form: Form) -> TensorFingerprint:
        kept: dict[str, Any] = {}
        for field in FIELDS:
            if field.name in row.keeps:
                taken = (self._take(column, row, form) for column in field.columns)
                kept[field.name] = field.from_rows(form, *taken)
                if field.name == "stats":  # which residues ask for
                    form = form._replace(stats=kept["stats"])
        if len(kept) != len(row.keeps) or "digest" not in kept:
            raise ValueError(f"{row.key!r} keeps {', '.join(row.keeps) or 'nothing'}")
        tensor = TensorFingerprint(key=row.key, dtype=form.dtype, shape=form.shape, **kept)
        # Else a comparison with them could pass what the digest refuses.
        if tensor.values is not None and _digest(tensor, tensor.values) != tensor.digest:
            raise ValueError(f"the values of {row.key!r} do not make its digest")
        return tensor

    def _take(self, column: Column, row: Row, form: Form) -> Array:
        array, first = self._columns[column.name], self._taken[column.name]
        count = column.num_rows(form)
        if count > len(array) - first:
            raise ValueError(f"its column {column.name} ends before {row.key!r}")
        self._taken[column.name] = first + count
        return array[first : first + count]


def _digest(tensor: TensorFingerprint, values: bytes) -> bytes:
    parts = [blake3(values[c.start : c.start + c.nbytes]).digest() for c in chunks(len(values))]
    return digest_of(tensor.dtype, tensor.shape, parts)
