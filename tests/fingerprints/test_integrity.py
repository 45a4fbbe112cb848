"""Damaged bytes: refused where a golden would be made of them, named where they differ from one."""

from __future__ import annotations

import re
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import open_checkpoint
from harness.checkpoint.tensors import Checksum
from harness.errors import CheckpointError
from harness.fingerprints.fingerprint import Fingerprint
from harness.fingerprints.integrity import Run, crc32s_of, crc32s_of_runs, cuts_of, cuts_within
from harness.fingerprints.scan import fingerprint
from harness.streaming import chunks
from harness.streaming.chunks import CHUNK_NBYTES
from tests.checkpoint.dcp_writer import halves, write_dcp
from tests.conftest import Harness

State = dict[str, torch.Tensor]


def checked(path: Path, *, check_integrity: bool = True) -> Fingerprint:
    with open_checkpoint(path) as checkpoint:
        return fingerprint(checkpoint, check_integrity=check_integrity)


def saved_and_flipped(path: Path, state: State, place: int) -> None:
    """Save a state, and flip a bit of its first storage."""
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        [entry] = [i for i in archive.infolist() if i.filename.endswith("data/0")]
    assert entry.CRC != 0
    header = content[entry.header_offset : entry.header_offset + 30]
    start = entry.header_offset + 30 + header[26] + 256 * (header[27] + header[29]) + header[28]
    content[start + place] ^= 4
    path.write_bytes(content)


LONG = torch.arange(CHUNK_NBYTES // 4 * 2 + 100, dtype=torch.float32)


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"x": LONG[:100].clone()}, 17),
        ({"x": LONG}, 0),
        ({"x": LONG}, CHUNK_NBYTES),
        ({"x": LONG}, 2 * CHUNK_NBYTES + 399),
        ({"x": LONG, "tied": LONG}, CHUNK_NBYTES + 1),
        ({"x": LONG[:50]}, 2 * CHUNK_NBYTES),  # beyond the tensor, but in its storage
        ({"x": LONG[:50], "y": LONG[50:]}, 300),
        ({"x": LONG[:100].reshape(10, 10).T}, 17),
    ],
)
def test_integrity_is_checked_against_the_archive(tmp_path: Path, state: State, place: int) -> None:
    path = tmp_path / "x.pt"
    torch.save(state, path)
    assert checked(path).root == checked(path, check_integrity=False).root
    saved_and_flipped(path, state, place)
    assert checked(path, check_integrity=False).root  # torch would read it, too
    with pytest.raises(CheckpointError, match="data/0: its CRC-32 is"):
        checked(path)


@pytest.mark.parametrize("piece", range(3))
@pytest.mark.parametrize("place", [0, -1])
def test_a_damaged_shard_is_named(tmp_path: Path, piece: int, place: int) -> None:
    weight = LONG[: len(LONG) // 2 * 2].reshape(-1, 2)
    write_dcp(tmp_path, {"x": halves(weight, count=3)})
    whole = checked(tmp_path)
    share = -(-len(weight) // 3)
    part = weight[piece * share : (piece + 1) * share].numpy().tobytes()
    [path] = [path for path in tmp_path.glob("*.distcp") if part in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(part) + place % len(part)] ^= 1
    path.write_bytes(content)
    assert checked(tmp_path, check_integrity=False).root != whole.root
    with pytest.raises(CheckpointError, match=re.escape(path.name) + ".*its CRC-32 is"):
        checked(tmp_path)


class Zeros:
    """A source of nothing, for checksums whose bytes are at hand."""

    name = "zeros"


@given(data=st.data())
def test_the_checksum_of_a_run_is_joined_from_pieces_of_chunks(data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=60))
    edges = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8, unique=True)))
    runs = [
        Run(start, Checksum(Zeros(), 0, stop - start, zlib.crc32(content[start:stop])))
        for start, stop in pairwise(edges)
        if data.draw(st.booleans())
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_NBYTES", data.draw(st.integers(1, 30)))
        cuts = cuts_of(runs)
        crc32s = [
            crc32
            for chunk in chunks.chunks(len(content))
            for crc32 in crc32s_of(
                np.frombuffer(content, "|u1")[chunk.start : chunk.start + chunk.nbytes],
                chunk,
                data.draw(st.sampled_from([cuts, cuts_within(cuts, chunk)])),
            )
        ]
        found = list(crc32s_of_runs(runs, len(content), crc32s))
    assert [(checksum, checksum.crc32) for _, checksum in runs] == found


def test_the_archives_other_entries_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.zeros(3)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        [entry] = [i for i in archive.infolist() if i.filename.endswith("/version")]
    start = content.index(b"3\n", entry.header_offset)
    content[start + 1] = ord(" ")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="version: its CRC-32 is"):
        checked(path)


