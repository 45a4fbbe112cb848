"""A live model that is spread over ranks (DTensor, FSDP2), as one `Checkpoint` on rank 0.

In: on every rank, its own part of the same state. Out: what a verb makes of the whole, the same on
all ranks. When the verb reads a DTensor, all ranks gather it by `DTensor.full_tensor()`, one at a
time. Refused (ModelError): partial sums, and states that are not the same on all ranks. Plain
tensors among the others are taken from rank 0, as a save does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.keys import format_key
from harness.checkpoint.sources.source import Source
from harness.checkpoint.tensors import Checkpoint, Storage, Tensor, tensor_table
from harness.errors import ModelError
from harness.model.distributed.group import Ranks, attempt, raised
from harness.model.state import as_checkpoint
from harness.streaming.chunks import CHUNK_NBYTES

_Result = TypeVar("_Result")
# A rank holds two of a piece while it is gathered (gloo copies it).
_PIECE_NBYTES = 64 << 20
# Of each tensor, what must be equal on all ranks, and the memory that it has on this one.
_Rows = dict[str, tuple[str, tuple[int, ...] | None]]
_groups: dict[tuple[object, ...], dist.ProcessGroup] = {}


def together(
    state: Mapping[str, torch.Tensor], name: str, verb: Callable[[Checkpoint], _Result]
) -> _Result:
    """Call a verb on a state that is spread over ranks, all of which must call this alike.

    It runs on the first rank of those that hold the state, while the others gather with it;
    returns, or raises, the same on all. Memory: the result, and pieces of 64 MiB; on the first rank
    also one whole tensor, on the CPU. One that is cut along all axes is a single piece.
    """
    state = {format_key((key,)): tensor for key, tensor in state.items()}
    ranks = Ranks(_group_of(state))
    gathering = _Gathering(ranks, state)
    rows = attempt(lambda: _rows(state))
    if ranks.rank > 0:
        ranks.gather(rows)
        served: _Result = ranks.work(gathering.gather)
        return served
    found = attempt(lambda: verb(_joined(ranks, ranks.gather(rows), name, gathering)))
    ranks.shutdown(found)
    result: _Result = raised(found)
    return result


def _group_of(state: Mapping[str, torch.Tensor]) -> dist.ProcessGroup:
    """A group of all ranks that hold a part of the state; the next call finds it again."""
    meshes = {tensor.device_mesh for tensor in state.values() if isinstance(tensor, DTensor)}
    ranks = sorted({int(rank) for mesh in meshes for rank in mesh.mesh.flatten()})
    is_all = len(ranks) == dist.get_world_size()
    if not is_all and len(meshes) == 1 and (mesh := next(iter(meshes))).ndim == 1:
        return mesh.get_group()  # torch names groups by their number: a new one needs all ranks
    place = dist.group.WORLD, *ranks  # of this run, should there have been another one
    if place not in _groups:
        own = dist.new_group(ranks, backend="gloo", use_local_synchronization=not is_all)
        _groups[place] = own
    return _groups[place]


def _plain(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if not isinstance(tensor, DTensor)}


def _rows(state: Mapping[str, torch.Tensor]) -> _Rows:
    """What this rank has; raises ModelError for what cannot be read."""
    as_checkpoint(_plain(state), "the live model")
    rows: _Rows = {}
    for key, tensor in state.items():
        kind, place = "plain tensor", None
        if isinstance(tensor, DTensor):
            kind = "DTensor"
            if any(placement.is_partial() for placement in tensor.placements):
                raise ModelError(
                    f"{key}: is a partial sum on every rank ({tensor.placements})",
                    hint="redistribute it to Replicate() or Shard(dim) first",
                )
            with torch.no_grad():
                local = tensor.to_local()
            if local.numel():
                start = local.untyped_storage().data_ptr()
                place = start, int(local.storage_offset()), *local.stride()
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows[key] = f"a {kind}, {dtype} {list(tensor.shape)}", place
    return rows


def _joined(ranks: Ranks, tables: list[_Rows], name: str, gathering: _Gathering) -> Checkpoint:
    """The whole state; what is tied on every rank is tied. Raises ModelError for several states."""
    for rank, rows in zip(ranks.names, tables, strict=True):
        for key in {**tables[0], **rows}:
            here, there = (side.get(key, ("nothing",))[0] for side in (tables[0], rows))
            if here != there:
                raise ModelError(
                    f"{key}: rank {ranks.names[0]} has {here}, rank {rank} {there}",
                    hint="all ranks must give the same model",
                )
    found = dict(as_checkpoint(_plain(gathering.state), name).tensors)
    storages: dict[tuple[Any, ...], Storage] = {}
    for key, tensor in gathering.state.items():
        if isinstance(tensor, DTensor):
            dtype, shape = DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
            source = _Gathered(gathering, key, tensor.numel() * dtype.itemsize)
            storage = Storage(source=source, offset=0, nbytes=source.nbytes)
            places = tuple(rows[key][1] for rows in tables)
            if any(places):
                storage = storages.setdefault((places, shape), storage)
            found[key] = Tensor(key=key, dtype=dtype, shape=shape, storage=storage)
    table = tensor_table(name, (found[key] for key in gathering.state))
    return Checkpoint(name=name, container="live model", section="", tensors=table)


class _Gathering:
    """Gathers one DTensor at a time, on all ranks, when rank 0 reads it."""

    def __init__(self, ranks: Ranks, state: Mapping[str, torch.Tensor]) -> None:
        self.state, self._ranks, self._lock = state, ranks, threading.Lock()
        self._held = "", torch.empty(0)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with logical bytes of a tensor; on rank 0, from any thread."""
        with self._lock:  # also while it is copied: no thread holds another one
            found = self._held
            if found[0] != key:
                is_large = self.state[key].nbytes > CHUNK_NBYTES
                if is_large:  # small ones are read once, beside the large one before
                    found = self._held = "", torch.empty(0)
                self._ranks.broadcast(("do", key))
                found = key, torch.empty(self.state[key].shape, dtype=self.state[key].dtype)
                self.gather(*found)
                self._held = found if is_large else self._held
            data = found[1].reshape(-1).view(torch.uint8).numpy()
            buffer[:] = data[start : start + len(buffer)].data

    def gather(self, key: str, whole: torch.Tensor | None = None) -> None:
        """Gather a tensor, called on all ranks; it is kept in `whole`, on rank 0."""
        tensor = self.state[key]
        assert isinstance(tensor, DTensor)
        with self._ranks.collective(), torch.no_grad():
            for piece in _pieces(tensor):
                part: Any = tensor if piece is None else tensor.narrow(*piece)
                gathered = part.full_tensor()
                if whole is not None:
                    (whole if piece is None else whole.narrow(*piece)).copy_(gathered)


def _pieces(tensor: DTensor) -> Iterator[tuple[int, int, int] | None]:
    """Cut a large tensor along an axis that no rank has cut: an axis, start and size; or None."""
    cut = {placement.dim for placement in tensor.placements if isinstance(placement, Shard)}
    free = [dim for dim in range(tensor.ndim) if dim not in cut]
    count = -(-tensor.nbytes // _PIECE_NBYTES)
    if count < 2 or not free or {*map(type, tensor.placements)} - {Shard, Replicate}:
        yield None
        return
    axis = max(free, key=lambda dim: tensor.shape[dim])
    step = -(-tensor.shape[axis] // count)
    for start in range(0, tensor.shape[axis], step):
        yield axis, start, min(step, tensor.shape[axis] - start)


class _Gathered(Source):
    """The logical bytes of a DTensor, as a source."""

    def __init__(self, gathering: _Gathering, key: str, nbytes: int) -> None:
        self._gathering, self.name, self.nbytes = gathering, key, nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._gathering.read_into(self.name, offset, buffer)

    def __reduce__(self) -> NoReturn:
        raise TypeError("only this rank reads it")
