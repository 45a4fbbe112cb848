"""Values are torch's, bit for bit: every dtype, every layout; and keys that never collide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.keys import Component, format_key
from harness.checkpoint.unpickling.inert import TupleKey
from harness.errors import CheckpointError
from tests.checkpoint.builders import FOUR_FLOATS, named, storage, tensor, write_torch_zip
from tests.checkpoint.conftest import Assert

QUANTIZED = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}
# torch.save has no storage type for these: it raises, so no file can hold them.
UNSTORABLE = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
STORABLE = [
    name
    for name in DTYPES
    if isinstance(getattr(torch, name, None), torch.dtype) and name not in QUANTIZED | UNSTORABLE
]

Save = Callable[[Any, Path], None]
SAVES: dict[str, Save] = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
}


def every_bit(dtype: torch.dtype) -> torch.Tensor:
    """24 elements of random bits: NaN payloads, infinities, subnormals and all."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (24 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(4, 6)


def saved(value: Any, path: Path, how: str) -> Path:
    SAVES[how](value, path)
    return path


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("name", STORABLE)
def test_every_dtype_reads_as_torch_wrote_it(
    tmp_path: Path, assert_reads: Assert, name: str, how: str
) -> None:
    value = {"w": every_bit(getattr(torch, name)), "empty": torch.empty(0, 3)}
    assert_reads(saved(value, tmp_path / "w.pt", how), value)


@pytest.mark.parametrize("name", sorted(UNSTORABLE))
def test_what_is_left_out_is_out_of_reach_of_torch_save(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyError, match="is not recognized"):
        torch.save(every_bit(getattr(torch, name)), tmp_path / "w.pt")


