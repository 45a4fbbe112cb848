"""Zip archives: what readers could disagree on is refused."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import pytest

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError
from tests.checkpoint.builders import named, tensor, write_torch_zip, write_zip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_torch_zip(tmp_path / "w.pt", named(w=tensor()))


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def patched(path: Path, magic: bytes, offset: int, value: bytes) -> None:
    """Overwrite a field of the last record that starts with `magic`."""
    data = bytearray(path.read_bytes())
    at = data.rindex(magic) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


@pytest.mark.parametrize(
    ("magic", "offset", "value", "match"),
    [
        (CENTRAL, 8, b"\x01\x00", "encrypted"),
        (CENTRAL, 10, b"\x0c\x00", "method 12"),
        (CENTRAL, 10, b"\x08\x00", "no header"),
        (CENTRAL, 24, b"\x00\x00\x00\x10", "two sizes"),
        (CENTRAL, 42, b"\x00\x00\x00\x00", "overlap"),
        (CENTRAL, 42, b"\xff\xff\xff\x7f", "outside"),
        (CENTRAL, 20, b"\x00\x01\x00\x00\x00\x01\x00\x00", "outside"),
        (LOCAL, 0, b"XXXX", "no header"),
        (LOCAL, 28, b"\xff\xff", "outside"),
        (CENTRAL, 0, b"XXXX", "broken directory"),
        (END, 10, b"\x09\x00", "ends early"),
        (END, 10, b"\x01\x00", "holds more"),
        (END, 12, b"\xff\xff\xff\x00", "outside"),
        (END, 16, b"\xff\xff\xff\x00", "outside"),
        (END, 4, b"\x01\x00", "split"),
        (END, 0, b"XXXX", "without its directory"),
    ],
)
def test_a_directory_that_contradicts_the_file_is_refused(
    path: Path, magic: bytes, offset: int, value: bytes, match: str
) -> None:
    patched(path, magic, offset, value)
    refused(path, match)


def test_two_entries_of_one_name_are_refused(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/data/0", bytes(16))
    refused(path, "two entries")


def test_bytes_after_the_end_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, "after its end")


def test_a_zip64_archive_reads(path: Path) -> None:
    """The directory's end in its zip64 form, as archives of more than 4 GB have it."""
    data = path.read_bytes()
    at = data.rindex(END)
    _, _, _, _, count, nbytes, offset, _ = struct.unpack("<4s4H2LH", data[at:])
    record = (b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes, offset)
    end = struct.pack("<4sQ2H2L4Q", *record) + struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    end += struct.pack("<4s4H2LH", END, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:at] + end)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"].array().tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("field", [0xFFFFFFFFFFFFFFFF, 1 << 40])
def test_a_zip64_record_outside_of_the_file_is_refused(path: Path, field: int) -> None:
    data = path.read_bytes()
    at = data.rindex(END)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, field, 1)
    path.write_bytes(data[:at] + locator + data[at:])
    refused(path, "zip64")


def test_damage_inside_of_a_deflated_entry_is_found(tmp_path: Path) -> None:
    body = named(w=tensor())
    path = write_torch_zip(tmp_path / "w.pt", body, compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[60:70] = bytes(10)
    path.write_bytes(data)
    refused(path, r"data\.pkl")


@pytest.mark.parametrize(
    "entries",
    [{}, {"a.txt": b"x"}, {"data.pkl": b"."}, {"a/data.pkl": b".", "b/data.pkl": b"."}],
)
def test_an_archive_that_is_not_torchs_is_named_as_one(
    tmp_path: Path, entries: dict[str, bytes]
) -> None:
    refused(write_zip(tmp_path / "w.zip", entries), "zip")


def test_numpys_archive_is_not_torchs(tmp_path: Path) -> None:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(2))
    (tmp_path / "w.npz").write_bytes(buffer.getvalue())
    refused(tmp_path / "w.npz", "not one of torch's")
