"""safetensors files: a JSON header of names, dtypes, shapes and offsets, then the bytes.

In: a path (the library maps it to validate it). Out: its tensors. Refused: what the safetensors
library refuses (overlaps, holes, ranges outside of the file), duplicate names, dtypes that torch
does not have. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from harness.checkpoint.sources import Source, read
from harness.checkpoint.tensors import DTYPES, Storage, Tensor, format_key
from harness.errors import CheckpointError

# The library allows 100 MB; this is 100,000 tensors, and parses within the memory we promise.
MAX_HEADER_NBYTES = 16 << 20
MAX_HEADER_COMMAS = 500_000
_BY_NAME = {dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors}


def is_safetensors(head: bytes, nbytes: int) -> bool:
    """Whether a file of `nbytes` that starts with `head` (9 bytes or more) may be safetensors."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return bool(2 <= length <= 1 << 40) and not head.startswith(b"PK\x03\x04")


def read_safetensors(path: Path, source: Source) -> tuple[list[Tensor], dict[str, str]]:
    """Return the tensors in the order of their bytes, and the file's metadata."""
    header = _validated_header(path, source)
    metadata = header.pop("__metadata__", {})
    start = source.nbytes - max((entry["data_offsets"][1] for entry in header.values()), default=0)
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _BY_NAME.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {name!r} has the dtype {entry['dtype']}, which torch lacks",
                hint="convert that tensor, or verify the rest from another file",
            )
        shape = tuple(entry["shape"])
        if dtype.name == "float4_e2m1fn_x2" and shape:
            shape = (*shape[:-1], shape[-1] // 2)  # torch counts the bytes, which hold two each
        first, last = entry["data_offsets"]
        storage = Storage(source=source, offset=start + first, nbytes=last - first)
        tensor = Tensor(key=format_key((name,)), dtype=dtype, shape=shape, storage=storage)
        if tensor.nbytes != storage.nbytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} (shape {entry['shape'][:8]}, {dtype}) has "
                f"{storage.nbytes} bytes, not {tensor.nbytes}",
                hint="the file is malformed: save it again",
            )
        tensors.append(tensor)
    return tensors, metadata


def _validated_header(path: Path, source: Source) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    (length,) = struct.unpack("<Q", read(source, 0, 8))
    if length > min(MAX_HEADER_NBYTES, source.nbytes - 8):
        raise CheckpointError(
            f"{path}: its safetensors header claims {length} bytes; the file has {source.nbytes}, "
            f"and {MAX_HEADER_NBYTES} is the most that is read",
            hint="the file is truncated or damaged: copy or download it again",
        )
    text = read(source, 8, length)
    if text.count(b",") > MAX_HEADER_COMMAS:
        raise CheckpointError(
            f"{path}: its safetensors header lists more tensors than are read from one file",
            hint="save it in shards",
        )
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file: {error}",
            hint="the file is truncated or damaged: copy or download it again",
        ) from error
    header: dict[str, Any] = json.loads(text, object_pairs_hook=lambda pairs: unique(path, pairs))
    return header


def unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a name that stands twice (readers differ on which wins)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise CheckpointError(
            f"{path}: the name {twice[:200]!r} stands twice in its header",
            hint="the file is malformed: save it again",
        )
    return found
