"""scripts/bench_peers.py: what was not read is not timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

PEERS = REPOSITORY / "scripts" / "bench_peers.py"


def test_a_peer_that_fails_on_a_thread_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a folder with one can be opened, and has a size; it is not read
    run = subprocess.run([sys.executable, PEERS, "read", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.endswith("IsADirectoryError: [Errno 21] Is a directory\n")
