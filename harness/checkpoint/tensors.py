"""What a checkpoint is once it is open: named tensors, each a view of a storage in a file.

In: what the container readers found (storages, offsets, shapes, strides). Out: `Checkpoint`, an
ordered table of `Tensor`s that read their *logical* bytes: C order, little-endian, conjugation and
negation applied, whatever the strides. Refused: views that reach outside of their storage, shapes
and strides that overflow, and expansions out of all proportion to the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from harness.checkpoint.dtypes import Array, DType, decode
from harness.checkpoint.sources.source import COPY_AGAIN, Source
from harness.checkpoint.strided import StridedView
from harness.errors import CheckpointError
from harness.text.folding import shortened


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Storage:
    """A run of bytes that tensors are views of; `source` is None for meta tensors."""

    source: Source | None
    nbytes: int
    offset: int = 0
    big_endian: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A named view of a storage. Offsets and strides count elements, as in torch."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    storage: Storage = field(repr=False)
    offset: int = 0
    strides: tuple[int, ...] | None = None
    conjugate: bool = False
    negative: bool = False
    alias_of: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Logical bytes: numel times itemsize."""
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the logical bytes are one run of the storage."""
        if self.strides is None or self.numel == 0:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def named(self, key: str) -> Tensor:
        """The same view under a key."""
        return replace(self, key=key)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two tensors of one checkpoint only if they are the same view: tied."""
        return (
            id(self.storage),
            self.offset,
            self.dtype.name,
            self.shape,
            None if self.is_contiguous else self.strides,
            self.conjugate,
            self.negative,
        )

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with logical bytes from `start` (a multiple of the itemsize).

        Memory: none beyond the buffer, and 4 MiB for strided tensors. Raises CheckpointError for
        meta tensors.
        """
        source = self.storage.source
        if source is None:
            raise self._no_values()
        if not len(buffer):
            return
        itemsize = self.dtype.itemsize
        place = self.storage.offset + self.offset * itemsize
        if self.is_contiguous:
            source.read_into(place + start, buffer)
        else:
            view = StridedView(
                source=source.scattered(),
                place=place,
                raw=np.dtype(self.dtype.raw),
                shape=self.shape,
                strides=self.strides or (),
            )
            view.read_into(start // itemsize, np.frombuffer(buffer, dtype=self.dtype.raw))
        if self.storage.big_endian or self.conjugate or self.negative:
            self._normalise(np.frombuffer(buffer, dtype="|u1"))

    def part(self, start: int, nbytes: int) -> Tensor:
        """The same tensor for one who reads these logical bytes alone, and needs no other pieces.

        It is what is sent to another process: the pieces may be thousands.
        """
        source = self.storage.source
        if source is None or not self.is_contiguous:
            return self
        place = self.storage.offset + self.offset * self.dtype.itemsize + start
        part = source.part(place, nbytes)
        return self if part is source else replace(self, storage=replace(self.storage, source=part))

    def array(self) -> Array:
        """Read the whole tensor as a numpy array of its values (bits where numpy has no type)."""
        if self.storage.source is None:
            raise self._no_values()
        data = bytearray(self.nbytes)
        self.read_into(0, memoryview(data))
        return decode(np.frombuffer(data, dtype="|u1"), self.dtype).reshape(self.shape)

    def _no_values(self) -> CheckpointError:
        return CheckpointError(
            f"{self.key}: a meta tensor: the file holds its dtype and shape, but no values",
            hint="save the model after its weights were materialised",
        )

    def _normalise(self, data: Array) -> None:
        by_component = data.reshape(-1, self.dtype.component_nbytes)
        if self.storage.big_endian:
            by_component[:] = by_component[:, ::-1].copy()
        sign = by_component[:, -1]
        if self.negative:
            sign ^= 0x80
        if self.conjugate:
            sign[1::2] ^= 0x80


# What a checkpoint may expand to: tied and expanded views are normal, terabytes are not.
_EXPANSION_LIMIT = 16
_EXPANSION_FREE_NBYTES = 1 << 30


class Checksum(NamedTuple):
    """The CRC-32 that a container has of some of its bytes."""

    source: Source
    offset: int
    nbytes: int
    crc32: int

    def part(self, chunk: object) -> Checksum:
        """All of it, which is little, for a process that reads a chunk."""
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An open checkpoint: its tensors in the order of the file. Close it, or use it as a context.

    `container` is the format's name; `section` the path of the state dict inside ("" for the
    root); `keeps_aliases` tells whether the format can say that two tensors are tied;
    `checksums` are the container's own. Entries that are no tensors are among them, as their text
    in the dtype `value`; those that are not data are named in `unread`. `others` are the parts of
    the file that were left out, with how many tensors they hold. `members` are other files in it,
    such as a tokenizer, and the text of the configuration. `buffers` are a live module's
    non-persistent ones, which no file holds; None for everything else.
    """

    name: str
    container: str
    tensors: Mapping[str, Tensor]
    section: str = ""
    sources: tuple[Source, ...] = ()
    unread: tuple[str, ...] = ()
    others: tuple[tuple[str, int | None], ...] = ()
    keeps_aliases: bool = True
    checksums: tuple[Checksum, ...] = ()
    buffers: Mapping[str, Tensor] | None = None
    members: Mapping[str, Source] = field(default_factory=dict)
    read_config: Callable[[], Mapping[str, Any] | None] = lambda: None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The model's configuration as the file carries it, as plain data; read on first use."""
        return self.read_config()

    def __repr__(self) -> str:
        part = f", section {shortened(self.section, 40)}" if self.section else ""
        name = f"{shortened(self.name, 60)} ({self.container}{part})"
        return f"<Checkpoint {name}: {len(self.tensors):,} tensors>"

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensor_table(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Check the tensors of one checkpoint and name the tied ones as aliases of the first.

    Raises CheckpointError for duplicate keys, views outside of their storage, and expansions.
    """
    table: dict[str, Tensor] = {}
    first: dict[tuple[object, ...], str] = {}
    stored: dict[int, int] = {}
    logical = 0
    for tensor in tensors:
        _check_view(name, tensor)
        key, storage, nbytes = tensor.key, tensor.storage, tensor.nbytes
        if key in table:
            raise CheckpointError(
                f"{name}: two tensors have the key {key!r}",
                hint="the file is malformed: save it again",
            )
        alias_of = None
        if storage.source is not None:
            original = first.setdefault(tensor.identity, key) if nbytes else key
            if original != key:
                alias_of = original
            else:
                logical += nbytes
                stored[id(storage)] = storage.nbytes
        if alias_of != tensor.alias_of:
            tensor = replace(tensor, alias_of=alias_of)
        table[key] = tensor
    if logical > _EXPANSION_FREE_NBYTES + _EXPANSION_LIMIT * sum(stored.values()):
        raise CheckpointError(
            f"{name}: its views expand {sum(stored.values())} stored bytes to {logical}",
            hint="the file is malformed, or made to exhaust its reader: do not trust it",
        )
    return table


def _check_view(name: str, tensor: Tensor) -> None:
    shape, strides = tensor.shape, tensor.strides
    bad = None
    if len(shape) > 64:  # numpy's limit; torch prints no more either
        bad = f"has {len(shape)} dimensions"
    elif shape and (min(shape) < 0 or max(shape) >= 1 << 62):
        bad = "has an impossible shape"
    elif strides is not None and (len(strides) != len(shape) or min(strides, default=0) < 0):
        bad = f"has strides {list(strides)[:8]}, which do not fit its shape"
    elif tensor.offset < 0:
        bad = f"starts at element {tensor.offset} of its storage"
    elif tensor.conjugate and tensor.dtype.kind != "complex":
        bad = f"is conjugated, but {tensor.dtype}"
    elif tensor.negative and not tensor.dtype.is_floating:
        bad = f"is negated by its sign bit, but {tensor.dtype}"
    elif tensor.numel and tensor.storage.source is not None:
        last = tensor.numel - 1
        if strides is not None:
            last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        needed = (tensor.offset + last + 1) * tensor.dtype.itemsize
        if needed > tensor.storage.nbytes:
            bad = f"needs {needed} bytes of a storage that has {tensor.storage.nbytes}"
    if bad:
        raise CheckpointError(
            f"{name}: tensor {tensor.key!r} (shape {list(shape)[:8]}) {bad}", hint=COPY_AGAIN
        )
