"""torch.distributed.checkpoint folders: tensors cut into chunks by the ranks that saved them.

In: a folder of `.metadata` (a pickle that says which chunk is where) and `*.distcp` files (what
`torch.save` wrote of each chunk, one after the other), with Lightning's `meta.pt` beside them. Out:
the nested state dict as `dcp_to_torch_save` would consolidate it, every tensor whole. Refused:
chunks that do not tile their tensor or are not what `.metadata` says of them, ranges of a file that
overlap or leave it, files outside of the folder (links in it are followed), compressed items.
Format as in torch/distributed/checkpoint of torch 2.0 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import PurePosixPath
from typing import Any

from harness.checkpoint.dtypes import DType
from harness.checkpoint.formats.archives import TensorArchives, ends
from harness.checkpoint.formats.assembled import Index, Piece, assemble, is_index
from harness.checkpoint.formats.torchfile import TorchFile, read_torch_zip
from harness.checkpoint.keys import format_key
from harness.checkpoint.sources.access import at_once, open_source
from harness.checkpoint.sources.paths import METADATA, AnyPath
from harness.checkpoint.sources.source import COPY_AGAIN, RangeSource, Source, damaged
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.inert import Global, OpaqueKey, Record, TupleKey
from harness.checkpoint.unpickling.opcodes import Budget, structure_limit, unpickle_all
from harness.checkpoint.unpickling.rebuild import brief, torch_dtype
from harness.errors import CheckpointError

LIGHTNING = "meta.pt"
_MAX_DEPTH = 128
_MAX_GAP = 64
_ITEMS_AHEAD = 256
_NO_TORCH_SAVE = (
    "copy the folder again; if it was saved with serialization_format=SAFETENSORS, which torch "
    "cannot load either, save it by the HuggingFaceStorageWriter"
)


def read_dcp(folder: AnyPath) -> tuple[TorchFile, tuple[Source, ...]]:
    """Read a folder with a `.metadata`; returns its state dict, and what to close.

    Memory: about 2.5 KB per chunk of a tensor. Raises CheckpointError.
    """
    budget = Budget()
    plan = _read_plan(folder, budget)
    items, sources = _read_items(folder, plan, budget)
    checksums = [checksum for _, item in items.values() for checksum in item.checksums]
    leaves = [
        (plan.paths.get(key, (key,)), _value(folder, key, table, items))
        for key, table in plan.tables.items()
    ]
    root = _nested(str(folder / METADATA), leaves)
    container = "torch.distributed.checkpoint"
    if (folder / LIGHTNING).is_file():
        container = "Lightning sharded checkpoint"
        source = open_source(folder / LIGHTNING)
        sources.append(source)
        beside = read_torch_zip(source, budget=budget)
        checksums += beside.checksums
        _join_lightning(source.name, root, beside.root)
    file = TorchFile(
        container=container, root=root, structure_nbytes=plan.nbytes, checksums=tuple(checksums)
    )
    return file, tuple(sources)


# What `.metadata` says


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Table:
    """A tensor of the checkpoint: the shapes of its chunks by their offsets."""

    dtype: DType
    shape: Index
    chunks: dict[TupleKey, Index]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where one item is: a chunk of a tensor, or a value (then `offset` is None)."""

    key: str
    offset: TupleKey | None
    file: str
    start: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.file}, bytes {self.start} to {self.start + self.nbytes}"


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Plan:
    """What `.metadata` says: tensors (None: other values), their paths, the places of all items."""

    tables: dict[str, _Table | None]
    paths: dict[str, tuple[Any, ...]]
    places: list[_Place]
    nbytes: int


def _read_plan(folder: AnyPath, budget: Budget) -> _Plan:
    with closing(open_source(folder / METADATA)) as source:
        budget.max_nbytes = structure_limit(source.nbytes, budget.max_nbytes)
        root = unpickle_all(source, budget=budget)
    match root:
        case Record(
            state={"state_dict_metadata": dict() as entries, "storage_data": dict() as storage}
        ):
            paths = root.state.get("planner_data")
        case _:
            raise damaged(source.name, f"holds no Metadata of torch, but {brief(root)}")
    tables = {}
    for key, entry in entries.items():
        if not isinstance(key, str):
            raise damaged(source.name, f"names a tensor by {brief(key)}")
        tables[key] = _table(source.name, key, entry)
    plan = _Plan(
        tables=tables,
        paths=paths if isinstance(paths, dict) else {},
        places=[_place(source.name, key, value) for key, value in storage.items()],
        nbytes=source.nbytes,
    )
    _check_plan(source.name, plan)
    return plan


