"""Open each file in a process of its own; print what came of it, and what time and memory it took.

Usage: python measure.py STRUCTURE_MIB FILE...; the first is the limit for a pickle's objects. One
JSON object a file. Memory is the peak of anonymous memory beyond what the imports take, sampled
from outside of the process that reads.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy  # noqa: F401 - a part of the base, not of the peak
import safetensors  # noqa: F401
import yaml  # noqa: F401

from harness.checkpoint import entries, open_checkpoint
from harness.checkpoint.formats import torchfile
from harness.checkpoint.unpickling import opcodes, values
from harness.errors import CheckpointError

SECONDS = 60


def anonymous_nbytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else 0


def outcome(path: str) -> dict[str, object]:
    try:
        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config
            buffer = memoryview(bytearray(1 << 20))
            for tensor in checkpoint.tensors.values():
                for start in range(0, tensor.nbytes, 1 << 20):
                    tensor.read_into(start, buffer[: min(1 << 20, tensor.nbytes - start)])
        return {"tensors": len(checkpoint.tensors), "config": config is not None}
    except CheckpointError as error:
        return {"error": str(error)[:2000], "hint": (error.hint or "")[:2000]}
    except BaseException as error:
        return {"escaped": f"{type(error).__name__}: {error}"[:2000]}


def measured(path: str) -> dict[str, object]:
    base = anonymous_nbytes(os.getpid())
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.write(writer, json.dumps(outcome(path)).encode())
        os._exit(0)
    os.close(writer)
    peak, exited = 0, 0
    while not exited and time.monotonic() - started < SECONDS:
        peak = max(peak, anonymous_nbytes(pid) - base)
        exited, status, used = os.wait4(pid, os.WNOHANG)
        time.sleep(0.002)
    if not exited:
        os.kill(pid, 9)
        _, status, used = os.wait4(pid, 0)
    said = os.read(reader, 1 << 16) if status == 0 else b""
    os.close(reader)
    result = json.loads(said) if said else {"escaped": f"killed or crashed: status {status}"}
    return {"seconds": used.ru_utime + used.ru_stime, "peak_nbytes": peak, **result}


limit = int(sys.argv[1]) << 20
opcodes.unpickle = functools.partial(opcodes.unpickle, max_nbytes=limit)
torchfile.unpickle = opcodes.unpickle
entries._MAX_STEPS //= 16
values._MAX_NUMBERS //= 16
for name in sys.argv[2:]:
    sys.stdout.write(json.dumps({"name": Path(name).name, **measured(name)}) + "\n")
