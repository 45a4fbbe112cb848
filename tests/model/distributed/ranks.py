"""Real ranks for tests: processes of one run of torch.distributed, forked from one that has torch.

A rank costs some tenths of a second that way, not the seconds of its imports.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("harness.cli.entry", "harness.api", "harness.report.json", "harness.comparison.words"),
        *("harness.model.distributed.group", "harness.model.distributed.sharded"),
        *("torch.distributed.fsdp", "torch._dynamo", "pytest", "hypothesis"),
        "pytorch_lightning",
    ]
)
# As torchrun sets it, before anything is imported.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


class Rank(NamedTuple):
    """How one rank ended: as a process does (negative for a signal), or with a value."""

    code: int
    value: Any
    out: str
    err: str
    ended: float


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    only: Sequence[int] | None = None,
    timeout: float = 120,
) -> list[Rank]:
    """Call `function(*arguments)` on every rank, with torchrun's variables; or on some ranks only.

    They run in the current folder; what they print goes through files in `folder`. A rank that does
    not end in time fails the test.
    """
    port, here = free_port(), Path.cwd()
    folder.mkdir(exist_ok=True)
    processes = {}
    for rank in range(size) if only is None else only:
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes[rank] = _context.Process(
            target=_be, args=(here, variables, folder / f"rank{rank}", function, arguments)
        )
        with patch.dict(os.environ, _ENVIRONMENT):
            processes[rank].start()
    deadline = time.monotonic() + timeout
    ended = {}
    while len(ended) < len(processes) and time.monotonic() < deadline:
        for rank, process in processes.items():
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.monotonic()
        time.sleep(0.01)
    hung = [rank for rank in processes if rank not in ended]
    for rank in hung:
        processes[rank].kill()
    texts = {
        rank: [Path(f"{folder / f'rank{rank}'}.{name}").read_text() for name in ("out", "err")]
        for rank in processes
    }
    assert not hung, f"ranks {hung} hang: {texts}"
    return [
        Rank(process.exitcode or 0, _value(folder / f"rank{rank}"), *texts[rank], ended[rank])
        for rank, process in processes.items()
    ]


def _value(place: Path) -> Any:
    file = Path(f"{place}.value")
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _be(
    here: Path,
    variables: dict[str, str],
    place: Path,
    function: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:
    os.chdir(here)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(d, "w", buffering=1) for d in (1, 2))
    code = 1
    try:
        value = function(*arguments)
        Path(f"{place}.value").write_bytes(pickle.dumps(value))
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
