"""The element types of tensors: names, sizes, and how numpy reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

Kind = Literal["float", "complex", "int", "bool", "packed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DType:
    """One element type under torch's name, and what it is called elsewhere.

    `raw` is the numpy type that holds an element's bits; `real` is the numpy type of its values
    (of each of the two components where `kind` is complex), or the name of an ml_dtypes type.
    `packed` elements are compared as bytes: several values in one, or bits without a meaning.
    """

    name: str
    itemsize: int
    kind: Kind
    raw: str
    real: str
    safetensors: str | None = None

    @property
    def is_floating(self) -> bool:
        """Whether values are compared within a tolerance (all others must be equal)."""
        return self.kind in ("float", "complex")

    @property
    def num_components(self) -> int:
        """Real numbers of one element: two of a complex one."""
        return 2 if self.kind == "complex" else 1

    @property
    def component_nbytes(self) -> int:
        """Bytes of a real number."""
        return self.itemsize // self.num_components

    @property
    def is_value(self) -> bool:
        """Whether the bytes are the text of a value, which is no tensor."""
        return self.name == "value"

    def __str__(self) -> str:
        return self.name


def _dtypes() -> Iterator[DType]:
    rows: list[tuple[str, int, Kind, str, str, str | None]] = [
        ("float64", 8, "float", "<u8", "<f8", "F64"),
        ("float32", 4, "float", "<u4", "<f4", "F32"),
        ("float16", 2, "float", "<u2", "<f2", "F16"),
        ("bfloat16", 2, "float", "<u2", "bfloat16", "BF16"),
        ("float8_e4m3fn", 1, "float", "|u1", "float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", 1, "float", "|u1", "float8_e5m2", "F8_E5M2"),
        ("float8_e4m3fnuz", 1, "float", "|u1", "float8_e4m3fnuz", "F8_E4M3FNUZ"),
        ("float8_e5m2fnuz", 1, "float", "|u1", "float8_e5m2fnuz", "F8_E5M2FNUZ"),
        ("float8_e8m0fnu", 1, "float", "|u1", "float8_e8m0fnu", "F8_E8M0"),
        ("complex32", 4, "complex", "<u4", "<f2", None),
        ("complex64", 8, "complex", "<u8", "<f4", "C64"),
        ("complex128", 16, "complex", "V16", "<f8", None),
        ("int64", 8, "int", "<u8", "<i8", "I64"),
        ("int32", 4, "int", "<u4", "<i4", "I32"),
        ("int16", 2, "int", "<u2", "<i2", "I16"),
        ("int8", 1, "int", "|u1", "|i1", "I8"),
        ("uint64", 8, "int", "<u8", "<u8", "U64"),
        ("uint32", 4, "int", "<u4", "<u4", "U32"),
        ("uint16", 2, "int", "<u2", "<u2", "U16"),
        ("uint8", 1, "int", "|u1", "|u1", "U8"),
        ("bool", 1, "bool", "|u1", "|u1", "BOOL"),
        ("qint8", 1, "int", "|u1", "|i1", None),
        ("quint8", 1, "int", "|u1", "|u1", None),
        ("qint32", 4, "int", "<u4", "<i4", None),
        ("float4_e2m1fn_x2", 1, "packed", "|u1", "|u1", "F4"),
        # The text of an entry that is no tensor: a number, a string, a list.
        ("value", 1, "packed", "|u1", "|u1", None),
        ("bits16", 2, "packed", "<u2", "<u2", None),
    ]
    one_byte = ["quint4x2", "quint2x4", "bits8", "bits1x8", "bits2x4", "bits4x2"]
    one_byte += [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)]
    rows += [(name, 1, "packed", "|u1", "|u1", None) for name in one_byte]
    for name, itemsize, kind, raw, real, safetensors in rows:
        yield DType(
            name=name, itemsize=itemsize, kind=kind, raw=raw, real=real, safetensors=safetensors
        )


DTYPES: Mapping[str, DType] = MappingProxyType({dtype.name: dtype for dtype in _dtypes()})


def decode(data: Array, dtype: DType) -> Array:
    """View logical bytes as values; complex32 and packed types, unknown to numpy, stay bits."""
    if dtype.kind == "complex":
        return data.view({"complex64": "<c8", "complex128": "<c16"}.get(dtype.name, dtype.raw))
    if dtype.kind == "bool":
        return data.view("?") if dtype.name == "bool" else data
    return data.view(numpy_dtype(dtype))


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy type of a dtype's values (of one component where it is complex)."""
    if dtype.kind == "float" and dtype.real[0] not in "<|":
        import ml_dtypes  # 30 ms that only bfloat16 and float8 should cost

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype.real))
        return found
    return np.dtype(dtype.real)
