"""What is no checkpoint is named for what it is, with the next step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError, UsageError


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"P", "not a checkpoint"),
        (b"\x80", "plain pickle"),
        (b"\x1f\x8b", "ends early"),
        (b"hello, world\n", "text"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"<html><body>404", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x93NUMPY\x01\x00", "numpy"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"BZh91AY", "bzip2"),
        (bytes(1000), "unknown format"),
        (b"{", "not JSON"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_missing_file_asks_whether_another_was_meant(tmp_path: Path) -> None:
    (tmp_path / "model.nemo").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no such file") as caught:
        open_checkpoint(tmp_path / "modle.nemo")
    assert caught.value.hint == f"did you mean {tmp_path / 'model.nemo'}?"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "no" / "folder" / "w.pt")
    assert caught.value.hint == f"see what is there: ls {tmp_path}"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path.with_name(f"{tmp_path.name}x") / "model.nemo")
    assert caught.value.hint == f"did you mean {tmp_path / 'model.nemo'}?"


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "file:///a%00b"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a valid file name") as caught:
        open_checkpoint(name)
    assert caught.value.hint


def test_folders_pipes_and_loops_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    wanted = {"pipe": "regular", "loop": "symbolic", "folder": "without", "dcp": "STOP"}
    for name, match in wanted.items():
        with pytest.raises(CheckpointError, match=match) as caught:
            open_checkpoint(tmp_path / name)
        assert caught.value.hint


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(10_000)}, path)
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match="ends at byte 5000") as caught:
            checkpoint.tensors["w"].array()
    assert "still being written" in str(caught.value.hint)


def test_a_checkpoint_that_was_closed_says_so(data: Path) -> None:
    with open_checkpoint(data / "nest_tiny.ckpt") as checkpoint:
        tensor = next(iter(checkpoint.tensors.values()))
    with pytest.raises(CheckpointError, match=r"nest_tiny\.ckpt: is closed") as error:
        tensor.array()
    assert "open the checkpoint again" in (error.value.hint or "")


def test_a_name_much_alike_is_that_of_a_checkpoint_of_the_same_kind(tmp_path: Path) -> None:
    for name in ("nest.pt", "nest.yaml", "nest.ckpt", "mem.py"):
        (tmp_path / name).write_bytes(b"")
    for asked, hint in [
        ("nset.pt", f"did you mean {tmp_path / 'nest.pt'}?"),
        ("nset.ckpt", f"did you mean {tmp_path / 'nest.ckpt'}?"),
        ("mm.pt", f"see what is there: ls {tmp_path}"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path / asked)
        assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (
            ["a-00001-of-00002.safetensors", "a.safetensors.index.json"],
            "under an unknown name",
            "give the index: ",
        ),
        (["a-00001-of-00002.safetensors"], "without their index", "the .index.json as well"),
        (["a-00001-of-00001.safetensors"], "without a checkpoint", "a-00001-of-00001.saf"),
        (["best-of-3.pt"], "without a checkpoint", "best-of-3.pt"),
        ([], "without a checkpoint", "give the file"),
    ],
)
def test_a_folder_that_is_no_checkpoint_says_what_to_give(
    tmp_path: Path, names: list[str], message: str, hint: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert hint in (caught.value.hint or "")
