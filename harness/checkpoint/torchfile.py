"""Files written by torch: zip archives, TorchScript archives, and the legacy pickle.

In: a source that holds one such file. Out: the object tree of its pickle, in which every tensor is
a `Tensor` (or a `Composite` of tensors) over the bytes where they are, and every other object is
inert. Refused: storages that are missing, short or long, and pickles that do not fit the closed
table of torch's rebuild functions below (torch/_utils.py, torch/_tensor.py, torch/serialization.py
of torch 0.4 to 2.13).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.pickles import Constructors, Global, Record, unpickle
from harness.checkpoint.sources import Source, read
from harness.checkpoint.tensors import DTYPES, DType, Storage, Tensor
from harness.checkpoint.zips import Entry, read_zip
from harness.errors import CheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# torch.storage._dtype_to_storage_type_map, turned around
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}
_DTYPE_ALIASES = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "chalf": "complex32",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Composite:
    """A tensor that torch keeps as several: sparse, nested, quantized, or a subclass."""

    parts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class StorageRef:
    """What a persistent id stands for: a storage, and the dtype under which it was saved."""

    storage: Storage
    dtype: DType


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchFile:
    """The object tree of a torch file; `script_classes` is filled for TorchScript archives.

    `script_classes` maps a class to the names of its parameters and of its buffers.
    """

    container: str
    root: Any
    checksums: tuple[tuple[Source, int, int, int], ...] = ()
    script_classes: Mapping[Global, tuple[tuple[str, ...], tuple[str, ...]]] = field(
        default_factory=dict
    )


def read_torch_zip(source: Source) -> TorchFile:
    """Read a zip archive written by `torch.save` (since 1.6) or `torch.jit.save`."""
    entries = read_zip(source)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        found = ", ".join(sorted(entries)[:3]) or "nothing"
        raise CheckpointError(
            f"{source.name}: a zip archive, but not one of torch's: it has no data.pkl "
            f"(it holds {found}, …)",
            hint="give a file that torch.save, torch.jit.save or NeMo wrote",
        )
    prefix = pickles[0].removesuffix("data.pkl")
    byteorder = entries.get(prefix + "byteorder")
    big_endian = byteorder is not None and _byteorder(byteorder) == b"big"
    storages: dict[str, Storage] = {}

    def persistent(persistent_id: Any) -> StorageRef:
        key, dtype, numel, _ = _storage_id(source.name, persistent_id)
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise _damaged(source.name, f"has no entry {prefix}data/{key}, which a tensor needs")
        if entry.nbytes != numel * dtype.itemsize:
            raise _damaged(
                source.name,
                f"has {entry.nbytes} bytes in {entry.name}, but its pickle says "
                f"{numel} x {dtype} ({numel * dtype.itemsize} bytes)",
            )
        storage = storages.get(key)
        if storage is None:
            storage = storages[key] = Storage(
                source=entry.source, offset=0, nbytes=entry.nbytes, big_endian=big_endian
            )
        return StorageRef(storage=storage, dtype=dtype)

    data = entries[pickles[0]]
    root, end = unpickle(
        data.source.view(0, data.nbytes),
        name=data.source.name,
        constructors=CONSTRUCTORS,
        persistent=persistent,
    )
    if end != data.nbytes:
        raise _damaged(data.source.name, f"has {data.nbytes - end} bytes after its pickle")
    script = f"{prefix}constants.pkl" in entries and any(
        name.startswith(f"{prefix}code/") for name in entries
    )
    return TorchFile(
        container="TorchScript" if script else "torch zip",
        root=root,
        checksums=tuple(
            (entry.source, 0, entry.nbytes, entry.crc32)
            for entry in entries.values()
            if entry.crc32 and entry.nbytes
        ),
        script_classes=_script_classes(entries, f"{prefix}code/") if script else {},
    )


def read_torch_legacy(source: Source) -> TorchFile:
    """Read what `torch.save` wrote before 1.6: four pickles, then the storages one by one."""
    data = source.view(0, source.nbytes)
    position = 0

    def next_pickle(persistent: Callable[[Any], Any] | None = None) -> Any:
        nonlocal position
        value, length = unpickle(
            data[position:], name=source.name, constructors=CONSTRUCTORS, persistent=persistent
        )
        position += length
        return value

    if next_pickle() != _LEGACY_MAGIC:
        raise CheckpointError(
            f"{source.name}: a plain pickle, not a file written by torch.save",
            hint="load it where it was made and save its state dict by torch.save or safetensors",
        )
    protocol, system = next_pickle(), next_pickle()
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise _damaged(source.name, f"is of the unknown legacy version {protocol!r}")
    big_endian = system.get("little_endian") is False

    # The storages' places are known only behind the object that refers to them: read it twice.
    start = position
    wanted: dict[str, tuple[DType, int]] = {}

    def collect(persistent_id: Any) -> StorageRef | None:
        if _is_module_source(persistent_id):
            return None
        key, dtype, numel, _ = _storage_id(source.name, persistent_id)
        wanted.setdefault(key, (dtype, numel))
        empty = Storage(source=None, offset=0, nbytes=0)
        return StorageRef(storage=empty, dtype=dtype)

    next_pickle(collect)
    keys = next_pickle()
    if not isinstance(keys, list):
        raise _damaged(source.name, "has no list of its storages")
    storages: dict[str, Storage] = {}
    for key in keys:
        if key not in wanted or key in storages:
            raise _damaged(source.name, f"lists a storage {key!r} that no tensor names, or twice")
        dtype, numel = wanted[key]
        (count,) = struct.unpack(">q" if big_endian else "<q", read(source, position, 8))
        if count != numel:
            raise _damaged(source.name, f"has {count} elements in storage {key}, not {numel}")
        nbytes = numel * dtype.itemsize
        if nbytes > source.nbytes - position - 8:
            raise _damaged(source.name, f"ends inside of storage {key} ({nbytes} bytes)")
        storages[key] = Storage(
            source=source, offset=position + 8, nbytes=nbytes, big_endian=big_endian
        )
        position += 8 + nbytes
    if position != source.nbytes:
        raise _damaged(source.name, f"has {source.nbytes - position} bytes after its storages")

    views: dict[tuple[str, str], Storage] = {}

    def persistent(persistent_id: Any) -> Any:
        if _is_module_source(persistent_id):
            return persistent_id[1]
        key, dtype, _, view = _storage_id(source.name, persistent_id)
        if key not in storages:
            raise _damaged(source.name, f"does not hold the storage {key}")
        storage = storages[key]
        if view is not None:
            view_key, offset, numel = view
            storage = views.setdefault(
                (key, view_key), _part(source.name, storage, dtype, offset, numel)
            )
        return StorageRef(storage=storage, dtype=dtype)

    root, _ = unpickle(
        data[start:], name=source.name, constructors=CONSTRUCTORS, persistent=persistent
    )
    return TorchFile(container="legacy torch pickle", root=root)


def _part(name: str, storage: Storage, dtype: DType, offset: int, numel: int) -> Storage:
    first, nbytes = offset * dtype.itemsize, numel * dtype.itemsize
    if first < 0 or nbytes < 0 or first + nbytes > storage.nbytes:
        raise _damaged(name, "has a view outside of its storage")
    return Storage(
        source=storage.source,
        offset=storage.offset + first,
        nbytes=nbytes,
        big_endian=storage.big_endian,
    )


def _is_module_source(persistent_id: Any) -> bool:
    """Legacy files wrap each module class as ('module', class, file, source text)."""
    return (
        isinstance(persistent_id, tuple)
        and len(persistent_id) > 1
        and (persistent_id[0] == "module")
    )


def _storage_id(
    name: str, persistent_id: Any
) -> tuple[str, DType, int, tuple[str, int, int] | None]:
    """Check ('storage', type, key, location, numel[, view]); returns key, dtype, numel, view."""
    match persistent_id:
        case ("storage", Global() as kind, str() as key, str(), int() as numel, *rest) if (
            numel >= 0 and kind.name in _STORAGE_DTYPES and len(rest) <= 1
        ):
            view = rest[0] if rest else None
        case _:
            raise _damaged(name, f"refers to a storage in an unknown way: {_brief(persistent_id)}")
    match view:
        case None:
            return key, DTYPES[_STORAGE_DTYPES[kind.name]], numel, None
        case (str() as view_key, int() as offset, int() as view_numel):
            return (
                key,
                DTYPES[_STORAGE_DTYPES[kind.name]],
                numel,
                (view_key, offset, view_numel),
            )
        case _:
            raise _damaged(name, f"has a storage view of an unknown form: {_brief(view)}")


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return (
            "(" + ", ".join(_brief(item) for item in value[:5] if not isinstance(item, tuple)) + ")"
        )
    if isinstance(value, (Global, str, int, float)):
        return str(value)[:80]
    return type(value).__name__


def _byteorder(entry: Entry) -> bytes:
    if entry.nbytes > 16:
        raise _damaged(entry.source.name, f"has {entry.nbytes} bytes instead of little or big")
    order = read(entry.source, 0, entry.nbytes)
    if order not in (b"little", b"big"):
        raise _damaged(entry.source.name, f"names an unknown byte order {order!r}")
    return order


def _damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name}: {why}", hint="the file is damaged: copy or download it again")


# The closed table: what torch's rebuild functions mean, as descriptions of views.


def _dtype(value: Any) -> DType:
    if isinstance(value, DType):
        return value
    if isinstance(value, Global) and value.module == "torch":
        dtype = DTYPES.get(_DTYPE_ALIASES.get(value.name, value.name))
        if dtype is not None:
            return dtype
    raise ValueError(f"unknown dtype {_brief(value)}")


def _size(value: Any) -> tuple[int, ...]:
    if isinstance(value, list):  # TorchScript
        value = tuple(value)
    if isinstance(value, tuple) and all(type(item) is int for item in value):
        return value
    raise ValueError(f"a size must be a tuple of integers, not {_brief(value)}")


def _view(
    ref: Any, offset: Any, size: Any, stride: Any, dtype: DType | None, metadata: Any
) -> Tensor:
    if not isinstance(ref, StorageRef) or type(offset) is not int:
        raise ValueError("a tensor needs a storage and an offset")
    flags = metadata if isinstance(metadata, dict) else {}
    return Tensor(
        key="",
        dtype=dtype or ref.dtype,
        shape=_size(size),
        storage=ref.storage,
        offset=offset,
        strides=_size(stride),
        conjugate=flags.get("conj") is True,
        negative=flags.get("neg") is True,
    )


def _rebuild_tensor(ref: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    return _view(ref, offset, size, stride, None, None)


def _rebuild_tensor_v2(
    ref: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = None,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    return _view(ref, offset, size, stride, None, metadata)


def _rebuild_tensor_v3(
    ref: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    return _view(ref, offset, size, stride, _dtype(dtype), metadata)


def _rebuild_qtensor(
    ref: Any, offset: Any, size: Any, stride: Any, quantizer: Any, *rest: Any
) -> Composite:
    parts: dict[str, Any] = {"int_repr": _view(ref, offset, size, stride, None, None)}
    match quantizer:
        case (Global(), float() as scale, int() as zero_point):
            parts["scale"] = _scalar(struct.pack("<d", scale), "float64")
            parts["zero_point"] = _scalar(struct.pack("<q", zero_point), "int64")
        case (Global(), Tensor() as scales, Tensor() as zero_points, int() as axis):
            parts["scales"], parts["zero_points"] = scales, zero_points
            parts["axis"] = _scalar(struct.pack("<q", axis), "int64")
        case _:
            raise ValueError(f"unknown quantizer {_brief(quantizer)}")
    return Composite(parts=parts)


class _Literal:
    """Bytes that stand in the pickle itself, as a source."""

    def __init__(self, data: bytes) -> None:
        self.name = "a number in the pickle"
        self.nbytes = len(data)
        self._data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._data)[offset : offset + nbytes]

    def close(self) -> None:
        pass


def _scalar(data: bytes, dtype: str) -> Tensor:
    storage = Storage(source=_Literal(data), offset=0, nbytes=len(data))
    return Tensor(key="", dtype=DTYPES[dtype], shape=(), storage=storage)


def _rebuild_sparse_tensor(layout: Any, data: Any) -> Composite:
    name = layout.name if isinstance(layout, Global) else str(layout)
    match data:
        case (indices, values, _) | (indices, values, _, bool()) if "coo" in name:
            parts = {"indices": indices, "values": values}
        case (compressed, plain, values, _):
            by_row = "csr" in name or "bsr" in name
            rows, columns = ("crow", "col") if by_row else ("ccol", "row")
            parts = {f"{rows}_indices": compressed, f"{columns}_indices": plain, "values": values}
        case _:
            raise ValueError(f"unknown sparse layout {name}")
    shape = _size(data[2] if "coo" in name else data[3])
    parts["size"] = _integers(shape)
    return Composite(parts=parts)


def _integers(values: tuple[int, ...]) -> Tensor:
    data = struct.pack(f"<{len(values)}q", *values)
    storage = Storage(source=_Literal(data), offset=0, nbytes=len(data))
    return Tensor(key="", dtype=DTYPES["int64"], shape=(len(values),), storage=storage)


def _rebuild_nested_tensor(buffer: Any, sizes: Any, strides: Any, offsets: Any) -> Composite:
    return Composite(
        parts={"values": buffer, "sizes": sizes, "strides": strides, "offsets": offsets}
    )


def _rebuild_njt(arguments: Any) -> Composite:
    if not isinstance(arguments, dict):
        raise ValueError("a jagged tensor needs its arguments by name")
    parts = {str(name): value for name, value in arguments.items() if isinstance(value, Tensor)}
    return Composite(parts=parts)


def _rebuild_meta(dtype: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    storage = Storage(source=None, offset=0, nbytes=0)
    return Tensor(
        key="", dtype=_dtype(dtype), shape=_size(size), storage=storage, strides=_size(stride)
    )


def _rebuild_wrapper(*args: Any) -> Composite:
    """A subclass without bytes of its own: its inner tensors follow in its state."""
    return Composite(parts={})


def _rebuild_subclass(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor subclass: made by `function(*args)`, then given `state` (attributes by name)."""
    constructor = (
        CONSTRUCTORS.get((function.module, function.name)) if isinstance(function, Global) else None
    )
    if constructor is None or not isinstance(args, tuple):
        raise ValueError(f"a tensor subclass made by an unknown {_brief(function)}")
    made = constructor(*args)
    attributes = state
    if isinstance(state, tuple) and state and isinstance(state[0], dict):
        attributes = state[0]  # (__dict__, __slots__)
    if not isinstance(made, Composite):
        return made  # as_subclass: the same bytes under another class
    inner = {}
    if isinstance(attributes, dict):
        inner = {
            name: value
            for name, value in attributes.items()
            if isinstance(name, str) and isinstance(value, (Tensor, Composite))
        }
    return Composite(parts={**made.parts, **inner})


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    if not isinstance(data, (Tensor, Composite)):
        raise ValueError(f"a parameter needs a tensor, not {_brief(data)}")
    return data


