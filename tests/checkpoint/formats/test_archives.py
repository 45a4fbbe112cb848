"""Archives like one that was read before are read by its mould, and only those."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from harness.checkpoint.formats import archives
from harness.checkpoint.formats.archives import TensorArchives
from harness.checkpoint.formats.torchfile import read_torch_zip
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.opcodes import Budget
from harness.checkpoint.unpickling.rebuild import Literal
from harness.errors import CheckpointError


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Reader:
    """Reads archives one after the other, and counts those that were read in full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_full = 0
        self.archives = TensorArchives(Budget())
        monkeypatch.setattr(archives, "read_torch_zip", self._counted)

    def _counted(self, *args: Any, **options: Any) -> Any:
        self.in_full += 1
        return read_torch_zip(*args, **options)

    def read(self, data: bytes) -> tuple[Any, ...]:
        """What an archive says: dtype, shape, strides, values, CRC-32 of the values; or why not."""
        try:
            file = self.archives.read(Literal(data))
        except CheckpointError as error:
            return ("error", str(error))
        tensor = file.root
        if not isinstance(tensor, Tensor):
            return (type(tensor),)
        crc32s = [c.crc32 for c in file.checksums if c.nbytes == tensor.storage.nbytes]
        return tensor.dtype, tensor.shape, tensor.strides, tensor.array().tobytes(), crc32s


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch)


def test_archives_of_one_dtype_and_shape_are_read_in_full_once(reader: Reader) -> None:
    torch.manual_seed(0)
    kinds = [torch.randn(5, 3), torch.randn(3, 5), torch.randn(5, 3).t(), torch.ones(15).long()]
    kinds += [torch.randn(300, 400), torch.randn(())]
    for count, kind in enumerate(kinds, start=1):
        for _ in range(5):
            kind = kind + torch.rand(1).to(kind.dtype)
            found = reader.read(saved(kind))
            assert str(found[0]) == str(kind.dtype).removeprefix("torch.")
            assert found[1:3] == (tuple(kind.shape), kind.stride())
            assert found[3] == kind.numpy().tobytes()
        assert reader.in_full == count


@pytest.mark.parametrize(
    "value",
    [torch.zeros(0, 3), [torch.ones(3)], "text", torch.ones(4).to_sparse(), torch.ones(3)[1:]],
    ids=["empty", "list", "text", "sparse", "view"],
)
def test_what_is_unlike_a_plain_tensor_is_read_as_it_is(reader: Reader, value: Any) -> None:
    assert reader.read(saved(value)) == reader.read(saved(value))


def test_a_flipped_bit_is_read_by_a_mould_as_it_is_in_full(
    monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    """In any byte: what is not of the tensor, and not its CRC-32, is never taken on trust."""
    mould, data = saved(torch.arange(6.0).reshape(2, 3)), saved(torch.ones(2, 3))
    for at in range(len(data)):
        reader.read(mould)
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        assert reader.read(bytes(flipped)) == Reader(monkeypatch).read(bytes(flipped)), at


def test_a_view_that_leaves_its_storage_is_refused(reader: Reader) -> None:
    long = bytearray(saved(torch.arange(6.0)))
    at = long.index(b"K\x06\x85")  # the size, a tuple of one number
    long[at + 1] = 7
    assert reader.read(bytes(long))[0] == "error"
