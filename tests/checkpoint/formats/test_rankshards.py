"""Safetensors of which every rank wrote its own chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError, HarnessError
from tests.checkpoint.conftest import Assert
from tests.checkpoint.test_fuzz import damage

W = torch.arange(24.0).reshape(4, 6)
Parts = dict[str, tuple[torch.Tensor, Any]]


def write_shard(path: Path, parts: Parts, info: str | None = None) -> None:
    """One rank's file: chunks by name, each with where it starts."""
    offsets = {name: {"saved_offsets": start} for name, (_, start) in parts.items()}
    metadata = {"DCP_SHARDING_INFO": info or json.dumps(offsets), "DCP_VERSION": "1.0"}
    save_file({name: part.contiguous() for name, (part, _) in parts.items()}, path, metadata)


def shards(folder: Path, *ranks: Parts) -> Path:
    for rank, parts in enumerate(ranks, start=1):
        write_shard(folder / f"shard-{rank:05}-model-00001-of-00001.safetensors", parts)
    return folder


def test_chunks_of_all_ranks_are_joined(tmp_path: Path, assert_reads: Assert) -> None:
    shards(
        tmp_path,
        {"w": (W[:, :4], [0, 0]), "b[0]": (W[0], [0]), "s": (torch.tensor(1.0), [])},
        {"w": (W[:, 4:], [0, 4])},
    )
    expected = {"s": torch.tensor(1.0), '["b[0]"]': W[0], "w": W}
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.name == str(tmp_path)
        order = list(checkpoint.tensors)
    assert_reads(tmp_path, {key: expected[key] for key in order})
    assert set(order) == set(expected)


def test_a_file_that_says_nothing_holds_whole_tensors(tmp_path: Path, assert_reads: Assert) -> None:
    shards(tmp_path, {"w": (W[:2], [0, 0])}, {"w": (W[2:], [2, 0])})
    save_file({"whole": W}, tmp_path / "z.safetensors")
    assert_reads(tmp_path, {"w": W, "whole": W})


def test_the_index_of_another_save_does_not_hide_the_shards(
    tmp_path: Path, assert_reads: Assert
) -> None:
    shards(tmp_path, {"w": (W[:2], [0, 0])}, {"w": (W[2:], [2, 0])})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    assert assert_reads(tmp_path, {"w": W}).name == str(tmp_path)
    # With the files that it names it is a checkpoint, whatever lies beside it.
    save_file({"w": W + 1}, tmp_path / "model-00001-of-00001.safetensors")
    assert assert_reads(tmp_path, {"w": W + 1}).name == str(index)


@pytest.mark.parametrize(
    ("ranks", "match"),
    [
        (
            [{"w": (W[:1], [0, 0])}, {"w": (W[2:], [2, 0])}],
            r"tensor 'w' \(shape \[4, 6\]\) lacks its element \[1, 0\]: no chunk holds it",
        ),
        (
            [{"w": (W[:3], [0, 0])}, {"w": (W[2:], [2, 0])}],
            r"its element \[2, 0\] twice: in the chunk at \[0, 0\] of shape .* in shard-00001",
        ),
        (
            [{"w": (W[:2], [0, 0])}, {"w": (W[2:].bfloat16(), [2, 0])}],
            r"tensor 'w' as float32 of 2 dimensions in shard-00001.*, and as bfloat16 of 2",
        ),
        (
            [{"w": (W[:2], [0, 0])}, {"w": (W[2], [2])}],
            r"tensor 'w' as float32 of 2 dimensions in shard-00001.*, and as float32 of 1",
        ),
        ([{"w": (W[:2], [0])}], "does not say where its chunk of 'w' is in the whole"),
    ],
)
def test_chunks_that_do_not_fit_are_told_apart(
    tmp_path: Path, ranks: list[Parts], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(shards(tmp_path, *ranks))
    assert str(tmp_path) in str(caught.value)
    assert "all ranks" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("info", "match"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"w": [0, 0]}', "of an unknown form"),
        ('{"w": {"saved_offsets": [0, -1]}}', "of an unknown form"),
        ('{"w": {"saved_offsets": [0, true]}}', "of an unknown form"),
        ("[]", "does not say where its chunk of 'w' is"),
        ("{}", "does not say where its chunk of 'w' is"),
        (
            '{"w": {"saved_offsets": [0, 0]}, "w": {"saved_offsets": [1, 0]}}',
            "the name 'w' appears twice",
        ),
    ],
)
def test_offsets_that_are_none_are_refused(tmp_path: Path, info: str, match: str) -> None:
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    write_shard(path, {"w": (W, [0, 0])}, info)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


def test_ordinary_safetensors_without_an_index_are_no_one_checkpoint(tmp_path: Path) -> None:
    save_file({"w": W}, tmp_path / "a.safetensors")
    save_file({"v": W}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="a folder of several files"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="a folder of several files"):
        open_checkpoint(tmp_path)


def test_sections_are_refused(tmp_path: Path) -> None:
    shards(tmp_path, {"w": (W, [0, 0])})
    with pytest.raises(CheckpointError, match="no sections"):
        open_checkpoint(tmp_path, section="model")


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_shard_reads_or_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    shards(folder, {"w": (W[:, :4], [0, 0]), "b": (W, [0, 0])}, {"w": (W[:, 4:], [0, 4])})
    path = folder / "shard-00001-model-00001-of-00001.safetensors"
    path.write_bytes(data.draw(damage(path.read_bytes())))
    try:
        with open_checkpoint(folder) as checkpoint:
            for tensor in checkpoint.tensors.values():
                tensor.array()
    except HarnessError as error:
        message, hint = str(error), error.hint
    else:
        message, hint = str(folder), "nothing"
    assert str(folder) in message
    assert hint


def test_parts_without_their_index_are_told_by_one_of_them(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors.*without their index"
    ) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "copy or download the .index.json as well"
