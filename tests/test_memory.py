"""Memory does not grow with the checkpoint: large files of holes, verified by the command."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

from harness.checkpoint.dtypes import DTYPES
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint, block_numel, digest_of
from harness.fingerprints.sketch import DEFAULT_BLOCK_NBYTES, NUM_PROJECTIONS, Sketch, num_blocks
from harness.fingerprints.stats import Stats
from harness.golden.file import write_golden
from harness.golden.golden import Golden
from harness.streaming.chunks import CHUNK_NBYTES, chunks

GIB = 1 << 30
MAX_NBYTES = 100 << 20  # of two threads; 22 MiB are the program's own
SHAPES = {
    "embed.weight": (32768, 32768 + 64),  # 4.01 GiB: no 32 bits hold a place in it
    "layer.weight": (2048, 22528),  # 176 MiB
    "head.weight": (2048, 8192),  # 64 MiB
}


def write_holes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 zeros that takes no room."""
    end, header = 0, {}
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def zeros_print(key: str, shape: tuple[int, ...]) -> TensorFingerprint:
    """The fingerprint of float32 zeros, without their being there."""
    dtype, numel = DTYPES["float32"], math.prod(shape)
    whole = blake3(bytes(CHUNK_NBYTES)).digest()
    digests = [
        whole if chunk.nbytes == CHUNK_NBYTES else blake3(bytes(chunk.nbytes)).digest()
        for chunk in chunks(4 * numel)
    ]
    blocks = num_blocks(numel, block_numel(dtype, DEFAULT_BLOCK_NBYTES))
    return TensorFingerprint(
        key=key,
        dtype=dtype,
        shape=shape,
        digest=digest_of(dtype, shape, digests),
        stats=Stats(
            min=0, max=0, mean=0, std=0, l2=0, num_zero=numel, num_nan=0, num_posinf=0, num_neginf=0
        ),
        sketch=Sketch(projections=np.zeros((blocks, NUM_PROJECTIONS)), norms=np.zeros(blocks)),
    )


def run_measured(*arguments: str, cwd: Path) -> tuple[int, str, int]:
    """Run the command; returns its exit code, what it printed, and its peak anonymous memory."""
    command = [sys.executable, "-m", "harness", *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        peak = max(peak, int(found[1]) << 10 if found else 0)
        time.sleep(0.005)
    out, _ = process.communicate()
    return process.returncode, out, peak


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder where to read holes costs no page of the cache, if there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_gigabytes_are_verified_and_one_element_is_found_in_them(
    roomy: Path, tmp_path: Path
) -> None:
    path, golden = roomy / "large.safetensors", tmp_path / "golden.safetensors"
    write_holes(path, SHAPES)
    assert path.stat().st_size > 4 * GIB
    write_golden(
        Golden(
            path=golden,
            fingerprint=Fingerprint(
                name="large",
                container="safetensors",
                section="",
                tensors={key: zeros_print(key, shape) for key, shape in SHAPES.items()},
                keeps_aliases=False,
            ),
            source="large.safetensors",
            section=None,
        )
    )
    with path.open("r+b") as file:  # the last element but one
        file.seek(-8, 2)
        file.write(struct.pack("<f", 0.5))
    command = ("verify", str(path), "-g", golden.name, "--jobs", "2")
    code, out, peak = run_measured(*command, cwd=tmp_path)
    golden.unlink()
    assert code == 1, out
    assert "2 identical, 1 different" in out
    assert "[2047, 8190]  expected 0  actual 0.5" in out
    assert peak < MAX_NBYTES, f"{peak >> 20} MiB of anonymous memory"


@pytest.mark.parametrize("verb", ["record", "show"])
def test_a_transposed_tensor_is_read_in_pieces(tmp_path: Path, verb: str) -> None:
    values = torch.zeros(1024, 16384)
    torch.save({"w": values.t()}, tmp_path / "transposed.pt")
    code, out, peak = run_measured(verb, "transposed.pt", cwd=tmp_path)
    (tmp_path / "transposed.pt").unlink()
    assert code == 0, out
    assert peak < values.nbytes, f"{peak >> 20} MiB of anonymous memory"
