"""Shared by the tests of reading: how torch reads the same file, and what bits a tensor has."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources import remote
from harness.checkpoint.tensors import Checkpoint
from tests.checkpoint.web import Web, serving


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's logical bytes as torch sees them: C order, little-endian."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if not plain.numel():
        return b""
    return plain.view(torch.uint8).numpy().tobytes()


def read_bits(checkpoint: Checkpoint, key: str) -> bytes:
    tensor = checkpoint.tensors[key]
    data = bytearray(tensor.nbytes)
    # In odd pieces, as callers with small buffers do.
    step = 3 * tensor.dtype.itemsize
    for start in range(0, len(data), step):
        tensor.read_into(start, memoryview(data)[start : start + step])
    assert np.frombuffer(tensor.array().tobytes(), "u1").tobytes() == bytes(data)
    return bytes(data)


Assert = Callable[[Path, dict[str, torch.Tensor]], Checkpoint]


@pytest.fixture
def assert_reads() -> Assert:
    """Open a file and check every key, dtype, shape and bit against plain tensors of torch.

    Entries that are no tensors are left out.
    """

    def check(path: Path, expected: dict[str, torch.Tensor], **options: Any) -> Checkpoint:
        with open_checkpoint(path, **options) as checkpoint:
            tensors = [key for key, t in checkpoint.tensors.items() if not t.dtype.is_value]
            assert tensors == list(expected)
            for key, tensor in expected.items():
                found = checkpoint.tensors[key]
                assert f"torch.{found.dtype}" == str(tensor.dtype)
                assert found.shape == tuple(tensor.shape)
                assert read_bits(checkpoint, key) == bits(tensor), key
        return checkpoint

    return check


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.01, 0.01, 0.01))
    with serving() as server:
        yield server


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


def root(path: str | Path) -> str:
    return api.fingerprint(path).root.hex()


def torch_file(state: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()