def layouts() -> dict[str, torch.Tensor]:
    big = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    pair = torch.view_as_complex(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    return {
        "contiguous": big,
        "transposed": big.transpose(1, 3),
        "sliced": big[1:, ::2, 1:3, 4:],
        "stepped": big.flatten()[7:100:3],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "scalar_of_big": big[1, 2, 3, 4],
        "empty": torch.empty(0),
        "empty_dimension": torch.empty(3, 0, 2),
        "channels_last": big.contiguous(memory_format=torch.channels_last),
        "one_wide": big[:, :1, :, :1],
        "overlapping": torch.arange(6.0).as_strided((3, 3), (1, 1)),
        "conjugate": pair.conj(),
        "negative": pair.conj().imag,
        "real": pair.real,
        "conjugate_slice": pair.conj()[1::2],
        "many_dimensions": torch.arange(4.0).reshape([1] * 60 + [2, 2]).transpose(60, 61),
    }


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("layout", layouts())
def test_every_layout_reads_in_logical_order(
    tmp_path: Path, assert_reads: Assert, layout: str, how: str
) -> None:
    # A file of empty tensors alone is refused.
    value = {"w": layouts()[layout], "full": torch.ones(1)}
    path = saved(value, tmp_path / "w.pt", how)
    assert_reads(path, torch.load(path, weights_only=False))


@pytest.mark.parametrize("name", ["float16", "complex64", "int16", "bfloat16", "complex128"])
def test_a_strided_view_of_a_large_storage_reads_from_any_element(
    tmp_path: Path, name: str
) -> None:
    whole = torch.randn(64, 64).to(getattr(torch, name))
    views = {
        "matrix": whole.t()[3:50:7, 5:60:2],
        "deep": whole.as_strided((3, 4, 2, 5), (9, 2, 0, 13)),
        "long": whole[:, 0],
    }
    torch.save(views, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt") as checkpoint:
        for key, view in views.items():
            found = checkpoint.tensors[key]
            expected = view.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for start in range(0, found.nbytes, 5 * found.dtype.itemsize):
                for numel in (1, 11, 60):
                    nbytes = min(numel * found.dtype.itemsize, found.nbytes - start)
                    buffer = bytearray(nbytes)
                    found.read_into(start, memoryview(buffer))
                    assert buffer == expected[start : start + nbytes]


@pytest.mark.parametrize("how", SAVES)
def test_tied_tensors_are_aliases_of_the_first(tmp_path: Path, how: str) -> None:
    big = torch.arange(12.0).reshape(3, 4)
    value = {"a": big, "b": big, "view": big[1:], "other": big.clone(), "t": big.t(), "t2": big.T}
    SAVES[how](value, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt") as checkpoint:
        aliases = {key: tensor.alias_of for key, tensor in checkpoint.tensors.items()}
    expected = {"a": None, "b": "a", "view": None, "other": None, "t": None, "t2": "t"}
    assert aliases == expected


def test_opening_a_meta_tensor_works_and_reading_it_says_why_not(tmp_path: Path) -> None:
    huge = torch.empty(1 << 40, device="meta")
    torch.save({"w": huge, "b": torch.ones(2)}, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt") as checkpoint:
        assert checkpoint.tensors["w"].shape == (1 << 40,)
        for read in (
            checkpoint.tensors["w"].array,
            lambda: checkpoint.tensors["w"].read_into(0, memoryview(bytearray(4))),
        ):
            with pytest.raises(CheckpointError, match="meta") as caught:
                read()
            assert caught.value.hint


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (tensor((4,), (2,)), "needs 28 bytes"),
        (tensor((5,), (1,)), "needs 20 bytes"),
        (tensor(offset=1), "needs 20 bytes"),
        (tensor(offset=-1), "starts at element -1"),
        (tensor((2, 2), (-1, 1)), "strides"),
        (tensor((2, 2), (1,)), "strides"),
        (tensor((-1, 2), (2, 1)), "impossible"),
        (tensor((1 << 62, 2), (0, 0)), "impossible"),
        (tensor((2,), ((1 << 63) - 1,)), "needs"),
        (tensor((2,), (1 << 63,)), "64 bits"),
        (tensor((2,), (1,), offset=1 << 70), "64 bits"),
        (tensor((4,), (1,), of=storage(numel=5)), "16 bytes"),
        (tensor((4,), (1,), of=storage(kind="DoubleStorage")), "16 bytes"),
        (tensor((4,), (1,), of=storage(kind="WrongStorage")), "unknown way"),
        (tensor((4,), (1,), of=storage("1")), "no entry"),
        (tensor((4,), (1,), of=storage("../0")), "no entry"),
        (tensor([1] * 65, [1] * 65), "65 dimensions"),
    ],
)
def test_a_view_outside_of_its_storage_is_refused(tmp_path: Path, bad: bytes, match: str) -> None:
    path = write_torch_zip(tmp_path / "w.pt", named(w=bad), {"0": FOUR_FLOATS})
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


STEPS = st.one_of(
    st.text(st.characters(), max_size=6),
    st.text('ab."[]\\\n\ud83d\ude00\ud800😀', max_size=6),
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.tuples(st.integers(), st.text(max_size=2)).map(TupleKey),
    st.sampled_from(["int_repr", "values", "state"]).map(Component),
)
PATHS = st.lists(STEPS, min_size=1, max_size=3)


@given(PATHS, PATHS)
def test_two_paths_never_have_one_key(first: list[object], second: list[object]) -> None:
    def identity(path: list[object]) -> list[tuple[type, str]]:
        return [(type(step), repr(step)) for step in path]

    same = format_key(first) == format_key(second)
    assert same == (identity(first) == identity(second))
    format_key(first).encode()


def test_surrogate_pairs_are_told_from_what_they_would_encode() -> None:
    assert format_key(["\ud83d\ude00\ud800"]) != format_key(["😀\ud800"])


NESTED = st.recursive(
    st.just("tensor"),
    lambda inner: st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(NESTED)
def test_every_tensor_of_nested_dicts_has_its_key(
    tmp_path_factory: pytest.TempPathFactory, shape: Any
) -> None:
    paths = []

    def fill(node: Any, path: tuple[Any, ...]) -> Any:
        if node == "tensor":
            paths.append(path)
            return torch.tensor(float(len(paths)))
        return {key: fill(child, (*path, key)) for key, child in node.items()}

    value = {"root": fill(shape, ("root",))}
    file = tmp_path_factory.mktemp("keys") / "w.pt"
    try:
        torch.save(value, file)
    except UnicodeEncodeError:
        return
    if not paths:
        return
    with open_checkpoint(file, section=".") as checkpoint:
        found = {
            key: float(tensor.array())
            for key, tensor in checkpoint.tensors.items()
            if not tensor.dtype.is_value
        }
    assert found == {format_key(path): index + 1.0 for index, path in enumerate(paths)}
