"""Arrays and scalars of numpy in a pickle, as tensors.

In: a `Record` of what numpy's own pickling would call. Out: a `Tensor` over the bytes that stand in
the pickle; None for what is no array of numbers (text, dates, objects, structures), which is a
value like any other. As numpy 1.x and 2.x write them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from harness.checkpoint.dtypes import DTYPES, DType
from harness.checkpoint.tensors import Storage, Tensor
from harness.checkpoint.unpickling.inert import Global, Record
from harness.checkpoint.unpickling.rebuild import literal

_CODES = {
    **{f"f{n}": f"float{8 * n}" for n in (2, 4, 8)},
    **{f"i{n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{f"u{n}": f"uint{8 * n}" for n in (1, 2, 4, 8)},
    "b1": "bool",
    "c8": "complex64",
    "c16": "complex128",
}
_MAX_DIMENSIONS = 64


class _Number(NamedTuple):
    dtype: DType
    big_endian: bool


def array_of(record: Record) -> Tensor | None:
    """Read an array or scalar of numbers; None for everything else."""
    callee = record.callee
    if not isinstance(callee, Global) or callee.module.partition(".")[0] != "numpy":
        return None
    fortran: Any = False
    match callee.name, record.args, record.state:
        case "_reconstruct", _, (int(), tuple() as shape, kind, fortran, data):
            pass
        case "scalar", (kind, data), _:
            shape = ()
        case "_frombuffer", (data, kind, tuple() as shape, order), _:
            fortran = order == "F"
        case _:
            return None
    number = _number(kind)
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin-1", "replace")
    if number is None or not isinstance(data, (bytes, memoryview)) or not _is_shape(shape):
        return None
    if math.prod(shape) * number.dtype.itemsize != len(data):
        return None
    storage = Storage(
        source=literal(data), offset=0, nbytes=len(data), big_endian=number.big_endian
    )
    strides = None
    if fortran is True:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return Tensor(key="", dtype=number.dtype, shape=shape, storage=storage, strides=strides)


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return len(shape) <= _MAX_DIMENSIONS and all(
        type(size) is int and 0 <= size < 1 << 62 for size in shape
    )


def _number(kind: Any) -> _Number | None:
    """What a pickled `numpy.dtype` is: one type of numbers, in which order of bytes."""
    if not isinstance(kind, Record) or not kind.args:
        return None
    code = kind.args[0]
    if isinstance(code, Global):  # a type of ml_dtypes
        dtype = DTYPES.get(code.name) if code.module.partition(".")[0] == "ml_dtypes" else None
    else:
        dtype = DTYPES.get(_CODES.get(code, "")) if isinstance(code, str) else None
    match kind.state:
        case (_, str() as order, None, None, None, *_):
            pass
        case None:
            order = "="
        case _:  # several in one
            return None
    return None if dtype is None else _Number(dtype, order == ">")
