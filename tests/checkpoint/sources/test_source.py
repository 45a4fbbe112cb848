"""Files that are replaced, changed or no files at all; compressed data of any length."""

from __future__ import annotations

import os
import socket
import zlib
from pathlib import Path

import pytest

from harness.checkpoint.sources import files
from harness.checkpoint.sources.files import FileSource
from harness.checkpoint.sources.inflated import InflatedSource
from harness.checkpoint.sources.scratch import Scratch, copied
from harness.checkpoint.sources.source import RangeSource, read
from harness.errors import CheckpointError

MIB = 1 << 20


def inflated(path: Path, data: bytes) -> InflatedSource:
    path.write_bytes(data)
    return InflatedSource(FileSource(path), "entry", wbits=-15)


@pytest.mark.parametrize("extra", range(1, 300, 13))
def test_the_last_input_may_hold_more_than_one_step_of_output(tmp_path: Path, extra: int) -> None:
    data = bytes(MIB + extra)
    packer = zlib.compressobj(6, wbits=-15)
    source = inflated(tmp_path / "entry", packer.compress(data) + packer.flush())
    assert read(source, 0, source.nbytes) == data
    source.close()


def test_compressed_data_that_ends_early_is_refused(tmp_path: Path) -> None:
    packer = zlib.compressobj(6, wbits=-15)
    packed = packer.compress(os.urandom(1000) + bytes(MIB + 100)) + packer.flush()
    for cut in (1, 2, 5, 900):
        with pytest.raises(CheckpointError, match="ends early"):
            inflated(tmp_path / "entry", packed[:-cut])


@pytest.mark.parametrize("how", ["truncated", "rewritten", "grown"])
def test_a_file_that_changes_in_place_is_an_error_at_the_next_read(
    tmp_path: Path, how: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    os.utime(path, (1, 1))
    source = FileSource(path)
    assert read(source, 0, 10) == bytes(10)
    if how == "truncated":
        os.truncate(path, 100)
    elif how == "rewritten":
        path.write_bytes(bytes([1]) * 1000)
    else:
        path.write_bytes(bytes(2000))
    with pytest.raises(CheckpointError, match=r"had 1000 bytes, .*changed while it was read"):
        read(source, 0, 10)
    with pytest.raises(CheckpointError, match=r"changed while|ends at byte 100"):
        read(source, 90, 20)


def test_a_copy_is_not_changed_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.checkpoint.sources.scratch._IN_MEMORY_NBYTES", 100)
    path = tmp_path / "file"
    data = os.urandom(MIB + 1000)
    path.write_bytes(data)
    source = RangeSource(FileSource(path), 1, len(data) - 1, "part")
    small, large = copied(source, 0, 100), copied(source, 7, len(data) - 8)
    os.truncate(path, 0)
    assert (bytes(small), bytes(large)) == (data[1:101], data[8:])
    assert small.readonly
    assert large.readonly


def test_a_file_that_was_replaced_is_not_read_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 1)
    path, new = tmp_path / "file", tmp_path / "new"
    path.write_bytes(b"old!")
    os.utime(path, (1, 1))
    source = FileSource(path)
    new.write_bytes(b"new!")
    new.replace(path)
    assert read(source, 0, 4) == b"old!"  # it is still open
    other = FileSource(path)  # takes its place
    with pytest.raises(CheckpointError, match=r"replaced: has 4 bytes, .*, had 4 bytes, "):
        read(source, 0, 4)
    assert read(other, 0, 4) == b"new!"
    path.unlink()
    FileSource._open.pop(id(other))
    with pytest.raises(CheckpointError, match="cannot be opened again"):
        read(other, 0, 4)


def test_more_files_than_may_be_open_are_read_by_their_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    sources = []
    for number in range(20):
        Path(f"file{number}").write_bytes(bytes([number]))
        sources.append(FileSource(Path(f"file{number}")))
        assert len(FileSource._open) <= 3
    monkeypatch.chdir("elsewhere")
    for number, source in enumerate(sources):
        assert read(source, 0, 1) == bytes([number])
        assert len(FileSource._open) <= 3
    for source in sources:
        source.close()
    with pytest.raises(CheckpointError, match="file7: is closed"):
        read(sources[7], 0, 1)


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path / "socket", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            FileSource(path)
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        FileSource(tmp_path)


def test_a_temporary_file_that_is_closed_or_has_no_room_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = Scratch("what is copied")
    scratch.write(0, b"abc")
    assert read(scratch, 1, 2) == b"bc"
    assert bytes(scratch.map()) == b"abc"
    scratch.close()
    with pytest.raises(CheckpointError, match="is closed"):
        read(scratch, 0, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"what is copied: no room .*No space left") as info:
        Scratch("what is copied").write(0, b"abc")
    assert "TMPDIR" in (info.value.hint or "")
