#!/usr/bin/env python3
"""Record, verify, diff and show of checkpoints of many small tensors: time, memory, size.

scripts/many_tensors.py [NUMBER] [CONTAINER …] prints a table of 250,000 tensors of 16 float32
elements in one safetensors file, one pickle, and one folder of torch.distributed.checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

NUMEL = 16


def keys(number: int) -> list[str]:
    return [
        f"model.layers.{i // 512}.mlp.experts.{i % 512}.down_proj.weight" for i in range(number)
    ]


def safetensors(path: Path, values: np.ndarray) -> Path:
    header = {
        key: {
            "dtype": "F32",
            "shape": [NUMEL],
            "data_offsets": [4 * NUMEL * i, 4 * NUMEL * (i + 1)],
        }
        for i, key in enumerate(keys(len(values)))
    }
    text = json.dumps(header).encode()
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    return path


def _state(values: np.ndarray) -> dict[str, object]:
    import torch

    return {
        k: torch.from_numpy(row.copy()) for k, row in zip(keys(len(values)), values, strict=True)
    }


def pickle(path: Path, values: np.ndarray) -> Path:
    import torch

    path = path.with_suffix(".pt")
    torch.save(_state(values), path)
    return path


def dcp(path: Path, values: np.ndarray) -> Path:
    import torch.distributed.checkpoint as checkpoint

    checkpoint.save(_state(values), checkpoint_id=path, no_dist=True)
    return path


CONTAINERS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "safetensors": safetensors,
    "pickle": pickle,
    "dcp": dcp,
}


def make(name: str, path: Path, number: int, *, changed: bool) -> Path:
    """Make a checkpoint in a process of its own, whose memory would count as the command's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_make, (name, path, number, changed))


def _make(name: str, path: Path, number: int, changed: bool) -> Path:
    values = np.random.default_rng(0).standard_normal((number, NUMEL)).astype("f4")
    values[number // 2, 3] += changed
    return CONTAINERS[name](path, values)


def run(*arguments: object) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak MB of one command, which may find a difference."""
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "harness", *map(str, arguments)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"harness {' '.join(map(str, arguments))}: failed")
    busy = usage.ru_utime + usage.ru_stime
    return time.monotonic() - started, busy, usage.ru_maxrss / 1024


def main(number: int, names: list[str]) -> None:
    print(f"{number:,} tensors        s  cpu s     MB peak   bytes of the golden a tensor")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            one = make(name, Path(folder) / name, number, changed=False)
            other = make(name, Path(folder) / f"{name}_changed", number, changed=True)
            golden = Path(folder) / f"{name}.golden.safetensors"
            for what in (
                ["record", one, "-g", golden],
                ["verify", one, "-g", golden],
                ["verify", other, "-g", golden],
                ["diff", one, other],
                ["show", golden],
            ):
                seconds, busy, peak = run(*what)
                size = f"{golden.stat().st_size / number:8.0f}" if what[0] == "record" else ""
                of = " changed" if what[1] == other else ""
                print(
                    f"{name:12} {what[0] + of:15} {seconds:6.1f} {busy:6.1f} {peak:8.0f} {size}",
                    flush=True,
                )


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["250000"])[0]), sys.argv[2:] or list(CONTAINERS))
