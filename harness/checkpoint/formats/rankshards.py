"""Safetensors in which every rank keeps its own chunks: torch's HuggingFaceStorageWriter.

In: a folder of such files. Out: their tensors, whole. Refused: chunks that do not tile their
tensor, and files that do not say where in the whole their chunks are. Format as in
torch/distributed/checkpoint/hf_storage.py of torch 2.7 to 2.13: ordinary safetensors, whose
metadata `DCP_SHARDING_INFO` gives the offsets of each tensor's chunk as JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from contextlib import closing

from harness.checkpoint.formats.assembled import Index, Piece, assemble, is_index
from harness.checkpoint.formats.safetensors import parse_json, read_safetensors
from harness.checkpoint.keys import format_key
from harness.checkpoint.limits import MAX_HEADER_NBYTES
from harness.checkpoint.sources.access import at_once, open_source
from harness.checkpoint.sources.paths import AnyPath
from harness.checkpoint.sources.source import Source, damaged, read
from harness.checkpoint.tensors import Tensor

_SHARDING_INFO = "DCP_SHARDING_INFO"
_COPY_AGAIN = "copy the folder again, with the files of all ranks, or save the checkpoint again"


def rank_shards(folder: AnyPath, names: Iterable[str]) -> list[AnyPath]:
    """The safetensors files of a folder, if the first of them says that it is a rank's shard."""
    names = sorted(name for name in names if name.endswith(".safetensors"))
    if not names:
        return []
    with closing(open_source(folder / names[0])) as source:
        (length,) = struct.unpack("<Q", read(source, 0, 8)) if source.nbytes > 8 else (0,)
        nbytes = min(length, source.nbytes - 8, MAX_HEADER_NBYTES)
        header = read(source, 8, nbytes) if length else b""
    return [folder / name for name in names] if _SHARDING_INFO.encode() in header else []


def read_rank_shards(
    folder: AnyPath, paths: list[AnyPath]
) -> tuple[list[Tensor], tuple[Source, ...]]:
    """Join the tensors of all ranks' shards, whose headers say where in the whole they start.

    No file says how large a tensor is: it ends where its last chunk does, as it does for torch. So
    the loss of whole files at the end of the ranks shows in the shapes, not as an error.
    """
    sources: list[Source] = []
    found: dict[str, list[Piece]] = {}

    def opened(path: AnyPath) -> tuple[Source, list[Tensor], dict[str, str]]:
        source = open_source(path)
        return source, *read_safetensors(source)

    with closing(at_once(folder, opened, paths)) as shards:
        for path, (source, tensors, metadata) in zip(paths, shards, strict=True):
            sources.append(source)
            offsets = _saved_offsets(path, metadata.get(_SHARDING_INFO))
            for tensor in tensors:
                start = (0,) * len(tensor.shape) if offsets is None else offsets.get(tensor.key)
                if start is None or len(start) != len(tensor.shape):
                    why = f"does not say where its chunk of {tensor.key!r} is in the whole"
                    raise damaged(source.name, why, _COPY_AGAIN)
                piece = Piece(start=start, tensor=tensor, where=path.name)
                found.setdefault(tensor.key, []).append(piece)
    return [_joined(folder, key, pieces) for key, pieces in found.items()], tuple(sources)


def _joined(folder: AnyPath, key: str, pieces: list[Piece]) -> Tensor:
    dtype, rank = pieces[0].tensor.dtype, len(pieces[0].start)
    for piece in pieces:
        if piece.tensor.dtype is not dtype or len(piece.start) != rank:
            raise damaged(
                str(folder),
                f"has tensor {key!r} as {dtype} of {rank} dimensions in {pieces[0].where}, and as "
                f"{piece.tensor.dtype} of {len(piece.start)} in {piece.where}",
                _COPY_AGAIN,
            )
    ends = ([a + n for a, n in zip(p.start, p.tensor.shape, strict=True)] for p in pieces)
    shape = tuple(map(max, zip(*ends, strict=True)))
    return assemble(str(folder), key, dtype, shape, pieces, hint=_COPY_AGAIN)


def _saved_offsets(path: AnyPath, text: str | None) -> dict[str, Index] | None:
    """Where the tensors of one file start, by key; None for a file that holds whole tensors."""
    if text is None:
        return None
    try:
        table = parse_json(str(path), text)
    except (ValueError, RecursionError) as error:
        why = f"has a {_SHARDING_INFO} that is not JSON: {error}"
        raise damaged(str(path), why, _COPY_AGAIN) from error
    offsets = {}
    for name, entry in table.items() if isinstance(table, dict) else ():
        match entry:
            case {"saved_offsets": list() as start} if is_index(tuple(start)):
                offsets[format_key((name,))] = tuple(start)
            case _:
                raise damaged(str(path), f"has a {_SHARDING_INFO} of an unknown form", _COPY_AGAIN)
    return offsets
