"""Files that are replaced, or shrink, while they are open; compressed data of any length."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from harness.checkpoint.sources.access import Pool
from harness.checkpoint.sources.files import FileSource
from harness.checkpoint.sources.inflated import InflatedSource
from harness.checkpoint.sources.source import read
from harness.errors import CheckpointError

MIB = 1 << 20


def inflated(path: Path, data: bytes) -> InflatedSource:
    path.write_bytes(data)
    return InflatedSource(FileSource(path), 0, len(data), "entry", wbits=-15)


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
        source = inflated(tmp_path / "entry", packed[:-cut])
        with pytest.raises(CheckpointError, match="ends early"):
            read(source, 0, 1)
        source.close()


def test_a_file_that_shrinks_cannot_be_mapped(tmp_path: Path) -> None:
    for left in (0, 100):
        path = tmp_path / "file"
        path.write_bytes(bytes(1000))
        source = FileSource(path)
        os.truncate(path, left)
        with pytest.raises(CheckpointError, match="cannot be mapped"):
            source.view(0, 1000)
        source.close()


def test_a_pooled_file_that_was_replaced_is_not_read_for_the_other(tmp_path: Path) -> None:
    path, new = tmp_path / "file", tmp_path / "new"
    path.write_bytes(b"old!")
    os.utime(path, (1, 1))
    pool = Pool()
    source = pool.open(path)
    new.write_bytes(b"new!")
    new.replace(path)
    assert read(source, 0, 4) == b"old!"  # it is still open
    pool.opened.cache_clear()  # as when too many others are
    with pytest.raises(CheckpointError, match=r"replaced: has 4 bytes, .*, had 4 bytes, "):
        read(source, 0, 4)
    source.close()
