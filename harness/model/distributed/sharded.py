"""A live model that is spread over ranks (DTensor, FSDP2), as one `Checkpoint` on rank 0.

In: on every rank, its own part of the same state. Out: what a verb makes of the whole, the same on
all ranks. When the verb reads a DTensor, all ranks gather it by `DTensor.full_tensor()`, one at a
time. Refused (ModelError): partial sums, and states that are not the same on all ranks. Plain
tensors among the others are taken from rank 0, as a save does.
"""

from __future__ import annotations

import math
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
from harness.errors import HarnessError, ModelError
from harness.model.distributed.group import Ranks, attempt, unexpected
from harness.model.state import as_checkpoint
from harness.streaming.chunks import CHUNK_NBYTES

_Result = TypeVar("_Result")
# A rank holds two of a piece while it is gathered (gloo copies it).
_PIECE_NBYTES = 64 << 20
# Of each tensor, what must be equal on all ranks, and the memory that it has on this one.
_Rows = dict[str, tuple[str, tuple[int, ...] | None]]


def is_spread(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether other ranks hold parts of a state, too."""
    return any(isinstance(tensor, DTensor) for tensor in state.values())


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
    rows = attempt(lambda: _rows(state))
    gathering = _Gathering(ranks, state)
    if ranks.rank > 0:
        ranks.gather(rows)
        served: _Result = ranks.work(gathering.gather)
        return served
    try:
        result = verb(_joined(ranks, ranks.gather(rows), state, name, gathering))
    except BaseException as error:
        ranks.shutdown(error if isinstance(error, HarnessError) else unexpected(error))
        raise
    ranks.shutdown(result)
    return result


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def _group_of(state: Mapping[str, torch.Tensor]) -> dist.ProcessGroup:
    """A group of all ranks that hold a part of the state; the next call finds it again."""
    meshes = {tensor.device_mesh for tensor in state.values() if isinstance(tensor, DTensor)}
    ranks = tuple(sorted({int(rank) for mesh in meshes for rank in mesh.mesh.flatten()}))
    is_all = len(ranks) == dist.get_world_size()
    if not is_all and len(meshes) == 1 and (mesh := next(iter(meshes))).ndim == 1:
        return mesh.get_group()  # torch names groups by their number: a new one needs all ranks
    try:
        group = _groups[ranks]
        dist.get_group_rank(group, dist.get_rank())
    except (KeyError, ValueError):  # the latter where it was destroyed with all others
        group = dist.new_group([*ranks], backend="gloo", use_local_synchronization=not is_all)
        _groups[ranks] = group
    return group


def _rows(state: Mapping[str, torch.Tensor]) -> _Rows:
    """What this rank has; raises ModelError for what cannot be read."""
    as_checkpoint(_plain(state), "the live model")
    rows: _Rows = {}
    for key, tensor in state.items():
        said, place = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}", None
        if not isinstance(tensor, DTensor):
            rows[key] = f"a plain tensor, {said}", None
            continue
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
        rows[key] = f"a DTensor, {said}", place
    return rows


def _plain(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if not isinstance(tensor, DTensor)}


def _check_same(ranks: Ranks, expected: _Rows, actual: _Rows, index: int) -> None:
    first, other = ranks.name_of(0), ranks.name_of(index)
    hint = "all ranks must give the same model"
    for key in {**expected, **actual}:
        here, there = (rows.get(key, ("nothing",))[0] for rows in (expected, actual))
        if here != there:
            raise ModelError(f"{key}: rank {first} has {here}, rank {other} {there}", hint=hint)
    if [*expected] != [*actual]:
        said = f"the keys of rank {other} are in another order than those of rank {first}"
        raise ModelError(said, hint=hint)


def _joined(
    ranks: Ranks,
    tables: list[_Rows],
    state: Mapping[str, torch.Tensor],
    name: str,
    gathering: _Gathering,
) -> Checkpoint:
    """The whole state; what is tied on every rank is tied."""
    for index, rows in enumerate(tables):
        _check_same(ranks, tables[0], rows, index)
    plain = as_checkpoint(_plain(state), name).tensors
    storages: dict[tuple[Any, ...], Storage] = {}
    tensors = []
    for key, tensor in state.items():
        if key in plain:
            tensors.append(plain[key])
            continue
        dtype, shape = DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
        source = _Gathered(gathering, key, math.prod(shape) * dtype.itemsize)
        storage = Storage(source=source, offset=0, nbytes=source.nbytes)
        places = tuple(rows[key][1] for rows in tables)
        if any(places):
            storage = storages.setdefault((places, shape), storage)
        tensors.append(Tensor(key=key, dtype=dtype, shape=shape, storage=storage))
    table = tensor_table(name, tensors)
    return Checkpoint(name=name, container="live model", section="", tensors=table)


class _Gathering:
    """Gathers one DTensor at a time, on all ranks, when rank 0 reads it."""

    def __init__(self, ranks: Ranks, state: Mapping[str, torch.Tensor]) -> None:
        self._ranks, self._state = ranks, state
        self._lock = threading.Lock()
        self._held: Tensor | None = None

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with logical bytes of a tensor; on rank 0, from any thread."""
        with self._lock:  # also while it is copied: no thread holds another one
            tensor = self._held
            if tensor is None or tensor.key != key:
                is_large = self._state[key].nbytes > CHUNK_NBYTES
                if is_large:  # small ones are read once, beside the large one before
                    tensor = self._held = None
                self._ranks.broadcast(key)
                whole = torch.empty(self._state[key].shape, dtype=self._state[key].dtype)
                self.gather(key, whole)
                tensor = as_checkpoint({key: whole}, key).tensors[key]
                if is_large:
                    self._held = tensor
            tensor.read_into(start, buffer)

    def gather(self, key: str, whole: torch.Tensor | None = None) -> None:
        """Gather a tensor, called on all ranks; it is kept in `whole`, on rank 0."""
        tensor = self._state[key]
        assert isinstance(tensor, DTensor)
        with self._ranks.collective(), torch.no_grad():
            for axis, start, size in _pieces(tensor):
                piece = tensor if axis is None else tensor.narrow(axis, start, size)
                assert isinstance(piece, DTensor)
                gathered = piece.full_tensor()
                if whole is not None:
                    (whole if axis is None else whole.narrow(axis, start, size)).copy_(gathered)


def _pieces(tensor: DTensor) -> Iterator[tuple[int | None, int, int]]:
    """Cut a large tensor along an axis that no rank has cut: an axis, start and size; or None."""
    cut = {placement.dim for placement in tensor.placements if isinstance(placement, Shard)}
    free = [dim for dim in range(tensor.ndim) if dim not in cut]
    count = -(-tensor.numel() * tensor.element_size() // _PIECE_NBYTES)
    are_plain = all(type(placement) in (Shard, Replicate) for placement in tensor.placements)
    if count < 2 or not free or not are_plain:
        yield None, 0, 0
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