def _rebuild_from_cpu_tensor(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Any:
    return _rebuild_parameter(data)


def _from_bytes(*args: Any) -> bytes:
    text, encoding = args
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes of Python 2 are latin1 text")
    return text.encode("latin-1")


def _collection(*args: Any) -> list[Any]:
    (items,) = args or ([],)
    return list(items)


def _mapping(*args: Any) -> dict[Any, Any]:
    """OrderedDict and defaultdict: items follow, or come as a list of pairs (Python 2)."""
    pairs = args[-1] if args and isinstance(args[-1], list) else []
    return {key: value for key, value in pairs if isinstance(key, (str, int))}


def _passed_through(value: Any, *rest: Any) -> Any:
    return value


CONSTRUCTORS: Constructors = {
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): _mapping,
    ("collections", "Counter"): _mapping,
    **{
        (module, name): constructor
        for module in ("builtins", "__builtin__")
        for name, constructor in [
            ("dict", _mapping),
            ("set", _collection),
            ("frozenset", _collection),
            ("list", _collection),
        ]
    },
    ("_codecs", "encode"): _from_bytes,
    ("torch", "Size"): lambda *args: _size(args[0]) if args else (),
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_nested_tensor"): _rebuild_nested_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta,
    ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_from_cpu_tensor,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_subclass,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _rebuild_njt,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Buffer"): _rebuild_parameter,
    ("torch.serialization", "_get_layout"): _passed_through,
    ("torch.jit._pickle", "build_intlist"): _collection,
    ("torch.jit._pickle", "build_doublelist"): _collection,
    ("torch.jit._pickle", "build_boollist"): _collection,
    ("torch.jit._pickle", "build_tensorlist"): _collection,
    ("torch.jit._pickle", "restore_type_tag"): _passed_through,
}


_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:(?: {2}.*)?\n)*)", re.MULTILINE)
_NAMES = r"^ {{2}}__{}__ = \[(.*)\]"
_QUOTED = re.compile(r'"([^"\\]*)"')
_MAX_CODE_NBYTES = 32 << 20


def _script_classes(
    entries: Mapping[str, Entry], prefix: str
) -> dict[Global, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Read which attributes of each TorchScript class are parameters and buffers.

    The serialised code is Python-like text; only its `__parameters__` and `__buffers__` lines are
    looked at, none of it is run.
    """
    classes = {}
    code = [e for e in entries.values() if e.name.startswith(prefix) and e.name.endswith(".py")]
    if sum(entry.nbytes for entry in code) > _MAX_CODE_NBYTES:
        raise _damaged(code[0].archive.name, f"has more than {_MAX_CODE_NBYTES} bytes of code")
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
