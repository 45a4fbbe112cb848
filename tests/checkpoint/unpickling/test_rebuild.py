"""Tensors that torch keeps as several: quantized, sparse, nested, subclasses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError
from tests.checkpoint.conftest import bits, read_bits


def parts_of(path: Path) -> dict[str, bytes]:
    with open_checkpoint(path) as checkpoint:
        return {key: read_bits(checkpoint, key) for key in checkpoint.tensors}


@pytest.mark.filterwarnings("ignore")  # torch deprecates quantized tensors, at every step
@pytest.mark.parametrize("name", ["qint8", "quint8", "qint32"])
@pytest.mark.parametrize("zipped", [True, False])
def test_quantized_tensors_are_integers_scales_and_zero_points(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    dtype = getattr(torch, name)
    value = torch.randn(3, 4)
    scales, zero_points = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0, 1, 2])
    tensors = {
        "whole": torch.quantize_per_tensor(value, 0.05, 3, dtype),
        "by_row": torch.quantize_per_channel(value, scales, zero_points, 0, dtype),
    }
    path = tmp_path / "w.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    loaded = torch.load(path, weights_only=False)
    with open_checkpoint(path) as checkpoint:
        assert str(checkpoint.tensors["whole[int_repr]"].dtype) == name
    assert parts_of(path) == {
        "whole[int_repr]": bits(loaded["whole"].int_repr()),
        "whole[scale]": bits(torch.tensor(0.05, dtype=torch.float64)),
        "whole[zero_point]": bits(torch.tensor(3)),
        "by_row[int_repr]": bits(loaded["by_row"].int_repr()),
        "by_row[scales]": bits(loaded["by_row"].q_per_channel_scales()),
        "by_row[zero_points]": bits(loaded["by_row"].q_per_channel_zero_points()),
        "by_row[axis]": bits(torch.tensor(0)),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "nbytes"), [("quint4x2", 9), ("quint2x4", 6)])
def test_quantized_elements_that_share_bytes_are_read_as_those_bytes(
    tmp_path: Path, name: str, nbytes: int
) -> None:
    scales, zero_points = torch.rand(3) + 0.1, torch.rand(3)
    value = torch.quantize_per_channel(
        torch.randn(3, 5), scales, zero_points, 0, getattr(torch, name)
    )
    torch.save({"w": value}, tmp_path / "w.pt")
    storage = torch.load(tmp_path / "w.pt", weights_only=False)["w"].untyped_storage()
    assert storage.nbytes() == nbytes
    assert parts_of(tmp_path / "w.pt") == {
        "w[int_repr]": bytes(storage),
        "w[size]": bits(torch.tensor([3, 5])),
        "w[scales]": bits(scales),
        "w[zero_points]": bits(zero_points),
        "w[axis]": bits(torch.tensor(0)),
    }


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors_are_indices_and_values(tmp_path: Path, layout: str) -> None:
    dense = torch.tensor([[0.0, 1, 0, 2], [3, 0, 0, 0], [0, 0, 4, 0], [0, 5, 0, 6]])
    blocks = {"blocksize": (2, 2)} if layout in ("bsr", "bsc") else {}
    sparse = dense.to_sparse(layout=getattr(torch, f"sparse_{layout}"), **blocks)
    torch.save({"w": sparse}, tmp_path / "w.pt")
    if layout == "coo":
        wanted = {"indices": sparse.coalesce().indices()}
    elif layout in ("csr", "bsr"):
        wanted = {"crow_indices": sparse.crow_indices(), "col_indices": sparse.col_indices()}
    else:
        wanted = {"ccol_indices": sparse.ccol_indices(), "row_indices": sparse.row_indices()}
    values = sparse.coalesce().values() if layout == "coo" else sparse.values()
    wanted |= {"values": values, "size": torch.tensor(dense.shape)}
    expected = {f"w[{name}]": bits(tensor) for name, tensor in wanted.items()}
    assert parts_of(tmp_path / "w.pt") == expected


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_hold_their_values(tmp_path: Path, layout: torch.layout) -> None:
    rows = [torch.randn(2, 3), torch.randn(4, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor(rows, layout=layout)
        torch.save({"w": nested}, tmp_path / "w.pt")
    found = parts_of(tmp_path / "w.pt")
    values = b"".join(bits(row) for row in rows)
    assert values in found.values()
    assert all(key.startswith("w[") for key in found)
    assert bits(torch.tensor([0, 2, 6])) in found.values() or layout == torch.strided


class OfXLA:
    """What older versions of torch saved of a tensor of XLA, which has no storage."""

    def __reduce__(self) -> tuple[Any, ...]:
        args = (np.ones(2, "float32"), torch.float32, "xla:0", False)
        return torch._utils._rebuild_device_tensor_from_numpy, args


def test_a_tensor_that_is_made_in_an_unknown_way_is_not_left_out(tmp_path: Path) -> None:
    torch.save({"w": OfXLA(), "b": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"tensor w is made by .*_numpy") as caught:
        open_checkpoint(tmp_path / "w.pt")
    assert "CPU" in str(caught.value.hint)


class Wrapper(torch.Tensor):
    """A tensor without bytes of its own, as quantization libraries define."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, scale: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale, self.note = inner, scale, "text"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


class Plain(torch.Tensor):
    pass


def test_a_wrapper_is_what_is_inside(tmp_path: Path) -> None:
    inner, scale = torch.arange(6, dtype=torch.int8).reshape(2, 3), torch.tensor([0.5])
    torch.save({"w": Wrapper(inner, scale), "b": torch.ones(1)}, tmp_path / "w.pt")
    expected = {"w[inner]": bits(inner), "w[scale]": bits(scale), "b": bits(torch.ones(1))}
    expected["w[note]"] = b'"text"'
    assert parts_of(tmp_path / "w.pt") == expected


def test_a_subclass_with_its_own_bytes_is_a_tensor(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3)
    marked = value.as_subclass(Plain)
    marked.note = torch.ones(3)  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(value + 1)
    parameter.note = "attribute"  # type: ignore[attr-defined]
    tensors = {
        "plain": value.as_subclass(Plain),
        "marked": marked,
        "parameter": torch.nn.Parameter(value),
        "noted": parameter,
        "buffer": torch.nn.Buffer(value + 2),
    }
    torch.save(tensors, tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", weights_only=False)
    expected = {key: bits(tensor.as_subclass(torch.Tensor)) for key, tensor in loaded.items()}
    expected["marked[note]"] = bits(torch.ones(3))
    assert parts_of(tmp_path / "w.pt") == expected
