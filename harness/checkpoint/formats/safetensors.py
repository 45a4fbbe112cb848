"""safetensors files: a JSON header of names, dtypes, shapes and offsets, then the bytes.

In: a source. Out: its tensors. Refused: what the safetensors library refuses (overlaps, holes,
ranges outside of the file, sizes that do not fit the shape), duplicate names, dtypes that torch
does not have. Format: https://github.com/huggingface/safetensors#format

The library itself maps a local file to check it. These checks are as strict (the tests compare the
two), but for the inside of fields that nobody reads, and they work wherever the bytes are.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

from harness.checkpoint.dtypes import DTYPES, DType
from harness.checkpoint.keys import format_key
from harness.checkpoint.limits import MAX_HEADER_NBYTES, MAX_TENSORS
from harness.checkpoint.sources.source import Source, damaged, read, too_many
from harness.checkpoint.tensors import Storage, Tensor
from harness.errors import CheckpointError

# Of a row: between the fields, in the offsets, and in shapes of up to 4 dimensions and more.
_COMMAS_PER_TENSOR = 8
_USIZE = 1 << 64
_BY_NAME = {dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors}


def is_safetensors(head: bytes, nbytes: int) -> bool:
    """Whether a file of `nbytes` that starts with `head` (9 bytes or more) may be safetensors."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return bool(2 <= length <= 1 << 40) and not head.startswith(b"PK\x03\x04")


def read_safetensors(source: Source) -> tuple[list[Tensor], dict[str, str]]:
    """Return the tensors in the order of their bytes, and the file's metadata."""
    start, header = _read_header(source)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise _invalid(source, "its __metadata__ is not a table of strings")
    rows = [_row(source, name, entry) for name, entry in header.items()]
    tensors = []
    end = 0
    for row in sorted(rows, key=lambda row: (row.first, row.last)):
        if row.first != end or row.last < row.first:
            why = f"tensor {row.name[:200]!r} is at {row.first}:{row.last}, not from {end} on"
            raise _invalid(source, why)
        end = row.last
        storage = Storage(source=source, offset=start + row.first, nbytes=row.last - row.first)
        key = format_key((row.name,))
        tensor = Tensor(key=key, dtype=row.dtype, shape=row.shape, storage=storage)
        if tensor.nbytes != storage.nbytes:
            raise _invalid(
                source,
                f"tensor {row.name[:200]!r} (shape {list(row.shape)[:8]}, {row.dtype}) has "
                f"{storage.nbytes} bytes, not {tensor.nbytes}",
            )
        tensors.append(tensor)
    if start + end != source.nbytes:
        raise _invalid(source, f"its tensors end at byte {start + end} of {source.nbytes}")
    return tensors, metadata


class _Row(NamedTuple):
    name: str
    dtype: DType
    shape: tuple[int, ...]
    first: int
    last: int


def _row(source: Source, name: str, entry: Any) -> _Row:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [first, last]} if all(
            type(size) is int and 0 <= size < _USIZE for size in (*shape, first, last)
        ):
            pass
        case _:
            raise _invalid(source, f"the row of {name[:200]!r} is malformed")
    dtype = _BY_NAME.get(code)
    if dtype is None:
        raise CheckpointError(
            f"{source.name}: tensor {name[:200]!r} has the dtype {code[:200]}, which torch lacks",
            hint="convert that tensor, or verify the rest from another file",
        )
    # In 64 bits, as the library multiplies: what overflows on the way to 0 is an error.
    if any(numel >= _USIZE for numel in accumulate(shape, mul)):
        raise _invalid(source, f"tensor {name[:200]!r} has an impossible shape")
    if dtype.name == "float4_e2m1fn_x2":
        if not shape or shape[-1] % 2:
            raise _invalid(source, f"tensor {name[:200]!r} has half a byte of float4")
        shape[-1] //= 2  # torch counts the bytes, which hold two each
    return _Row(name, dtype, tuple(shape), first, last)


def _read_header(source: Source) -> tuple[int, dict[str, Any]]:
    """Return where the tensors' bytes start, and the header as JSON."""
    name = source.name
    (length,) = struct.unpack("<Q", read(source, 0, 8))
    if length > source.nbytes - 8:
        why = f"its safetensors header claims {length} bytes; the file has {source.nbytes}"
        raise damaged(name, why)
    if length > MAX_HEADER_NBYTES:
        raise too_many(name, MAX_HEADER_NBYTES, "bytes of a safetensors header")
    text = read(source, 8, length)
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b",") > _COMMAS_PER_TENSOR * MAX_TENSORS:
        raise too_many(name, MAX_TENSORS, "tensors of a safetensors header")
    try:
        # Python's JSON also knows NaN, and takes -0 for an integer.
        header = parse_json(name, text.decode(), parse_int=_natural, parse_constant=_natural)
        if b"\\u" in text:
            # The library takes no half of a surrogate pair, which Python's JSON does.
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _invalid(source, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _invalid(source, "its header is not a JSON object")
    return 8 + length, header


def _natural(digits: str) -> int:
    if not digits.isdecimal():
        raise ValueError(f"{digits[:40]} is no size")
    return int(digits)


def _invalid(source: Source, why: str) -> CheckpointError:
    return damaged(f"{source.name}: not a valid safetensors file", why)


def parse_json(name: str, text: str | bytes, **options: Any) -> Any:
    """Read JSON, refusing a name that stands twice (readers differ on which wins); ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(
                f"{name}: the name {twice[:200]!r} appears twice in its header",
                hint="the file is malformed: save it again",
            )
        return found

    return json.loads(text, object_pairs_hook=unique, **options)
