"""What the objects of a pickle are counted to cost is never less than what they take."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.tensors import Storage
from harness.checkpoint.unpickling.opcodes import unpickle
from harness.checkpoint.unpickling.rebuild import StorageRef
from harness.errors import CheckpointError
from tests.checkpoint.builders import get, integer, integers, put, reference, sequence, string

LIMIT = 1 << 17
STORAGE = Storage(source=None, offset=0, nbytes=16)
_kept: list[bytes] = []


def kept(body: bytes) -> bytes:
    """Push what stands once at the start of the pickle."""
    _kept.append(body + put(len(_kept)))
    return get(len(_kept) - 1)


def rebuilt(name: str, *args: bytes) -> bytes:
    return kept(reference("torch._utils", name)) + kept(sequence(*args)) + b"R"


def placed(dtype: str) -> tuple[bytes, ...]:
    return string(dtype) + b"Q", integer(0), integers((2, 2)), integers((2, 1))


RECORD = kept(reference("os", "getpid")) + b")R"
# What is repeated; each leaves the stack below it as it was.
UNITS = {
    "empty dicts": b"}",
    "empty lists": b"]",
    "tuples of one": b"N\x85",
    "integers": b"J\x00\x00\x00\x70",
    "short integers": b"M\x00\x70",
    "text integers": b"I7777\n",
    "floats": b"G\x3f\xf0\x00\x00\x00\x00\x00\x01",
    "longs": b"\x8a\x10" + b"\x77" * 16,
    "long longs": b"\x8a\xff" + b"\x77" * 255,
    "strings": b"X\x02\x00\x00\x00ab",
    "wide strings": b"X\x05\x00\x00\x00\xf0\x9f\x98\x80a",
    "strings of Python 2": b"U\xff" + b"\xf0\x9f\x98\x80" + b"a" * 251,
    "byte strings": b"C\x02ab",
    "long byte strings": b"B\x00\x10\x00\x00" + b"a" * 4096,
    "marks": b"(",
    "frames": b"\x80\x02",
    "dicts of one": b"}K\x01K\x01s",
    "dicts of one text": b"}\x8c\x01a}s",
    "lists of one": b"]Na",
    "records": RECORD,
    "records with state": RECORD + b"}b",
    "records with items": RECORD + b"Na",
    "records with pairs": RECORD + b"NNs",
    "ordered dicts": kept(reference("collections", "OrderedDict")) + b")R",
    "opaque keys": b"}]Ns",
    "tuple keys": b"}N\x85Ns",
    "pops": b"]0",
    "memoized": b"N\x94",
    "globals": b"c%07d\nb\n",
    "storages": kept(string("float32")) + b"Q",
    "tensors": rebuilt("_rebuild_tensor", *placed("float32")),
    "meta tensors": rebuilt(
        "_rebuild_meta_tensor_no_storage",
        *(reference("torch", "float32"), integers((1 << 40,)), integers((1,)), b"\x89"),
    ),
    "quantized tensors": rebuilt(
        "_rebuild_qtensor",
        *placed("qint8"),
        sequence(reference("torch", "per_tensor_affine"), b"G" + struct.pack(">d", 1), integer(0)),
    ),
}


def repeated(names: Sequence[str]) -> bytes:
    """A pickle of more than may be read of these."""
    numbers = itertools.count()
    nbytes = sum(len(UNITS[name]) for name in names)
    units = (
        UNITS[name].replace(b"%07d", b"%07d" % next(numbers))
        for _ in range(min(20_000, 8 * LIMIT // nbytes))
        for name in names
    )
    return b"".join([*_kept, b"(", *units])


def peak_nbytes(data: bytes) -> int:
    """The memory that is taken until it is refused for what it costs."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="describes a structure of more than") as caught:
            unpickle(
                memoryview(data),
                name="test",
                persistent=lambda dtype: StorageRef(storage=STORAGE, dtype=DTYPES[dtype]),
                max_nbytes=LIMIT,
            )
        assert caught.value.hint
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", UNITS)
def test_what_is_repeated_takes_no_more_than_it_is_counted_for(name: str) -> None:
    assert peak_nbytes(repeated([name])) < LIMIT * 9 // 8


@settings(max_examples=20)
@given(st.lists(st.sampled_from([*UNITS]), min_size=2, max_size=6))
def test_nor_does_a_mixture(names: list[str]) -> None:
    assert peak_nbytes(repeated(names)) < LIMIT * 9 // 8