@pytest.fixture
def net(tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of 30 tensors that has a golden."""
    monkeypatch.chdir(tmp_path)
    state = {f"layer.{n}": torch.full((5000,), 1.0 + n) for n in range(30)}
    state["last"] = state["layer.29"]
    torch.save(state, "net.pt")
    assert harness("record", "net.pt").code == 0
    return Path("net.pt")


# The exponent's bit makes another number of it, the mantissa's lowest one that is close.
@pytest.mark.parametrize("byte", [3, 0])
@pytest.mark.parametrize("golden", [[], ["-g", "golden/net.safetensors"]])
def test_damaged_tensors_are_named_and_nobody_is_asked_to_accept_them(
    net: Path, harness: Harness, byte: int, golden: list[str]
) -> None:
    saved_and_flipped(net, torch.load(net), byte)
    run = harness("verify", net, *golden)
    assert run.code == 1
    assert "1 damaged" in run.out.splitlines()[0]
    section = run.out[run.out.index("damaged: not the bytes that were saved") :].splitlines()
    assert section[1].strip() == "layer.0"
    assert section[2].strip().endswith("says net.pt: net/data/0")
    assert run.out.endswith("changed since they were saved: get the file again\n")
    assert "--update-golden" not in run.out


def test_other_weights_are_not_damaged(net: Path, harness: Harness) -> None:
    torch.save({key: value + 1 for key, value in torch.load(net).items()}, net)
    run = harness("verify", net)
    assert run.code == 1
    assert "damaged" not in run.out
    assert "--update-golden" in run.out


def test_of_very_many_damaged_tensors_the_worst_are_told(net: Path, harness: Harness) -> None:
    content = net.read_bytes()
    for n in range(30):
        raw = torch.full((5000,), 1.0 + n).numpy().tobytes()  # as it lies in the file
        assert content.count(raw) == 1
        content = content.replace(raw, raw[:-1] + b"\x7f")
    net.write_bytes(content)
    run = harness("verify", net)
    assert "20 damaged" in run.out.splitlines()[0]
    assert "note: 11 more that differ were not looked at for damage" in run.out


def test_a_renamed_and_damaged_tensor_is_found_by_its_own_name(net: Path, harness: Harness) -> None:
    state = {f"model.{key}": value for key, value in torch.load(net).items()}
    saved_and_flipped(net, state, 3)
    run = harness("verify", net, "--strip-prefix", "model.")
    assert "1 damaged" in run.out.splitlines()[0]


@pytest.mark.parametrize("side", ["net.pt", "whole.pt"])
def test_diff_tells_which_side_is_damaged(net: Path, harness: Harness, side: str) -> None:
    state = torch.load(net)
    torch.save(state, "whole.pt")
    saved_and_flipped(Path(side), state, 3)
    run = harness("diff", "net.pt", "whole.pt")
    assert run.code == 1
    assert "1 damaged" in run.out.splitlines()[0]
    assert f"says {side}: {side.removesuffix('.pt')}/data/0" in run.out
