"""A live model that is spread over ranks (DTensor, FSDP2), as one `Checkpoint` where the run leads.

In: on every rank, its own part of the same state. Out: what a verb makes of the whole, the same on
all ranks. The rank that digests a chunk gets its pieces from the ranks that hold them, straight
from their memory or device: no rank ever holds more of the others than a chunk a thread.
Refused (ModelError): partial sums, states that are not the same on all ranks, and pieces that leave
holes or overlap. Plain tensors among the others are taken from the first rank, as a save does.

torch.distributed has no one-sided reads, so each rank has a thread that answers requests.
"""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from harness.checkpoint.dtypes import DTYPES, DType
from harness.checkpoint.keys import format_key
from harness.checkpoint.sources.source import Source
from harness.checkpoint.tensors import Checkpoint, Storage, Tensor, tensor_table
from harness.errors import HarnessError, ModelError, TeamError
from harness.model.distributed.team import (
    ARRIVAL,
    PATIENCE,
    TorchTeam,
    died,
    name_of,
    unexpected,
    watched,
)
from harness.model.state import as_checkpoint
from harness.streaming.chunks import CHUNK_NBYTES, buffers
from harness.streaming.ranks import working_as

Array = np.ndarray[Any, np.dtype[Any]]
_Result = TypeVar("_Result")

_REQUEST, _FAILURE, _REPLY = 1, 2, 3
_STOP = -1
# Shorter runs are placed by an index per element.
_MIN_RUN = 64


