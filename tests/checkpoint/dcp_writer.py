"""A small writer of torch.distributed.checkpoint folders: any chunks, in any files, any layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]
Layout = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """A tensor in boxes (offset and shape), each in a file of its number."""

    tensor: torch.Tensor
    boxes: Sequence[Box]
    files: Sequence[int] = ()
    layout: Layout = torch.Tensor.clone

    def chunk(self, box: Box) -> torch.Tensor:
        where = tuple(slice(at, at + size) for at, size in zip(*box, strict=True))
        return self.layout(self.tensor[where].clone())


def halves(tensor: torch.Tensor, dim: int = 0, count: int = 2) -> Cut:
    """Cut along one dimension, as ranks do."""
    boxes, at = [], 0
    for part in torch.chunk(tensor, count, dim):
        boxes.append((tuple(at if d == dim else 0 for d in range(tensor.dim())), tuple(part.shape)))
        at += part.shape[dim]
    return Cut(tensor, boxes, range(len(boxes)))


def write_dcp(
    folder: Path, values: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]] | None = None
) -> Path:
    """Write tensors that are cut (`Cut`), and other values whole, as DCP's own planner lays out."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}

    def write(index: MetadataIndex, value: Any, number: int) -> None:
        name = f"__{number}_0.distcp"
        with (folder / name).open("ab") as file:
            start = file.tell()
            torch.save(value, file)
            places[index] = _StorageInfo(name, start, file.tell() - start)

    for key, value in values.items():
        if not isinstance(value, Cut):
            tables[key] = BytesStorageMetadata()
            write(MetadataIndex(key), value, 0)
            continue
        tensor = value.tensor
        tables[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, [])
        for number, box in enumerate(value.boxes):
            tables[key].chunks.append(ChunkStorageMetadata(*map(torch.Size, box)))
            file = value.files[number] if number < len(value.files) else 0
            write(MetadataIndex(key, box[0], number), value.chunk(box), file)
    planned = {key: (key,) for key in values} if paths is None else dict(paths)
    write_metadata(folder, Metadata(tables, planned, places, StorageMeta(), "1.0.0"))
    return folder


def read_metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def write_metadata(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def place_of(metadata: Any, key: str, at: Iterable[int] | None) -> Any:
    """The storage info of a chunk, or of a value."""
    return metadata.storage_data[MetadataIndex(key, None if at is None else tuple(at))]
