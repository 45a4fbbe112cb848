"""The closed table of what torch's rebuild functions mean, as descriptions of views.

In: the arguments that a pickle gives to a function of torch (`torch._utils._rebuild_tensor_v2`,
...), checked. Out: `Tensor`s, `Composite`s of tensors, and plain containers. Refused (ValueError,
which the unpickler turns into a CheckpointError): arguments that do not fit. As in torch/_utils.py
and torch/_tensor.py of torch 0.4 to 2.13.
"""

from __future__ import annotations

import struct
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeGuard

from harness.checkpoint.dtypes import DTYPES, DType
from harness.checkpoint.sources.source import Source
from harness.checkpoint.tensors import Storage, Tensor
from harness.checkpoint.unpickling.inert import Global, Items, Record, Table, plain_key

# torch.storage._dtype_to_storage_type_map, turned around
STORAGE_DTYPES = {
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
_PER_BYTE = {"quint4x2": 2, "quint2x4": 4}
_MAX_DIMENSIONS = 64
_INT64 = 1 << 63
_MAX_CLASSES = 8
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
    """A tensor that torch keeps as several: sparse, nested, quantized, or a subclass.

    `parts` are tensors and what else the object is made of, by name; `base` is the tensor that is
    one by itself, and only has others as attributes. `kind` is the class, `shape` what it says of
    itself, where the file has them.
    """

    parts: MutableMapping[Any, Any]
    base: Tensor | None = None
    kind: Global | None = None
    shape: tuple[int, ...] | None = None
    structure_nbytes: ClassVar[int] = 2048  # what it costs in memory, for the unpickler


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StorageRef:
    """What a persistent id stands for: a storage from an element on, and the dtype it has."""

    storage: Storage
    dtype: DType
    offset: int = 0

    def tensor(self) -> Tensor:
        """All of it as one row, for what was saved as a storage itself."""
        dtype = DTYPES["uint8"] if self.dtype.name in _PER_BYTE else self.dtype
        numel = max(0, self.storage.nbytes // dtype.itemsize - self.offset)
        return Tensor(key="", dtype=dtype, shape=(numel,), storage=self.storage, offset=self.offset)


def brief(value: Any) -> str:
    """A pickled value in a few words, for an error message."""
    if isinstance(value, tuple):
        return f"({', '.join(brief(item) for item in value[:5] if not isinstance(item, tuple))})"
    if isinstance(value, (Global, str, int, float)):
        return str(value)[:80]
    return type(value).__name__


def torch_dtype(value: Any) -> DType:
    """The dtype that a pickle names, such as `torch.float32`; raises ValueError."""
    if isinstance(value, DType):
        return value
    if isinstance(value, Global) and value.module == "torch":
        dtype = DTYPES.get(_DTYPE_ALIASES.get(value.name, value.name))
        if dtype is not None and not dtype.is_value:
            return dtype
    raise ValueError(f"unknown dtype {brief(value)}")


def _size(value: Any) -> tuple[int, ...]:
    if isinstance(value, list):  # TorchScript
        value = tuple(value[: _MAX_DIMENSIONS + 1])
    if not isinstance(value, tuple) or not {int}.issuperset(map(type, value)):
        raise ValueError(f"a size must be a tuple of integers, not {brief(value)}")
    if len(value) > _MAX_DIMENSIONS:
        raise ValueError(f"a size of {len(value)} dimensions")
    if value and not (min(value) >= -_INT64 and max(value) < _INT64):
        raise ValueError("a size beyond 64 bits")
    return value


def _view(
    ref: Any, offset: Any, size: Any, stride: Any, dtype: DType | None, metadata: Any
) -> Tensor:
    if not isinstance(ref, StorageRef) or type(offset) is not int:
        raise ValueError("a tensor needs a storage and an offset")
    if abs(offset) >= _INT64:  # beyond torch's integers, and what Python prints
        raise ValueError("an offset beyond 64 bits")
    flags = metadata if isinstance(metadata, dict) else {}
    return Tensor(
        key="",
        dtype=dtype or ref.dtype,
        shape=_size(size),
        storage=ref.storage,
        offset=ref.offset + offset,
        strides=_size(stride),
        conjugate=flags.get("conj") is True,
        negative=flags.get("neg") is True,
    )


def _rebuild_tensor(
    ref: Any, offset: Any, size: Any, stride: Any, grad: Any = None, *rest: Any
) -> Tensor:
    _, metadata = (*rest, None, None)[:2]
    return _view(ref, offset, size, stride, None, metadata)


def _rebuild_tensor_v3(
    ref: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    return _view(ref, offset, size, stride, torch_dtype(dtype), *(rest or (None,)))


def _rebuild_qtensor(
    ref: Any, offset: Any, size: Any, stride: Any, quantizer: Any, *rest: Any
) -> Composite:
    values = _view(ref, offset, size, stride, None, None)
    parts: dict[str, Any] = {"int_repr": values}
    per_byte = _PER_BYTE.get(values.dtype.name)
    if per_byte:
        if not values.is_contiguous or offset:
            raise ValueError(f"a view of {values.dtype}, whose elements share bytes")
        rows = values.shape[:-1]  # each of which starts a byte
        parts["int_repr"] = replace(
            values,
            shape=(*rows, *(-(-n // per_byte) for n in values.shape[len(rows) :])),
            strides=None,
        )
        parts["size"] = _integers(values.shape)
    match quantizer:
        case (Global(), float() as scale, int() as zero_point):
            parts["scale"] = literal_tensor(struct.pack("<d", scale), "float64")
            parts["zero_point"] = literal_tensor(struct.pack("<q", zero_point), "int64")
        case (Global(), Tensor() as scales, Tensor() as zero_points, int() as axis):
            parts["scales"], parts["zero_points"] = scales, zero_points
            parts["axis"] = literal_tensor(struct.pack("<q", axis), "int64")
        case _:
            raise ValueError(f"unknown quantizer {brief(quantizer)}")
    return Composite(parts=parts)


class Literal(Source):
    """Bytes that stand in the pickle itself, as a source."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.name = "data in the pickle"
        self.nbytes = len(data)
        self._data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Literal, (bytes(self._data),)


def literal_tensor(
    data: bytes | memoryview, dtype: str, shape: tuple[int, ...] = (), *, key: str = ""
) -> Tensor:
    """A tensor whose bytes stand in the pickle itself."""
    storage = Storage(source=Literal(data), nbytes=len(data))
    return Tensor(key=key, dtype=DTYPES[dtype], shape=shape, storage=storage)


def value_tensor(key: str, text: str) -> Tensor:
    """An entry that is no tensor: the bytes of its text, of the dtype `value`."""
    data = text.encode()
    return literal_tensor(data, "value", (len(data),), key=key)


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
    return literal_tensor(struct.pack(f"<{len(values)}q", *values), "int64", (len(values),))


def _rebuild_nested_tensor(buffer: Any, sizes: Any, strides: Any, offsets: Any) -> Composite:
    return Composite(
        parts={"values": buffer, "sizes": sizes, "strides": strides, "offsets": offsets}
    )


def _rebuild_njt(arguments: Any) -> Composite:
    if not isinstance(arguments, dict):
        raise ValueError("a jagged tensor needs its arguments by name")
    return Composite(parts=arguments)


def _rebuild_meta(dtype: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    storage = Storage(source=None, nbytes=0)
    return Tensor(
        key="", dtype=torch_dtype(dtype), shape=_size(size), storage=storage, strides=_size(stride)
    )


def _rebuild_wrapper(*args: Any) -> Composite:
    """A subclass without bytes of its own: its inner tensors follow in its state."""
    kind, _, size, *_ = (*args, None, None, None)
    return Composite(
        parts={},
        kind=kind if isinstance(kind, Global) else None,
        shape=_size(size) if isinstance(size, (tuple, list)) else None,
    )


def _rebuild_subclass(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor subclass: made by `function(*args)`, then given `state` (attributes by name)."""
    known = isinstance(function, Global)
    constructor = CONSTRUCTORS.get((function.module, function.name)) if known else None
    if constructor in (None, _rebuild_subclass) or not isinstance(args, tuple):
        raise ValueError(f"a tensor subclass made by an unknown {brief(function)}")
    made = constructor(*args)
    attributes = _attributes(state)
    if isinstance(made, Tensor):  # as_subclass: the same bytes under another class
        return _with_attributes(made, attributes)
    if not isinstance(made, Composite):
        return made
    below = made.parts.maps if isinstance(made.parts, ChainMap) else [made.parts]
    if len(below) > _MAX_CLASSES:
        raise ValueError("a tensor subclass of a subclass without end")
    return replace(
        made,
        parts=ChainMap(*attributes, *below),
        kind=kind if isinstance(kind, Global) else made.kind,
    )


def _attributes(state: Any) -> list[dict[Any, Any]]:
    """An object's attributes as `copyreg` keeps them: `__dict__`, or (`__dict__`, `__slots__`)."""
    if not isinstance(state, tuple) or len(state) != 2:
        state = (state,)
    return [part for part in state if isinstance(part, dict)]


def _with_attributes(tensor: Tensor, attributes: list[dict[Any, Any]]) -> Tensor | Composite:
    """A tensor to which others were attached."""
    attached = {
        name: value
        for part in attributes
        for name, value in part.items()
        if isinstance(value, (Tensor, Composite))
    }
    return Composite(parts=attached, base=tensor) if attached else tensor


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    if not isinstance(data, (Tensor, Composite)):
        raise ValueError(f"a parameter needs a tensor, not {brief(data)}")
    return data


def _rebuild_parameter_with_state(data: Any, *rest: Any) -> Any:
    made = _rebuild_parameter(data)
    *_, state = (None, *rest)
    return _with_attributes(made, _attributes(state)) if isinstance(made, Tensor) else made


def _from_bytes(*args: Any) -> bytes:
    text, encoding = args
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes of Python 2 are latin1 text")
    return text.encode("latin-1")


def _collection(*args: Any) -> list[Any]:
    (items,) = args or ([],)
    if not isinstance(items, list):
        raise ValueError(f"a collection of {brief(items)}")
    return list(items)


def _byte_array(*args: Any) -> bytes | memoryview:
    match args:
        case () | (0,):
            return b""
        case (bytes() | memoryview() as data,):
            return data
    return _from_bytes(args[0], "latin1" if args[1:] == ("latin-1",) else "")


def _mapping(*args: Any) -> dict[Any, Any]:
    """OrderedDict, defaultdict, Counter: items follow, or come as pairs (Python 2) or a dict."""
    items = args[-1] if args else []
    if isinstance(items, dict):
        return Table(items)
    pairs = items if isinstance(items, list) else []
    return Table((plain_key(key), value) for key, value in pairs)


def is_unknown_tensor(callee: Any) -> TypeGuard[Global]:
    """Whether a record would be a tensor that no constructor here knows (of XLA, of a new torch).

    It must not be taken for an object that holds no weights.
    """
    return (
        isinstance(callee, Global)
        and callee.module in ("torch._utils", "torch._tensor")
        and callee.name.startswith("_rebuild")
    )


_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "dict": _mapping,
    "set": lambda *args: Items(_collection(*args)),
    "frozenset": lambda *args: Items(_collection(*args)),
    "list": _collection,
    "bytes": lambda: b"",
    "bytearray": _byte_array,
}

# They take the pickled arguments, which they check, and may raise TypeError or ValueError.
CONSTRUCTORS: Mapping[tuple[str, str], Callable[..., Any]] = {
    **dict.fromkeys(
        (("collections", n) for n in ("OrderedDict", "defaultdict", "Counter")), _mapping
    ),
    **{("builtins", name): constructor for name, constructor in _BUILTINS.items()},
    **{("__builtin__", name): constructor for name, constructor in _BUILTINS.items()},
    ("_codecs", "encode"): _from_bytes,
    ("torch", "Size"): lambda *args: _size(args[0]) if args else (),
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_nested_tensor"): _rebuild_nested_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta,
    ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_subclass,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _rebuild_njt,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Buffer"): _rebuild_parameter,
    # A module of torch.fx: its attributes, and code that is made again from text.
    ("torch.fx.graph_module", "reduce_graph_module"): lambda body, *rest: Record(
        Global("torch.fx.graph_module", "GraphModule"), state=body
    ),
    ("torch.serialization", "_get_layout"): lambda layout, *rest: layout,
    **{
        ("torch.jit._pickle", f"build_{kind}list"): _collection
        for kind in ("int", "double", "bool", "tensor")
    },
    ("torch.jit._pickle", "restore_type_tag"): lambda value, *rest: value,
}