def is_spread(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether other ranks hold parts of a state, too."""
    return any(isinstance(tensor, DTensor) for tensor in state.values())


def together(
    state: Mapping[str, torch.Tensor], name: str, verb: Callable[[Checkpoint], _Result]
) -> _Result:
    """Call a verb on a state that is spread over ranks, all of which must call this alike.

    It runs on the first rank of those that hold the state, while the others serve it; returns, or
    raises, the same on all. Memory: the result, and a few chunks a thread.
    """
    with _group_of(state) as group:
        team = TorchTeam(group)
        with _exchange(group, state) as exchange:
            if team.rank > 0:
                served: _Result = team.serve()
                return served
            try:
                with working_as(team):
                    result = verb(exchange.joined(name))
            except BaseException as error:
                team.dismiss(error if isinstance(error, HarnessError) else unexpected(error))
                raise
            team.dismiss(result)
            return result


# Groups of some ranks, by these, for the next call: torch names a group by its ranks and the number
# of groups, so that one made anew would find the addresses of the one that was destroyed.
_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


@contextmanager
def _group_of(state: Mapping[str, torch.Tensor]) -> Iterator[dist.ProcessGroup]:
    """A group of its own, on the CPU, of all ranks that hold a part of the state."""
    spread = [tensor for tensor in state.values() if isinstance(tensor, DTensor)]
    ranks = tuple(sorted({int(rank) for t in spread for rank in t.device_mesh.mesh.flatten()}))
    if len(ranks) == dist.get_world_size():
        group = _new_group(ranks)
        try:
            yield group
        finally:
            dist.destroy_process_group(group)
        return
    known = _groups.pop(ranks, None)
    group = known if known is not None and _is_known_to_torch(known) else _new_group(ranks)
    try:
        yield group
    except BaseException as error:
        if _ends_all_alike(error):
            _groups[ranks] = group
        raise
    _groups[ranks] = group


def _new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    is_all = len(ranks) == dist.get_world_size()
    try:
        with watched():
            group: dist.ProcessGroup = dist.new_group(
                None if is_all else [*ranks],
                backend="gloo",
                timeout=ARRIVAL,
                use_local_synchronization=not is_all,
            )
    except RuntimeError as error:
        raise TeamError(
            f"the ranks {[*ranks]}, which hold the model, did not all come within {ARRIVAL}",
            hint="call this on every rank that holds a part of the model",
        ) from error
    return group


def _is_known_to_torch(group: dist.ProcessGroup) -> bool:
    """Whether a group was not destroyed with all others."""
    try:
        dist.get_group_rank(group, dist.get_rank())
    except ValueError:
        return False
    return True


def _ends_all_alike(error: BaseException) -> bool:
    """Whether all ranks end with it, and none is left in the middle of something."""
    return isinstance(error, HarnessError) and not isinstance(error, TeamError)


# What the ranks tell each other before anything is read.


@dataclass(frozen=True, slots=True)
class Box:
    """The part of a tensor that one rank holds: its offset and size along every axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def num_before(self, place: int, shape: tuple[int, ...]) -> int:
        """How many elements of the box stand before a place in the logical order of the tensor."""
        count = 0
        for axis, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            step = math.prod(shape[axis + 1 :])
            index, place = divmod(place, step) if step else (0, 0)
            count += min(max(index - offset, 0), size) * math.prod(self.sizes[axis + 1 :])
            if not offset <= index < offset + size:
                break
        return count

    def scatter(
        self, data: Array, first: int, out: Array, start: int, shape: tuple[int, ...]
    ) -> None:
        """Put elements of the box, from its `first` on, into `out`, elements from `start` on."""
        last = first + data.size
        cut = [axis for axis, size in enumerate(self.sizes) if size != shape[axis]]
        axis = cut[-1] if cut else 0
        inner = math.prod(shape[axis + 1 :])
        run = self.sizes[axis] * inner
        rows = np.arange(first // run, (last - 1) // run + 1)
        outer = np.zeros_like(rows)
        for a, index in enumerate(np.unravel_index(rows, self.sizes[:axis]) if axis else ()):
            outer = outer * shape[a] + index + self.offsets[a]
        places = (outer * shape[axis] + self.offsets[axis]) * inner - start
        if run < _MIN_RUN:
            row, within = np.divmod(np.arange(first, last), run)
            out[places[row - rows[0]] + within] = data
            return
        for begin, place in zip((rows * run).tolist(), places.tolist(), strict=True):
            a, b = max(first, begin), min(last, begin + run)
            out[place + a - begin : place + b - begin] = data[a - first : b - first]


@dataclass(frozen=True, slots=True)
class _Row:
    """What one rank has of one tensor; `box` is None for a plain one.

    `place` is equal for two tensors of the rank where they are the same memory: tied.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    box: Box | None
    place: tuple[int, ...] | None


def _tables(
    group: dist.ProcessGroup, state: Mapping[str, torch.Tensor]
) -> tuple[list[list[_Row]], list[Tensor]]:
    """What every rank has, and the tensors that this one holds; all raise what one has met."""
    mine: list[_Row] | HarnessError
    held: list[Tensor] = []
    try:
        mine = [_row(format_key((key,)), tensor) for key, tensor in state.items()]
        local = {key: _local(tensor) for key, tensor in state.items()}
        held += as_checkpoint(local, "the live model").tensors.values()
    except HarnessError as error:
        mine = error
    except Exception as error:
        mine = unexpected(error)
    found: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(found, mine, group=group)
    except RuntimeError as error:
        raise TeamError(
            f"another rank has died, or did not come within {ARRIVAL}",
            hint="see what it printed last, and call this on every rank that holds a part",
        ) from error
    for rank, table in enumerate(found):
        if isinstance(table, HarnessError):
            raise type(table)(f"rank {name_of(group, rank)}: {table}", hint=table.hint)
    first, *others = dist.get_process_group_ranks(group)
    for name, table in zip(others, found[1:], strict=True):
        _refuse_other_state(found[0], table, first, name)
    return found, held


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _row(key: str, tensor: torch.Tensor) -> _Row:
    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return _Row(key, dtype, shape, None, None)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ModelError(
            f"{key}: is a partial sum on every rank ({tensor.placements})",
            hint="redistribute it to Replicate() or Shard(dim) first",
        )
    local = _local(tensor)
    if local.numel() == 0:
        return _Row(key, dtype, shape, Box((0,), (0,)), None)
    # As torch.distributed.checkpoint saves it.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    box = Box(tuple(chunk.offsets) or (0,), tuple(chunk.sizes) or (1,))
    if math.prod(local.shape) != box.numel:
        raise ModelError(
            f"{key}: holds {list(local.shape)} here, but its placement "
            f"{tensor.placements} says {list(box.sizes)}"
        )
    place = (local.untyped_storage().data_ptr(), int(local.storage_offset()), *local.stride())
    return _Row(key, dtype, shape, box, place)


def _refuse_other_state(
    ours: Sequence[_Row], theirs: Sequence[_Row], first: int, rank: int
) -> None:
    here, there = ({row.key: _in_words(row) for row in table} for table in (ours, theirs))
    for key in {**here, **there}:
        if here.get(key) != there.get(key):
            raise ModelError(
                f"{key}: rank {first} has {here.get(key, 'nothing')}, "
                f"rank {rank} {there.get(key, 'nothing')}",
                hint="all ranks must give the same model",
            )
    if [*here] != [*there]:
        raise ModelError(
            f"the keys of rank {rank} are in another order than those of rank {first}",
            hint="all ranks must give the same model",
        )


def _in_words(row: _Row) -> str:
    spread = "a plain tensor" if row.box is None else "a DTensor"
    return f"{spread}, {row.dtype} {list(row.shape)}"


# Reading what others hold.


class Shards(Source):
    """The logical bytes of a DTensor, as a source, in pieces on the ranks of a team."""

    def __init__(self, index: int, rows: Sequence[_Row]) -> None:
        """`rows` are what the ranks hold of it, by rank; raises ModelError for a bad cover."""
        self._index, self._dtype, self._shape = index, rows[0].dtype, rows[0].shape or (1,)
        self.name = rows[0].key
        self.nbytes = math.prod(self._shape) * self._dtype.itemsize
        holders: dict[Box, list[int]] = {}
        for rank, row in enumerate(rows):
            if row.box is not None and row.box.numel:
                holders.setdefault(row.box, []).append(rank)
        self._holders = holders
        if not _covers(tuple(holders), self._shape):
            raise ModelError(
                f"{self.name}: the pieces on {len(rows)} ranks leave holes or overlap",
                hint="redistribute it to plain Shard(dim) or Replicate() placements",
            )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not buffer:
            return
        itemsize = self._dtype.itemsize
        start, stop = offset // itemsize, (offset + len(buffer)) // itemsize
        out = np.frombuffer(buffer, self._dtype.raw)
        for box, ranks in self._holders.items():
            first, last = box.num_before(start, self._shape), box.num_before(stop, self._shape)
            for a in range(first, last, CHUNK_NBYTES // itemsize):
                b = min(last, a + CHUNK_NBYTES // itemsize)
                data = buffers.get("piece", (b - a) * itemsize)
                _connected().fetch(ranks, self._index, a * itemsize, data)
                box.scatter(data.view(self._dtype.raw), a, out, start, self._shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _shards, (self._index,)


@lru_cache(maxsize=64)
def _covers(boxes: tuple[Box, ...], shape: tuple[int, ...]) -> bool:
    """Whether boxes hold every element of a tensor once."""
    if sum(box.numel for box in boxes) != math.prod(shape):
        return False
    if len(boxes) < 2:
        return True
    starts = np.array([box.offsets for box in boxes], dtype="<i8").reshape(len(boxes), -1)
    stops = starts + np.array([box.sizes for box in boxes], dtype="<i8").reshape(starts.shape)
    for number in range(len(boxes)):
        meets = (starts[number] < stops[:number]) & (starts[:number] < stops[number])
        if meets.all(axis=1).any():
            return False
    return True


class _Exchange:
    """Gives the other ranks what this one holds, and gets from them what they hold."""

    def __init__(self, group: dist.ProcessGroup, state: Mapping[str, torch.Tensor]) -> None:
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self._tables, self._held = _tables(group, state)
        self.shards = {
            index: Shards(index, [table[index] for table in self._tables])
            for index, row in enumerate(self._tables[0])
            if row.box is not None
        }
        # One request at a time to each rank, so that answers need no names.
        self._locks = [threading.Lock() for _ in range(self._size)]
        self._thread = threading.Thread(target=self._answer, name="harness shards", daemon=True)
        if self._size > 1:
            self._thread.start()

    def joined(self, name: str) -> Checkpoint:
        """The whole state; what is tied on every rank is tied."""
        storages: dict[tuple[Any, ...], Storage] = {}
        tensors = []
        for index, tensor in enumerate(self._held):
            row = self._tables[0][index]
            if row.box is not None:
                shards = self.shards[index]
                storage = Storage(source=shards, offset=0, nbytes=shards.nbytes)
                place = tuple(table[index].place for table in self._tables)
                if any(place):
                    storage = storages.setdefault((place, row.shape), storage)
                tensor = Tensor(key=row.key, dtype=row.dtype, shape=row.shape, storage=storage)
            tensors.append(tensor)
        table = tensor_table(name, tensors)
        return Checkpoint(name=name, container="live model", section="", tensors=table)

    def fetch(self, ranks: Sequence[int], index: int, start: int, data: Array) -> None:
        """Fill `data` with bytes, from `start` on, of the piece that each of `ranks` holds."""
        if self._rank in ranks:
            with self._named(index):
                self._held[index].read_into(start, data.data)
            return
        rank = ranks[self._rank % len(ranks)]
        size = torch.empty(1, dtype=torch.int64)
        with self._locks[rank]:
            try:
                request = torch.tensor([index, start, data.size])
                self._group.send([request], rank, _REQUEST).wait(PATIENCE)
                self._group.recv([size], rank, _FAILURE).wait(PATIENCE)
                failure = bytearray(int(size))
                reply = torch.frombuffer(failure or data, dtype=torch.uint8)
                self._group.recv([reply], rank, _REPLY).wait(PATIENCE)
            except RuntimeError as error:
                raise died(self._group, rank) from error
        if failure:
            raise pickle.loads(failure)

    def close(self) -> None:
        """End the threads that answer, each stopped by another rank: none can send to itself."""
        if self._size == 1:
            return
        with suppress(RuntimeError):
            for rank in range(1, self._size) if self._rank == 0 else [0] * (self._rank == 1):
                stop = torch.tensor([_STOP, 0, 0])
                self._group.send([stop], rank, _REQUEST).wait(PATIENCE)
            self._thread.join()

    def _answer(self) -> None:
        request = torch.empty(3, dtype=torch.int64)
        with suppress(RuntimeError):  # a rank has died, as the one that leads notices, too
            while True:
                work = self._group.recv_anysource([request], _REQUEST)
                work.wait(PATIENCE)
                index, start, nbytes = request.tolist()
                if index == _STOP:
                    return
                rank, failure = work._source_rank(), b""
                try:
                    with self._named(index):
                        data = buffers.get("answer", nbytes)
                        self._held[index].read_into(start, data.data)
                except ModelError as error:
                    failure = pickle.dumps(error)
                    data = np.frombuffer(bytearray(failure), "u1")
                self._group.send([torch.tensor([len(failure)])], rank, _FAILURE).wait(PATIENCE)
                self._group.send([torch.from_numpy(data)], rank, _REPLY).wait(PATIENCE)

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        """Say of what goes wrong which piece could not be read, and where."""
        try:
            yield
        except Exception as error:  # whatever the memory of a device raises
            row = self._tables[self._rank][index]
            box = row.box or Box((), row.shape)
            cause = error if isinstance(error, HarnessError) else unexpected(error)
            name = name_of(self._group, self._rank)
            raise ModelError(
                f"{row.key}: rank {name} cannot read its piece {list(box.sizes)} at "
                f"{list(box.offsets)} of {list(row.shape)}: {cause}",
                hint=f"see that the device of rank {name} works and has memory left, then run "
                "again",
            ) from error


_exchanges: list[_Exchange] = []


def _connected() -> _Exchange:
    return _exchanges[-1]


def _shards(index: int) -> Shards:
    """A tensor that another rank speaks of."""
    return _connected().shards[index]


@contextmanager
def _exchange(group: dist.ProcessGroup, state: Mapping[str, torch.Tensor]) -> Iterator[_Exchange]:
    """Answer the others as long as the context lasts; all ranks leave it in the same way."""
    exchange = _Exchange(group, state)
    _exchanges.append(exchange)
    is_whole = True
    try:
        yield exchange
    except BaseException as error:  # a rank that has died can stop none: its thread is left behind
        is_whole = _ends_all_alike(error)
        raise
    finally:
        _exchanges.remove(exchange)
        if is_whole:
            exchange.close()
