"""Views of any strides hold the same elements as numpy's, read in few and small reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import strided
from harness.checkpoint.sources.source import Source
from harness.checkpoint.strided import StridedView


class Counted(Source):
    """Bytes that count how they are read."""

    def __init__(self, data: bytes) -> None:
        self.name, self.nbytes, self.data = "counted", len(data), memoryview(data)
        self.num_reads = self.num_bytes = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= self.nbytes
        self.num_reads += 1
        self.num_bytes += len(buffer)
        buffer[:] = self.data[offset : offset + len(buffer)]


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    strides = draw(st.lists(st.integers(0, 60), min_size=len(shape), max_size=len(shape)))
    numel = math.prod(shape)
    start = draw(st.integers(0, numel - 1))
    return shape, strides, start, draw(st.integers(1, numel - start))


@pytest.mark.parametrize("raw", ["<u2", "V16"])
@given(view=views(), free=st.sampled_from([0, 64, 1 << 14]), most=st.sampled_from([64, 1 << 12]))
def test_any_range_of_any_view_is_what_numpy_has(
    raw: str, view: tuple[list[int], list[int], int, int], free: int, most: int
) -> None:
    shape, strides, start, count = view
    itemsize = np.dtype(raw).itemsize
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    data = np.random.default_rng(span).bytes((span + 3) * itemsize)
    expected = np.ndarray(
        shape, raw, data, 3 * itemsize, [itemsize * stride for stride in strides]
    ).reshape(-1)[start : start + count]
    out = np.empty(count, raw)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strided, "_FREE_NBYTES", free)
        patched.setattr(strided, "_MAX_NBYTES", most)
        source = Counted(data)
        StridedView(
            source=source,
            place=3 * itemsize,
            raw=np.dtype(raw),
            shape=tuple(shape),
            strides=tuple(strides),
        ).read_into(start, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("shape", "strides", "reads", "nbytes"),
    [
        ((1000, 1000), (1, 1000), 1, 4_000_000),  # transposed, small: at once
        ((2048, 4096), (1, 2048), 16, 34_000_000),  # transposed: in dense slabs
        ((64, 100, 3, 3), (900, 1, 300, 100), 1, 230_400),  # channels last
        ((512, 1 << 20), (1, 0), 1, 2048),  # expanded
    ],
)
def test_reads_are_few_and_bring_little_beside(
    shape: tuple[int, ...], strides: tuple[int, ...], reads: int, nbytes: int
) -> None:
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    source = Counted(bytes(4 * span))
    view: Any = StridedView(
        source=source, place=0, raw=np.dtype("<u4"), shape=shape, strides=strides
    )
    count = min(math.prod(shape), 1 << 22)
    view.read_into(0, np.empty(count, "<u4"))
    assert source.num_reads <= reads
    assert source.num_bytes <= nbytes
