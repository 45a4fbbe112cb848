"""The command line on several ranks: what it prints, writes and ends with, and who may fail."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Run
from tests.model.distributed.ranks import free_port, run_ranks

Harness = Callable[..., Run]
SOON = 10.0  # within which all end; they would wait a day


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with a tensor of four chunks and many small ones: one, and two changed."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "pyproject.toml").touch()
    random = np.random.default_rng(0)
    state = {"large": random.standard_normal((1024, 3300)).astype("<f4")}
    for index in range(100):
        state[f"layers.{index}.weight"] = random.standard_normal((50, 101)).astype("<f2")
        state[f"layers.{index}.bias"] = random.standard_normal(50).astype("<f4")
    state["tokens"] = random.integers(0, 9, 600_000)
    write(state, folder / "model.pt")
    state["large"][3, 7] += 1
    state["tokens"][-1] = 11
    write(state, folder / "changed.pt")
    state["large"] += random.standard_normal((1024, 3300)).astype("<f4") * np.float32(1e-5)
    write(state, folder / "noisy.pt")
    return folder


def write(state: dict[str, Any], path: Path) -> None:
    torch.save({key: torch.from_numpy(array) for key, array in state.items()}, path)


@pytest.fixture
def golden(files: Path, monkeypatch: pytest.MonkeyPatch, harness: Harness) -> str:
    """The golden of model.pt, by one process; relative to the current folder."""
    monkeypatch.chdir(files)
    path = "golden/model.safetensors"
    if not Path(path).exists():
        assert harness("record", "model.pt").code == 0
    return path


def command(*arguments: str) -> Run:
    """One command on one rank."""
    from harness.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(arguments)
    return Run(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@contextmanager
def in_each_chunk(do: Callable[[], object]) -> Iterator[None]:
    """Something happens in the middle of reading."""
    scan: Any = import_module("harness.fingerprints.scan")
    honest = scan._scan_chunk

    def scan_chunk(item: Any, chunk: Any) -> Any:
        do()
        return honest(item, chunk)

    scan_chunk.__module__, scan_chunk.__qualname__ = honest.__module__, honest.__qualname__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_scan_chunk", scan_chunk)
        yield


def fail() -> None:
    raise ZeroDivisionError("made up")


def once(number: int) -> Callable[[], None]:
    """A signal to this process, the first time."""
    sent: list[int] = []

    def send() -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return send


@contextmanager
def finding_other(path: str) -> Iterator[None]:
    """Another file stands in the place of any."""
    from harness.checkpoint.sources.files import FileSource
    from harness.checkpoint.sources.source import reopened

    honest = FileSource.__init__
    reopened.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSource, "__init__", lambda self, _: honest(self, Path(path)))
        yield
    reopened.cache_clear()


VERIFY = ("verify", "model.pt")
PLAIN = [
    ("record", "model.pt", "-g", "golden/by_ranks.safetensors", "--jobs", "2"),
    VERIFY,
    ("verify", "changed.pt", "-g", "golden/model.safetensors"),
    ("verify", "noisy.pt", "-g", "golden/model.safetensors", "--format", "json"),
    ("verify", "noisy.pt", "-g", "golden/model.safetensors", "--reference", "model.pt"),
    ("diff", "model.pt", "noisy.pt"),
    ("diff", "model.pt", "golden/model.safetensors"),
    ("show", "model.pt", "--json"),
    ("verify", "absent.pt"),
    ("verify", "model.pt", "--ignore", "absent"),
    ("verify", "model.pt", "--bogus"),
]
SECRET = ("verify", "https://me:pass-{}@host/model.pt?sig=secret-{}", "--atol", "1")


def session(ports: list[int]) -> list[Run]:
    """What a rank does: many commands, of which some fail on it."""
    rank, at = int(os.environ["RANK"]), iter(ports)

    def run(*arguments: str) -> Run:
        os.environ["MASTER_PORT"] = str(next(at))
        return command(*arguments)

    ended = [run(*arguments) for arguments in PLAIN]
    ended.append(run(*VERIFY if rank != 1 else ("verify", "noisy.pt")))
    ended.append(run(*(word.format(rank, rank) for word in SECRET)))
    for failing, do in (
        (1, in_each_chunk(fail)),
        (1, finding_other("pyproject.toml")),
        (1, finding_other("gone.pt")),
        (0, in_each_chunk(once(signal.SIGINT))),
        (0, in_each_chunk(once(signal.SIGTERM))),
    ):
        if rank == failing:
            with do:
                ended.append(run(*VERIFY))
        else:
            ended.append(run(*VERIFY))
    return ended


def test_rank_0_prints_what_one_process_prints_and_all_end_alike(
    golden: str, tmp_path: Path, harness: Harness
) -> None:
    ports = [free_port() for _ in range(len(PLAIN) + 7)]
    ranks = run_ranks(3, session, ports, folder=tmp_path)
    assert [rank.code for rank in ranks] == [0, 0, 0], [rank.err for rank in ranks]
    for arguments, *runs in zip(PLAIN, *(rank.value for rank in ranks), strict=False):
        alone = harness(*arguments, "--overwrite") if arguments[0] == "record" else None
        assert runs[0] == (alone or harness(*arguments)), arguments
        assert runs[1:] == [Run(0, "", "")] * 2, arguments
    one, other = (Path(f"golden/{name}.safetensors").read_bytes() for name in ("model", "by_ranks"))
    assert one == other

    by_rank = [rank.value[len(PLAIN) :] for rank in ranks]
    others, secrets, crash, replaced, gone, interrupted, terminated = by_rank[0]
    assert by_rank[1][:-1] == by_rank[2][:-1] == [Run(0, "", "")] * 6
    for failed in (others, secrets, crash, replaced, gone, terminated):
        assert (failed.code, failed.out) == (2, "")
    assert others.err.startswith("error: rank 1 runs `harness verify noisy.pt` of version ")
    assert "rank 0 `harness verify https://host/model.pt --atol 1` of version " in secrets.err
    assert "pass-" not in secrets.err
    assert "secret-" not in secrets.err
    assert crash.err == (
        "error: rank 1: ZeroDivisionError: made up\n  next: run with one rank for a traceback\n"
    )
    assert "pyproject.toml: was replaced, or is another file here: has 0 bytes, mod" in replaced.err
    assert gone.err.startswith("error: rank 1: gone.pt: cannot be opened: No such file")
    assert (interrupted.code, interrupted.out, interrupted.err.strip()) == (130, "", "interrupted")
    assert terminated.err.startswith("error: ended by SIGTERM, which torchrun sends when another")
    for rank in (1, 2):
        lost = by_rank[rank][-1]
        assert (lost.code, lost.out) == (2, "")
        assert lost.err.startswith(f"error: rank {rank} of 3 lost another rank: ")


def killed(victim: int) -> None:
    """What a rank does when one of them is killed in the middle of reading."""
    from harness.cli import main

    if os.environ["RANK"] == str(victim):
        with in_each_chunk(once(signal.SIGKILL)):
            main(VERIFY)
    main(VERIFY)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_all_others_with_2(
    golden: str, victim: int, tmp_path: Path
) -> None:
    ranks = run_ranks(3, killed, victim, folder=tmp_path)
    assert ranks[victim].code == -signal.SIGKILL
    for number, rank in enumerate(ranks):
        if number != victim:
            assert (rank.code, rank.out) == (2, "")
            first, second = rank.err.splitlines()
            assert first.startswith(f"error: rank {number} of 3 lost another rank: ")
            assert second == (
                "  next: see what the other ranks printed last, and whether one ran out of memory"
            )
            assert rank.ended - ranks[victim].ended < SOON


def come_early(*arguments: str) -> Run:
    from harness.model.distributed import group

    group.ARRIVAL = timedelta(seconds=1)
    return command(*arguments)


def test_a_rank_that_nobody_joins_gives_up(golden: str, tmp_path: Path) -> None:
    (alone,) = run_ranks(2, come_early, *VERIFY, only=[0], folder=tmp_path)
    assert alone.value.code == 2
    assert "error: the 2 ranks cannot connect at 127.0.0.1:" in alone.value.err
    assert alone.value.err.endswith("MASTER_PORT; unset WORLD_SIZE to run alone\n")


def test_torchrun_shows_the_report_once_and_ends_with_1(golden: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    report = tmp_path / "report.json"
    run = subprocess.run(
        [*torchrun, "-m", "harness", "verify", "changed.pt", "-g", golden, "--report", report],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stdout.count("FAIL different") == 1
    assert run.stdout.count("[3, 7]") == 1
    assert json.loads(report.read_text())["exit_code"] == 1
    assert run.stderr.count("exitcode  : 1") == 1  # of the ranks, only the first fails
