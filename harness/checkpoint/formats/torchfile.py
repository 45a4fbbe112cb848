"""Files written by torch: zip archives, TorchScript archives, and the legacy pickle.

In: a source that holds one such file. Out: the object tree of its pickle, in which every tensor is
a `Tensor` (or a `Composite` of tensors) over the bytes where they are, and every other object is
inert. Refused: storages that are missing, short or long, and bytes that no reader would look at.
Formats as in torch/serialization.py of torch 0.4 to 2.13.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.checkpoint.dtypes import DTYPES, DType
from harness.checkpoint.formats.zips import Entry, read_zip
from harness.checkpoint.sources.scratch import copied
from harness.checkpoint.sources.source import (
    RangeSource,
    Source,
    check_range,
    damaged,
    read,
    too_many,
)
from harness.checkpoint.tensors import Checksum, Storage
from harness.checkpoint.unpickling.inert import Global, Record
from harness.checkpoint.unpickling.opcodes import (
    MAX_STRUCTURE_NBYTES,
    Budget,
    structure_limit,
    unpickle,
    unpickle_all,
)
from harness.checkpoint.unpickling.rebuild import STORAGE_DTYPES, StorageRef, brief
from harness.errors import CheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_SMALL_NBYTES = 1 << 20
# What else of torch is a zip archive, told by an entry that it has.
_OTHER_ARCHIVES = {
    "archive_format": "torch.export",
    "serialized_exported_program.json": "torch.export",
    ".data/extern_modules": "torch.package",
}
_WINDOW_NBYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchFile:
    """The object tree of a torch file; `script_classes` is filled for TorchScript archives.

    `script_classes` maps a class to the names of its parameters and of its buffers;
    `structure_nbytes` is how many bytes of pickles describe the tree.
    """

    container: str
    root: Any
    structure_nbytes: int = 0
    checksums: tuple[Checksum, ...] = ()
    script_classes: Mapping[Global, tuple[tuple[str, ...], tuple[str, ...]]] = field(
        default_factory=dict
    )


def read_torch_zip(source: Source, *, budget: Budget | None = None) -> TorchFile:
    """Read a zip archive written by `torch.save` (since 1.6) or `torch.jit.save`.

    `budget` as for `unpickle`, where many archives make one checkpoint.
    """
    entries = read_zip(source)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        inside = {name.partition("/")[2] or name for name in entries}
        if any("data/aotinductor/" in name for name in entries):
            raise CheckpointError(
                f"{source.name}: a package of AOTInductor, which holds compiled code",
                hint="give the checkpoint of the model that it was compiled from",
            )
        for mark in inside & _OTHER_ARCHIVES.keys():
            raise CheckpointError(
                f"{source.name}: an archive of {_OTHER_ARCHIVES[mark]}, not a checkpoint",
                hint=f"load it with {_OTHER_ARCHIVES[mark]}, then torch.save its state_dict",
            )
        found = ", ".join(sorted(entries)[:3]) or "nothing"
        raise CheckpointError(
            f"{source.name}: a zip archive, but not one of torch's: it has no data.pkl "
            f"(it holds {found}, …)",
            hint="give a file that torch.save, torch.jit.save or NeMo wrote",
        )
    prefix = pickles[0].removesuffix("data.pkl")
    order = b"little"
    if (entry := entries.get(f"{prefix}byteorder")) is not None:
        order = read(entry.source, 0, min(entry.nbytes, 16))
        if order not in (b"little", b"big"):
            raise damaged(entry.source.name, f"names an unknown byte order {order!r}")
    storages: dict[str, Storage] = {}

    def persistent(persistent_id: Any) -> StorageRef:
        key, dtype, numel, _ = _storage_id(source.name, persistent_id)
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise damaged(source.name, f"has no entry {prefix}data/{key}, which a tensor needs")
        if entry.nbytes != numel * dtype.itemsize:
            raise damaged(
                source.name,
                f"has {entry.nbytes} bytes in {entry.name}, but its pickle says "
                f"{numel} x {dtype} ({numel * dtype.itemsize} bytes)",
            )
        storage = storages.get(key)
        if storage is None:
            storage = storages[key] = Storage(
                source=entry.source, nbytes=entry.nbytes, big_endian=order == b"big"
            )
        return StorageRef(storage=storage, dtype=dtype)

    data = entries[pickles[0]]
    root = unpickle_all(data.source, persistent=persistent, budget=budget)
    code = [entry for entry in entries.values() if entry.name.startswith(f"{prefix}code/")]
    is_script = bool(code) and f"{prefix}constants.pkl" in entries
    return TorchFile(
        container="TorchScript" if is_script else "torch zip",
        root=root,
        structure_nbytes=data.nbytes,
        checksums=tuple(
            Checksum(entry.source, 0, entry.nbytes, entry.crc32)
            for entry in entries.values()
            if entry.crc32 and entry.nbytes
        ),
        script_classes=_script_classes(source.name, code, f"{prefix}code/") if is_script else {},
    )


def read_torch_legacy(source: Source) -> TorchFile:
    """Read what `torch.save` wrote before 1.6: four pickles, then the storages one by one."""
    # Nothing says how long the pickles are: they are copied as far as they reach.
    window = min(_WINDOW_NBYTES, source.nbytes)
    while True:
        data = copied(source, 0, window)
        try:
            return _read_legacy(source, data)
        except CheckpointError:
            if window == source.nbytes or window > MAX_STRUCTURE_NBYTES:
                raise
        window = min(16 * window, source.nbytes)


def _read_legacy(source: Source, data: memoryview) -> TorchFile:
    position = 0

    def next_pickle(**options: Any) -> Any:
        nonlocal position
        value, length = unpickle(data[position:], name=source.name, **options)
        position += length
        return value

    if _LEGACY_MAGIC.to_bytes(10, "little") not in bytes(data[:32]):
        raise CheckpointError(
            f"{source.name}: a plain pickle, not a file written by torch.save",
            hint="load it where it was made and save its state dict with torch.save or safetensors",
        )
    magic, protocol, _ = (next_pickle(max_nbytes=_MAX_SMALL_NBYTES) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise damaged(source.name, f"is of the unknown legacy version {brief(protocol)}")

    # Where the storages are is known only behind the object that refers to them.
    storages: dict[str, Storage] = {}
    places: dict[str, RangeSource] = {}
    positions: dict[str, int] = {}

    def start_of(key: str, numel: int) -> int:
        (count,) = struct.unpack("<q", read(source, positions[key], 8))
        if count != numel:
            raise damaged(source.name, f"has {count} elements in storage {key}, not {numel}")
        return positions[key] + 8

    def persistent(persistent_id: Any) -> Any:
        match persistent_id:
            case ("module", kind, *_):  # each class, with its file and the text of its source
                return kind
        key, dtype, numel, view = _storage_id(source.name, persistent_id)
        if key not in storages:
            nbytes = numel * dtype.itemsize
            check_range(source, 0, nbytes)
            places[key] = RangeSource(source, partial(start_of, key, numel), nbytes, source.name)
            storages[key] = Storage(source=places[key], nbytes=nbytes)
        storage, offset = storages[key], 0
        if view is not None:
            _, offset, numel = view
            if offset < 0 or numel < 0 or (offset + numel) * dtype.itemsize > storage.nbytes:
                raise damaged(source.name, "has a view outside of its storage")
        return StorageRef(storage=storage, dtype=dtype, offset=offset)

    root = next_pickle(persistent=persistent)
    keys = next_pickle(max_nbytes=structure_limit(len(data)) // 4)
    positions |= _positions(source, position, keys, places)
    if source.is_local():
        for place in places.values():
            place.locate()
    return TorchFile(container="legacy torch pickle", root=root, structure_nbytes=position)


def _positions(
    source: Source, position: int, keys: Any, places: Mapping[str, RangeSource]
) -> dict[str, int]:
    """Find the storages that follow the pickles: a count of 8 bytes each, then the elements.

    They are little-endian whatever the machine that wrote them says of itself.
    """
    if not isinstance(keys, list):
        raise damaged(source.name, "has no list of its storages")
    positions: dict[str, int] = {}
    for key in keys:
        if not isinstance(key, str) or key not in places or key in positions:
            raise damaged(
                source.name, f"lists a storage {brief(key)} that no tensor names, or twice"
            )
        positions[key] = position
        position += 8 + places[key].nbytes
    missing = next((key for key in places if key not in positions), None)
    if missing is not None:
        raise damaged(source.name, f"does not hold the storage {missing}")
    if position > source.nbytes:
        raise damaged(source.name, f"ends {position - source.nbytes} bytes inside its storages")
    if position < source.nbytes:
        raise damaged(source.name, f"has {source.nbytes - position} bytes after its storages")
    return positions


def _storage_id(
    name: str, persistent_id: Any
) -> tuple[str, DType, int, tuple[str, int, int] | None]:
    """Check ('storage', type, key, location, numel[, view]); returns key, dtype, numel, view."""
    match persistent_id:
        case ("storage", Global() as kind, str() as key, str(), int() as numel, *rest) if (
            numel >= 0 and kind.name in STORAGE_DTYPES and len(rest) <= 1
        ):
            pass
        case _:
            raise damaged(name, f"refers to a storage in an unknown way: {brief(persistent_id)}")
    match rest:
        case [] | [None] | [(str(), int(), int())]:
            return key, DTYPES[STORAGE_DTYPES[kind.name]], numel, rest[0] if rest else None
    raise damaged(name, f"has a storage view of an unknown form: {brief(rest[0])}")


# Possessive: to go back over a million lines would take a gigabyte.
_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:(?: {2}.*)?\n)*+)", re.MULTILINE)
_NAMES = r"^ {{2}}__{}__ = \[(.*)\]"
_QUOTED = re.compile(r'"([^"\\]*)"')
_MAX_CODE_NBYTES = 4 << 20


def _script_classes(
    name: str, code: Sequence[Entry], prefix: str
) -> dict[Global, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Read which attributes of each TorchScript class are parameters and buffers.

    The serialised code is Python-like text; only its `__parameters__` and `__buffers__` lines are
    looked at, none of it is run.
    """
    classes = {}
    code = [entry for entry in code if entry.name.endswith(".py")]
    if sum(entry.nbytes for entry in code) > _MAX_CODE_NBYTES:
        raise too_many(name, _MAX_CODE_NBYTES, "bytes of TorchScript code")
    for entry in code:
        module = entry.name.removeprefix(prefix).removesuffix(".py").replace("/", ".")
        text = read(entry.source, 0, entry.nbytes).decode("utf-8", "replace")
        for match in _CLASS.finditer(text):
            names = []
            for kind in ("parameters", "buffers"):
                found = re.search(_NAMES.format(kind), match[2], re.MULTILINE)
                names.append(tuple(_QUOTED.findall(found[1])) if found else ())
            classes[Global(module, match[1])] = (names[0], names[1])
    return classes


def is_module(value: Any) -> bool:
    """Whether a record is a pickled `torch.nn.Module`."""
    return (
        isinstance(value, Record)
        and isinstance(value.state, dict)
        and all(
            isinstance(value.state.get(n), dict) for n in ("_parameters", "_buffers", "_modules")
        )
    )