def _table(name: str, key: str, entry: Any) -> _Table | None:
    match entry:
        case Record(
            state={
                "properties": Record(state=(dtype, *_)),
                "size": tuple() as shape,
                "chunks": list() as chunks,
            }
        ) if is_index(shape):
            table = _Table(dtype=_dtype(name, key, dtype), shape=shape, chunks={})
        case Record(callee=Global(name="BytesStorageMetadata")):
            return None
        case _:
            raise damaged(name, f"describes {key!r} in an unknown way: {brief(entry)}")
    for chunk in chunks:
        match chunk:
            case Record(state={"offsets": tuple() as offset, "sizes": tuple() as size}) if (
                is_index(offset) and is_index(size) and len(offset) == len(size) == len(shape)
            ):
                pass
            case _:
                raise damaged(name, f"describes a chunk of {key!r} in an unknown way")
        offset = TupleKey(offset)
        if offset in table.chunks:
            raise damaged(name, f"lists the chunk of {key!r} at {list(offset)} twice")
        table.chunks[offset] = size
    return table


def _dtype(name: str, key: str, value: Any) -> DType:
    try:
        return torch_dtype(value)
    except ValueError as error:
        raise damaged(name, f"gives {key!r} an {error}") from error


def _place(name: str, index: Any, info: Any) -> _Place:
    match index, info:
        case (
            OpaqueKey(value=Record(state={"fqn": str() as key})),
            Record(
                state={
                    "relative_path": str() as file,
                    "offset": int() as start,
                    "length": int() as nbytes,
                }
            ),
        ):
            offset = index.value.state.get("offset")
            transforms = info.state.get("transform_descriptors")
        case _:
            raise damaged(name, f"places an item in an unknown way: {brief(info)}")
    if offset is not None and not is_index(offset):
        raise damaged(name, f"places a chunk of {key!r} at {brief(offset)}")
    offset = None if offset is None else TupleKey(offset)
    if transforms:
        how = ", ".join(map(brief, transforms)) if isinstance(transforms, list) else "?"
        raise CheckpointError(
            f"{name}: {key!r} is compressed or encrypted ({how}) in {file!r}",
            hint="save the checkpoint without extensions of the FileSystemWriter",
        )
    parts = PurePosixPath(file).parts
    if not parts or ".." in parts or file.startswith("/") or "\\" in file or "\0" in file:
        raise damaged(name, f"places {key!r} in {file[:200]!r}, which is no file inside the folder")
    if start < 0 or nbytes <= 0:
        why = f"places {key!r} at {nbytes} bytes from byte {start} of {file!r}"
        raise CheckpointError(f"{name}: {why}", hint=_NO_TORCH_SAVE)
    return _Place(key=key, offset=offset, file=file, start=start, nbytes=nbytes)


def _check_plan(name: str, plan: _Plan) -> None:
    """Check that items and tables are one to one, and that no two items share bytes."""
    placed: set[tuple[str, TupleKey | None]] = set()
    for place in plan.places:
        if (place.key, place.offset) in placed:
            raise damaged(name, f"places {_item(place.key, place.offset)} twice, again in {place}")
        placed.add((place.key, place.offset))
    listed: set[tuple[str, TupleKey | None]] = set()
    for key, table in plan.tables.items():
        listed |= {(key, None)} if table is None else {(key, offset) for offset in table.chunks}
    for key, offset in sorted(listed ^ placed, key=repr)[:1]:
        what = _item(key, offset)
        if (key, offset) in listed:
            raise damaged(name, f"lists {what}, but does not say in which file it is")
        raise damaged(name, f"places {what} in a file, but does not list it")
    plan.places.sort(key=lambda place: (place.file, place.start))
    for first, second in pairwise(plan.places):
        if first.file == second.file and first.start + first.nbytes > second.start:
            raise CheckpointError(
                f"{name}: places two items in the same bytes: {first.key!r} in {first}, and "
                f"{second.key!r} in {second}",
                hint=_NO_TORCH_SAVE,
            )


def _item(key: str, offset: TupleKey | None) -> str:
    return f"{key!r}" if offset is None else f"the chunk of {key!r} at {list(offset)}"


# What the files hold


# What torch.save wrote in each place: a tensor, or whatever else it was given.
_Items = dict[tuple[str, TupleKey | None], tuple[_Place, TorchFile]]


