"""The inert unpickler: the same structure as pickle's own, and nothing but data."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.unpickling.inert import Global, Record
from harness.checkpoint.unpickling.opcodes import unpickle
from harness.errors import CheckpointError
from tests.checkpoint.builders import (
    call,
    get,
    integer,
    listing,
    pickled,
    put,
    reference,
    sequence,
    string,
)


def load(data: bytes) -> Any:
    value, end = unpickle(memoryview(data), name="test")
    assert end == len(data)
    return value


KEYS = st.text(max_size=5) | st.integers(-(1 << 63), (1 << 64) - 1) | st.booleans() | st.none()
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 5))
def test_plain_data_reads_as_it_was_written(value: Any, protocol: int) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        assert load(pickle.dumps(value, protocol)) == value


def test_what_is_called_stays_a_record() -> None:
    record = load(pickled(call(reference("os", "system"), string("x"))))
    assert isinstance(record, Record)
    assert record.callee == Global("os", "system")
    assert record.args == ("x",)


def test_a_cycle_reads() -> None:
    value: list[Any] = [1]
    value.append(value)
    found = load(pickle.dumps(value))
    assert found[1] is found


@pytest.mark.parametrize(
    "body",
    [
        b"", b"0", b"1", b"t", b"a", b"s", b"u", b"R", b"b", b"Q", b"(.", b"\x81", b"\x92", b"2",
        get(0), get(0xFFFFFFFF), b"g-1\n", b"Np-1\n", b"N" + put(7), b"Ix\n", b"I", b"Sx\n",
        b"F\n", b"\x82\x01", b"\x97", b"\x98", b"\xff", b"\x80\x06", b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8, b"\x8b\xff\xff\xff\xff", b"X\x01\x00\x00\x00\xff", b"Na", b"NNs",
        b"}(Nu", b"N(NNu", b"NR", b"NNR", b"](" + b"R", b"N\x93", b"NN\x93", b"Vx\\u\n",
        call(reference("collections", "OrderedDict"), listing(integer(1))),
        call(reference("torch._utils", "_rebuild_tensor"), integer(1)),
        call(reference("torch._utils", "_rebuild_tensor_v2"), *[b"N"] * 6),
        call(reference("torch._utils", "_rebuild_qtensor"), *[b"N"] * 7),
        call(reference("torch._utils", "_rebuild_sparse_tensor"), b"N", b"N"),
        call(reference("torch._utils", "_rebuild_parameter"), integer(1)),
        call(reference("torch._utils", "_rebuild_meta_tensor_no_storage"), *[b"N"] * 4),
        call(reference("torch._tensor", "_rebuild_from_type_v2"), *[b"N"] * 4),
        call(reference("_codecs", "encode"), integer(1), string("latin1")),
        call(reference("builtins", "list"), sequence()),
    ],
)  # fmt: skip
def test_malformed_opcodes_are_refused_with_their_place(body: bytes) -> None:
    with pytest.raises(CheckpointError, match="at byte") as caught:
        load(pickled(body))
    assert caught.value.hint
