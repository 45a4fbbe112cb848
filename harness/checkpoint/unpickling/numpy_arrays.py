"""Arrays and scalars of numpy in a pickle, as tensors.

In: a `Record` of what numpy's own pickling would call. Out: a `Tensor` over the bytes that stand in
the pickle; None for what is no array of numbers (text, dates, objects, structures), which is a
value like any other. As numpy 1.x and 2.x write them.
"""

from __future__ import annotations

import math
from typing import Any

from harness.checkpoint.dtypes import DTYPES, DType
from harness.checkpoint.tensors import Storage, Tensor
from harness.checkpoint.unpickling.inert import Global, Record
from harness.checkpoint.unpickling.rebuild import Literal

_CODES = {
    **{f"f{n}": f"float{8 * n}" for n in (2, 4, 8)},
    **{f"i{n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{f"u{n}": f"uint{8 * n}" for n in (1, 2, 4, 8)},
    "b1": "bool",
    "c8": "complex64",
    "c16": "complex128",
}
_MAX_DIMENSIONS = 64


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
    dtype, big_endian = _number(kind)
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin-1", "replace")
    if dtype is None or not isinstance(data, (bytes, memoryview)) or not _is_shape(shape):
        return None
    if math.prod(shape) * dtype.itemsize != len(data):
        return None
    storage = Storage(source=Literal(data), nbytes=len(data), big_endian=big_endian)
    strides = None
    if fortran is True:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return Tensor(key="", dtype=dtype, shape=shape, storage=storage, strides=strides)


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return len(shape) <= _MAX_DIMENSIONS and all(
        type(size) is int and 0 <= size < 1 << 62 for size in shape
    )


def _number(kind: Any) -> tuple[DType | None, bool]:
    """The type of numbers that a pickled `numpy.dtype` is, if it is one; whether big-endian."""
    dtype = None
    if isinstance(kind, Record) and kind.args:
        code = kind.args[0]
        if isinstance(code, Global) and code.module.partition(".")[0] == "ml_dtypes":
            dtype = DTYPES.get(code.name)
        elif isinstance(code, str):
            dtype = DTYPES.get(_CODES.get(code, ""))
    match kind:
        case Record(state=(_, str() as order, None, None, None, *_)):
            return dtype, order == ">"
        case Record(state=None):
            return dtype, False
    return None, False  # several in one
