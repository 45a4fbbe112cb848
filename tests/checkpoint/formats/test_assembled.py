"""Pieces that tile a tensor are read as one; pieces that do not are told apart, to the element."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.formats import assembled
from harness.checkpoint.formats.assembled import Assembled, Piece, assemble
from harness.checkpoint.sources.source import read
from harness.checkpoint.tensors import Storage, Tensor
from harness.checkpoint.unpickling.rebuild import _integers
from harness.errors import CheckpointError

INT64 = DTYPES["int64"]
Array = np.ndarray[Any, np.dtype[np.int64]]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], ...]]]:
    """A shape, and boxes that tile it: cut in two again and again, by no grid."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    boxes: list[tuple[tuple[int, ...], ...]] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        start, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dims = [dim for dim, size in enumerate(extent) if size > 1]
        if not dims:
            boxes.append((start, extent))
            continue
        dim = draw(st.sampled_from(dims))
        cut = draw(st.integers(1, extent[dim] - 1))
        first, second, after = list(extent), list(extent), list(start)
        first[dim], second[dim], after[dim] = cut, extent[dim] - cut, start[dim] + cut
        boxes += [(start, tuple(first)), (tuple(after), tuple(second))]
    return shape, draw(st.permutations(boxes))


def box(start: tuple[int, ...], extent: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, extent, strict=True))


def piece(
    values: Array, start: tuple[int, ...], extent: tuple[int, ...], where: str = "f"
) -> Piece:
    storage = _integers(tuple(values[box(start, extent)].flatten().tolist())).storage
    tensor = Tensor(key="", dtype=INT64, shape=extent, storage=storage)
    return Piece(start=start, tensor=tensor, where=where)


def whole(shape: tuple[int, ...], pieces: list[Piece]) -> Tensor:
    return assemble("name", "key", INT64, shape, pieces, hint="a hint")


@settings(max_examples=150)
@given(tiling=tilings(), data=st.data(), block=st.sampled_from([8, 24, 64, 1 << 20]))
def test_any_range_of_any_tiling_has_the_bytes_of_the_whole(
    tiling: tuple[tuple[int, ...], Any], data: st.DataObject, block: int
) -> None:
    shape, boxes = tiling
    values = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    tensor = whole(shape, [piece(values, *box) for box in boxes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembled, "_BLOCK_NBYTES", block)
        first = data.draw(st.integers(0, values.size))
        last = data.draw(st.integers(first, values.size))
        buffer = bytearray((last - first) * 8)
        tensor.read_into(first * 8, memoryview(buffer))
        assert bytes(buffer) == values.tobytes()[first * 8 : last * 8]
        part = tensor.part(first * 8, len(buffer))
        again = bytearray(len(buffer))
        part.read_into(first * 8, memoryview(again))
        assert again == buffer
        assert tensor.array().tobytes() == values.tobytes()
    source = tensor.storage.source
    if isinstance(source, Assembled):
        assert isinstance(part.storage.source, Assembled)
        held = [set(values[box(*at)].flatten().tolist()) for at in boxes]
        needed = sum(1 for elements in held if elements & set(range(first, last)))
        assert len(part.storage.source.boxes) == needed
    assert source is not None
    assert read(source, 0, source.nbytes) == values.tobytes()


@settings(max_examples=100)
@given(tiling=tilings(), data=st.data())
def test_a_piece_too_few_or_too_many_is_told_with_its_first_element(
    tiling: tuple[tuple[int, ...], Any], data: st.DataObject
) -> None:
    shape, boxes = tiling
    values = np.zeros(shape, np.int64)
    pieces = [piece(values, *box) for box in boxes]
    chosen = data.draw(st.sampled_from(pieces))
    start = chosen.start
    with pytest.raises(CheckpointError) as caught:
        whole(shape, [one for one in pieces if one is not chosen])
    assert f"lacks its element {list(start)}: no chunk holds it" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        whole(shape, [*pieces, chosen])
    assert f"has its element {list(start)} twice: in {chosen}, and in {chosen}" in str(caught.value)
    assert caught.value.hint == "a hint"


@pytest.mark.parametrize(
    ("boxes", "match"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 2))], r"lacks its element \[2, 2\]"),
        ([((0, 0), (2, 3)), ((1, 0), (3, 3))], r"its element \[1, 0\] twice: .* at \[0, 0\]"),
        # The volumes add up, but one element is held twice and another not at all.
        ([((0, 0), (4, 2)), ((0, 1), (4, 1))], r"its element \[0, 1\] twice"),
        ([((0, 0), (4, 3)), ((3, 2), (1, 1))], r"its element \[3, 2\] twice"),
        ([((0, 0), (4, 4))], r"does not hold the chunk at \[0, 0\] of shape \[4, 4\] in f"),
        ([((4, 0), (1, 3)), ((0, 0), (4, 3))], "does not hold the chunk at"),
        ([], r"lacks its element \[0, 0\]"),
    ],
)
def test_pieces_that_do_not_tile_are_refused(boxes: list[Any], match: str) -> None:
    values = np.zeros((9, 9), np.int64)
    with pytest.raises(CheckpointError, match=match):
        whole((4, 3), [piece(values, *box) for box in boxes])


def test_empty_pieces_and_empty_tensors_are_whole() -> None:
    values = np.arange(4)
    one = [piece(values, (0,), (4,)), piece(values, (4,), (0,)), piece(values, (2,), (0,))]
    assert whole((4,), one).array().tolist() == [0, 1, 2, 3]
    assert whole((0,), []).array().size == 0
    assert whole((0,), [piece(values, (0,), (0,))] * 2).array().shape == (0,)


def test_a_cut_along_too_many_dimensions_is_refused_before_it_is_checked() -> None:
    shape = (2,) * 40
    storage = Storage(source=_integers((0,)).storage.source, offset=0, nbytes=8)
    one = Tensor(key="", dtype=INT64, shape=(1,) * 40, storage=storage)
    with pytest.raises(CheckpointError, match="cut into 2 chunks along 40 dimensions"):
        whole(shape, [Piece(start=(at,) * 40, tensor=one, where="f") for at in (0, 1)])


def test_runs_are_read_without_a_byte_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of the pieces is what is asked for, whatever the cut."""
    values = np.arange(60).reshape(4, 5, 3)
    boxes = [((0, 0, 0), (4, 2, 3)), ((0, 2, 0), (4, 3, 2)), ((0, 2, 2), (4, 3, 1))]
    asked = 0

    def counted(self: Tensor, start: int, buffer: memoryview) -> None:
        nonlocal asked
        asked += len(buffer)
        original(self, start, buffer)

    tensor = whole((4, 5, 3), [piece(values, *box) for box in boxes])
    original = Tensor.read_into
    monkeypatch.setattr(Tensor, "read_into", counted)
    source = tensor.storage.source
    assert source is not None
    buffer = bytearray(37 * 8)
    source.read_into(11 * 8, memoryview(buffer))
    assert struct.unpack("<37q", buffer) == tuple(range(11, 48))
    assert asked == len(buffer)
    with pytest.raises(CheckpointError, match="outside of its 480 bytes"):
        source.read_into(30 * 8, memoryview(bytearray(31 * 8)))