def _read_items(folder: AnyPath, plan: _Plan, budget: Budget) -> tuple[_Items, list[Source]]:
    """Open every item, file by file in the order of their bytes."""
    items: _Items = {}
    sources: list[Source] = []
    tensors = TensorArchives(budget)
    groups = [list(group) for _, group in groupby(plan.places, key=lambda place: place.file)]

    def opened(places: list[_Place]) -> Source:
        path = folder / places[0].file
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing, but {METADATA} places {len(places)} items in it, the first "
                f"of them {places[0].key!r}",
                hint="copy the missing file beside the others, or save the checkpoint again",
            )
        return open_source(path)

    def read(source: Source, place: _Place) -> TorchFile:
        where = f"{source.name}: {place.key!r}"
        if place.start + place.nbytes > source.nbytes:
            raise CheckpointError(
                f"{where} should be in its bytes {place.start} to "
                f"{place.start + place.nbytes}, but the file has {source.nbytes}",
                hint="the file is truncated, or still being written: copy it again",
            )
        item = RangeSource(source, place.start, place.nbytes, f"{where} at {place.start}")
        is_tensor = plan.tables[place.key] is not None
        return tensors.read(item) if is_tensor else read_torch_zip(item, budget=budget)

    with closing(at_once(folder, opened, groups)) as opening:
        for source, places in zip(opening, groups, strict=True):
            sources.append(source)
            for first in range(0, len(places), _ITEMS_AHEAD):
                some = places[first : first + _ITEMS_AHEAD]
                spans = (span for place in some for span in ends(place.start, place.nbytes))
                with source.ahead(spans):
                    for place in some:
                        items[place.key, place.offset] = place, read(source, place)
    return items, sources


def _value(folder: AnyPath, key: str, table: _Table | None, items: _Items) -> Any:
    """A tensor from its chunks, or a value unchanged."""
    if table is None:
        return items[key, None][1].root
    pieces = []
    for offset, shape in table.chunks.items():
        place, file = items[key, offset]
        tensor = file.root
        where = f"{folder / place.file}: {key!r} at {place.start}"
        if not isinstance(tensor, Tensor) or tensor.storage.source is None:
            raise damaged(where, "is no tensor with values")
        if (tensor.dtype, tensor.shape) != (table.dtype, shape):
            raise damaged(
                where,
                f"is {tensor.dtype} {list(tensor.shape)}, but {METADATA} says "
                f"{table.dtype} {list(shape)}",
            )
        if tensor.storage.nbytes < tensor.nbytes:
            raise damaged(
                where, f"expands {tensor.storage.nbytes} bytes to {tensor.nbytes}, as no save does"
            )
        pieces.append(Piece(start=offset, tensor=tensor, where=str(place)))
    return assemble(str(folder), key, table.dtype, table.shape, pieces, hint=COPY_AGAIN)


# The state dict


class _Branch(dict[Any, Any]):
    """A dict, or a list by its indices, that is being filled."""


def _nested(name: str, leaves: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """Build the nested dicts and lists that the paths of the leaves describe."""
    root = _Branch()
    for path, leaf in leaves:
        if not _is_path(path):
            raise damaged(name, f"gives a path as {brief(path)}")
        branch: Any = root
        for step, below in pairwise(path):
            branch = branch.setdefault(step, _Branch())
            if not isinstance(branch, _Branch) or type(next(iter(branch), below)) is not type(
                below
            ):
                raise damaged(name, f"places {format_key(path)[:200]} where something else is")
        if path[-1] in branch:
            raise damaged(name, f"places two values at {format_key(path)[:200]}")
        branch[path[-1]] = leaf
    return {} if not root else dict(_finished(name, root))


def _is_path(path: Any) -> bool:
    return (
        isinstance(path, tuple)
        and 0 < len(path) <= _MAX_DEPTH
        and isinstance(path[0], str)
        and all(
            isinstance(step, str) or (type(step) is int and 0 <= step < 1 << 32) for step in path
        )
    )


def _finished(name: str, branch: _Branch) -> Any:
    children = {
        step: _finished(name, child) if isinstance(child, _Branch) else child
        for step, child in branch.items()
    }
    if any(isinstance(step, str) for step in children):
        return children
    length = max(children) + 1
    if length > _MAX_GAP + 2 * len(children):
        raise damaged(name, f"fills a list of {length} places with {len(children)} values")
    return [children.get(index) for index in range(length)]


def _join_lightning(name: str, root: dict[str, Any], beside: Any) -> None:
    """Add what Lightning keeps in `meta.pt`: all but the weights and the optimizers."""
    if not isinstance(beside, dict):
        raise damaged(name, f"should hold a dict of Lightning's, but holds {brief(beside)}")
    for key, value in beside.items():
        if key in root:
            raise damaged(name, f"holds {brief(key)}, which {METADATA} places as well")
        root[key] = value
