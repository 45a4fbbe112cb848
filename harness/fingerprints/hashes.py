"""Hashes of what a tensor may become: rounded to a narrower dtype, or in another order.

In: logical bytes of floats, chunk by chunk. Out: `Hashes`: 128 bits of each rounding, 64 of the
values in any order. They are not made to withstand someone who wants two tensors to have the same:
the digest is.

**Rounded.** xxh3 over the values cast to the narrower dtype (to the nearest, ties to even; NaN as
one bit pattern), in units of `UNIT_NUMEL` elements whatever the dtypes are, then over those hashes.

**Unordered.** With each element as a word x of its bits, and y = x·c modulo the word: the sums of
x[i]·y[i] and of y[i]² over the bytes i of all elements, modulo 2^32. A sum has no order; a changed
element changes each of the two by one of some 2^17 amounts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numkong
import numpy as np
import xxhash

from harness.checkpoint.dtypes import DTYPES, Array, DType, numpy_dtype
from harness.streaming.chunks import buffers

HASH_NBYTES = 16
UNORDERED_NBYTES = 8
UNIT_NUMEL = 1 << 19
# Narrower dtypes, by that of the tensor.
NARROWER = {"float64": ("float32", "bfloat16", "float16"), "float32": ("bfloat16", "float16")}
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_NAN = {"float32": 0x7FC00000, "bfloat16": 0x7FC0, "float16": 0x7E00}
# Odd, so that no word is lost, and without a pattern.
_FACTORS: dict[int, Any] = {
    2: np.uint16(0xCA87),
    4: np.uint32(0x9E3779B1),
    8: np.uint64(0x9E3779B185EBCA87),
}
_WORDS = {2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hashes:
    """`rounded` has 16 bytes for each, in the order of `NARROWER`; `unordered` 8 bytes."""

    rounded: bytes
    unordered: bytes

    def of_rounding(self, stored: DType, dtype: DType) -> bytes | None:
        """The hash of the values of a `stored` tensor cast to a narrower dtype."""
        names = NARROWER.get(stored.name, ())
        if dtype.name not in names:
            return None
        start = names.index(dtype.name) * HASH_NBYTES
        return self.rounded[start : start + HASH_NBYTES]


@dataclass(frozen=True, slots=True)
class ChunkHashes:
    """What a chunk adds: a hash of each unit and narrower dtype, and sums."""

    rounded: tuple[tuple[bytes, ...], ...]
    sums: Array


def can_be_hashed(dtype: DType) -> bool:
    """Whether hashes are kept of tensors of this dtype: floats of two bytes or more."""
    return dtype.kind == "float" and dtype.itemsize in _WORDS


def hash_chunk(data: Array, dtype: DType, *, may_be_nan: bool = True) -> ChunkHashes:
    """Hash the logical bytes of a chunk, which begins where a unit does."""
    values = data.view(numpy_dtype(dtype))
    narrower = [DTYPES[name] for name in NARROWER.get(dtype.name, ())]
    rounded: list[list[bytes]] = [[] for _ in narrower]
    total = np.zeros(2, "<u8")
    for start in range(0, values.size, UNIT_NUMEL):
        unit = values[start : start + UNIT_NUMEL]
        for found, to in zip(rounded, narrower, strict=True):
            found.append(xxhash.xxh3_128_digest(_cast(unit, to, may_be_nan=may_be_nan).data))
        total += _sums(unit)
    sums = (total & 0xFFFFFFFF).astype("<u4")
    return ChunkHashes(tuple(map(tuple, rounded)), sums)


def join_hashes(parts: Sequence[ChunkHashes]) -> Hashes:
    """Join what the chunks of a tensor have added."""
    by_dtype = zip(*(part.rounded for part in parts), strict=True)
    rounded = [join_units([one for units in some for one in units]) for some in by_dtype]
    sums = np.zeros(2, "<u4")
    for part in parts:
        sums += part.sums
    return Hashes(rounded=b"".join(rounded), unordered=sums.tobytes())


def hash_unit(values: Array, dtype: DType) -> bytes | None:
    """Hash up to `UNIT_NUMEL` values of a dtype that is no wider; None: some are of no such dtype.

    NaN are all the same.
    """
    cast = _cast(values, dtype, may_be_nan=True)
    narrow = cast.view(numpy_dtype(dtype))
    if narrow.dtype != values.dtype:
        wide = buffers.get("widened", values.size, values.dtype.str)
        if dtype.name == "float16" and wide.dtype == np.float32:
            numkong.astype(narrow, "f32", out=wide)  # numpy takes ten times as long
        else:
            np.copyto(wide, narrow, casting="unsafe")
        word = _WORDS[values.itemsize]
        if not np.array_equal(wide.view(word), values.view(word)) and not np.array_equal(
            wide, values, equal_nan=True
        ):
            return None
    return xxhash.xxh3_128_digest(cast.data)


def _cast(values: Array, dtype: DType, *, may_be_nan: bool) -> Array:
    """The bits of values as those of a dtype, in scratch."""
    wanted = numpy_dtype(dtype)
    if values.dtype == np.float64 and wanted.itemsize < 4:  # as torch: by way of float32
        with np.errstate(all="ignore"):
            values = values.astype("<f4")
    cast = buffers.get("rounded", values.size, f"<u{wanted.itemsize}")
    floats = cast.view(wanted)
    if values.dtype == np.float32 and dtype.name == "bfloat16":
        numkong.astype(values, "bf16", out=floats)
    elif values.dtype == np.float32 and dtype.name == "float16":
        numkong.astype(values, "f16", out=floats)
    else:
        with np.errstate(all="ignore"):
            np.copyto(floats, values, casting="unsafe")
    if may_be_nan:
        without_sign = buffers.get("without sign", cast.size, cast.dtype.str)
        np.bitwise_and(cast, np.iinfo(cast.dtype).max // 2, out=without_sign)
        if without_sign.max(initial=0) > _INFINITY[dtype.name]:
            cast[without_sign > _INFINITY[dtype.name]] = _NAN[dtype.name]
    return cast


def join_units(hashes: Sequence[bytes]) -> bytes:
    """The hash of all values from those of their units."""
    return xxhash.xxh3_128_digest(b"".join(hashes))


def unordered_sums(data: Array, dtype: DType) -> Array:
    """The two sums of a chunk, uint32."""
    values = data.view(numpy_dtype(dtype))
    total = np.zeros(2, "<u8")
    for start in range(0, values.size, UNIT_NUMEL):
        total += _sums(values[start : start + UNIT_NUMEL])
    return (total & 0xFFFFFFFF).astype("<u4")


def _sums(values: Array) -> Array:
    x: Array = values.view(_WORDS[values.itemsize])
    y = buffers.get("times", x.size, x.dtype.str)
    np.multiply(x, _FACTORS[x.itemsize], out=y)
    a, b = x.view("|u1"), y.view("|u1")
    return np.array([numkong.dot(a, b), numkong.dot(b, b)], "<u8")
