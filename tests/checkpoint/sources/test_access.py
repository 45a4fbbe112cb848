"""Open files that another process opens again, by their names."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources.paths import is_url, to_path
from harness.checkpoint.sources.remote import RemotePath
from harness.checkpoint.sources.source import reopened
from harness.errors import CheckpointError
from harness.model.state import as_checkpoint
from tests.checkpoint.web import Web, serving


@pytest.mark.parametrize(
    "name", ["nest_tiny.nemo", "nest_tiny.ckpt", "lightning_two_ranks.ckpt", "memory://sent.nemo"]
)
def test_another_process_opens_the_files_of_a_tensor_by_their_names(data: Path, name: str) -> None:
    if is_url(name):
        to_path(name).write_bytes((data / "nest_tiny.nemo").read_bytes(), overwrite=True)
    with open_checkpoint(name if is_url(name) else data / name) as checkpoint:
        for tensor in checkpoint.tensors.values():
            sent = pickle.loads(pickle.dumps(tensor))
            assert sent.array().tobytes() == tensor.array().tobytes()


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("where", ["memory", "web", "file"])
def test_a_file_replaced_by_one_of_its_size_is_refused_by_another_process(
    where: str, web: Web, tmp_path: Path
) -> None:
    place = {"memory": "memory://same.st", "web": f"{web.url}/same.st", "file": "same.st"}[where]

    def put(value: float) -> None:
        data = save({"w": torch.full((3,), value)})
        if where == "web":
            web.files["/same.st"] = data
        elif where == "memory":
            RemotePath(place).write_bytes(data, overwrite=True)
        else:
            (tmp_path / place).write_bytes(data)
            os.utime(tmp_path / place, (value, value))

    def open_it() -> Any:
        return open_checkpoint(tmp_path / place if where == "file" else place)

    put(1)
    with open_it() as checkpoint:
        sent = pickle.dumps(checkpoint.tensors["w"])
        assert pickle.loads(sent).array().tolist() == [1] * 3
        put(2)
        reopened.cache_clear()
        with pytest.raises(CheckpointError, match=r"was replaced.* 88 bytes.*rank 0 sees 88 bytes"):
            pickle.loads(sent)
    for value in (2, 3):  # what was open of that name before is no hindrance
        put(value)
        with open_it() as checkpoint:
            sent = pickle.dumps(checkpoint.tensors["w"])
            assert pickle.loads(sent).array().tolist() == [value] * 3


def test_what_is_in_memory_cannot_be_sent() -> None:
    live = as_checkpoint({"w": torch.zeros(3)}, "live").tensors["w"]
    with pytest.raises(TypeError):
        pickle.dumps(live)
