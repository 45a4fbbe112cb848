"""The command line on several ranks: what it prints, writes and ends with, and who may fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Run
from tests.model.distributed.ranks import run_ranks

Harness = Callable[..., Run]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with a tensor of six chunks and many small ones: two alike, two changed."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "pyproject.toml").touch()
    random = np.random.default_rng(0)
    state = {"large": random.standard_normal((1536, 4096)).astype("<f4")}
    for index in range(300):
        state[f"layers.{index}.weight"] = random.standard_normal((50, 101)).astype("<f2")
        state[f"layers.{index}.bias"] = random.standard_normal(50).astype("<f4")
    state["tokens"] = random.integers(0, 9, 1_500_000)
    write(state, folder / "model.pt")
    state["large"][3, 7] += 1
    state["tokens"][-1] = 11
    write(state, folder / "changed.pt")
    state["large"] += random.standard_normal((1536, 4096)).astype("<f4") * np.float32(1e-5)
    write(state, folder / "noisy.pt")
    return folder


def write(state: dict[str, Any], path: Path) -> None:
    torch.save({key: torch.from_numpy(array) for key, array in state.items()}, path)


@pytest.fixture
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    return files


@pytest.fixture
def golden(here: Path, harness: Harness) -> Path:
    """The golden of model.pt, by one process."""
    path = Path("golden/model.safetensors")
    if not path.exists():
        assert harness("record", "model.pt").code == 0
    return path


def command(*arguments: str) -> None:
    """What a rank does: the command line."""
    from harness.cli.commands import main

    main(arguments)


@pytest.mark.parametrize("size", [2, 3])
def test_the_golden_has_the_same_bytes(golden: Path, tmp_path: Path, size: int) -> None:
    other = golden.with_stem(f"by_{size}_ranks")
    arguments = ("record", "model.pt", "-g", str(other), "--jobs", str(size - 1))
    first, *rest = run_ranks(size, command, *arguments, folder=tmp_path / "run")
    assert first.code == 0, first.err
    assert first.out.startswith(f"recorded {other}: 602 tensors of model.pt")
    assert [(rank.code, rank.out, rank.err) for rank in rest] == [(0, "", "")] * (size - 1)
    assert other.read_bytes() == golden.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "model.pt"),
        ("verify", "changed.pt", "-g", "golden/model.safetensors"),
        ("verify", "noisy.pt", "-g", "golden/model.safetensors", "--format", "json"),
        ("verify", "noisy.pt", "-g", "golden/model.safetensors", "--reference", "model.pt"),
        ("diff", "model.pt", "noisy.pt"),
        ("diff", "model.pt", "golden/model.safetensors"),
        ("show", "model.pt", "--json"),
        ("verify", "absent.pt"),
        ("verify", "model.pt", "--ignore", "absent"),
    ],
    ids=" ".join,
)
def test_a_command_prints_what_one_process_prints(
    golden: Path, arguments: tuple[str, ...], tmp_path: Path, harness: Harness
) -> None:
    first, second = run_ranks(2, command, *arguments, folder=tmp_path / "run")
    assert Run(first.code, first.out, first.err) == harness(*arguments)
    assert Run(second.code, second.out, second.err) == Run(0, "", "")


def test_live_stages_run_on_the_first_rank(
    data: Path, shipped_golden: Path, tmp_path: Path, harness: Harness
) -> None:
    arguments = ("verify", str(data / "nest_tiny.nemo"), "-g", str(shipped_golden), "--load")
    first, second = run_ranks(2, command, *arguments, folder=tmp_path / "run")
    assert Run(first.code, first.out, first.err) == harness(*arguments)
    assert Run(second.code, second.out, second.err) == Run(0, "", "")


# Ranks that fail. The others must end at once: within seconds, not the day that they may wait.

SOON = 5.0


def misbehave(how: str, victim: int | None, *arguments: str) -> None:
    """The command line, but one rank, or each, fails in the middle of reading."""
    fingerprint: Any = import_module("harness.fingerprints.scan")
    honest = fingerprint._scan_chunk
    is_victim = victim is None or os.environ["RANK"] == str(victim)

    def scan(item: Any, chunk: Any) -> Any:
        if is_victim and how.startswith("SIG"):
            time.sleep(0.2)  # all have work by then
            os.kill(os.getpid(), getattr(signal, how))
        elif is_victim:
            raise ZeroDivisionError("made up")
        return honest(item, chunk)

    scan.__module__, scan.__qualname__ = honest.__module__, honest.__qualname__
    fingerprint._scan_chunk = scan
    command(*arguments)


def test_a_rank_that_is_killed_ends_all_with_one_error(golden: Path, tmp_path: Path) -> None:
    arguments = ("SIGKILL", 1, "verify", "model.pt")
    first, victim, third = run_ranks(3, misbehave, *arguments, folder=tmp_path / "run")
    assert victim.code == -signal.SIGKILL
    assert Run(first.code, first.out, first.err) == Run(
        2,
        "",
        "error: rank 1 of 3 has died\n"
        "  next: see what rank 1 printed last, and whether it ran out of memory\n",
    )
    assert Run(third.code, third.out, third.err) == Run(0, "", "")
    assert max(first.ended, third.ended) - victim.ended < SOON


def test_when_the_first_rank_is_killed_the_others_say_so(golden: Path, tmp_path: Path) -> None:
    arguments = ("SIGKILL", 0, "verify", "model.pt")
    victim, *others = run_ranks(3, misbehave, *arguments, folder=tmp_path / "run")
    assert victim.code == -signal.SIGKILL
    for rank in others:
        assert (rank.code, rank.out) == (2, "")
        assert rank.err.startswith("error: rank 0 of 3 has died\n")
        assert rank.ended - victim.ended < SOON


def test_what_is_raised_on_another_rank_is_the_error_of_the_run(
    golden: Path, tmp_path: Path
) -> None:
    arguments = ("ZeroDivisionError", 1, "verify", "model.pt")
    first, second = run_ranks(2, misbehave, *arguments, folder=tmp_path / "run")
    assert Run(first.code, first.out, first.err) == Run(
        2,
        "",
        "error: rank 1: ZeroDivisionError: made up\n  next: run with one rank for a traceback\n",
    )
    assert Run(second.code, second.out, second.err) == Run(0, "", "")


def test_sigterm_as_torchrun_sends_it_is_told_as_an_error(golden: Path, tmp_path: Path) -> None:
    arguments = ("SIGTERM", 0, "verify", "model.pt", "--format", "json")
    first, second = run_ranks(2, misbehave, *arguments, folder=tmp_path / "run")
    assert (first.code, second.code) == (2, 0)
    found = json.loads(first.out)["goldens"][0]["error"]["message"]
    assert found == "ended by SIGTERM, which torchrun sends when another rank has failed"


def test_an_interrupt_ends_all_ranks(golden: Path, tmp_path: Path) -> None:
    arguments = ("SIGINT", None, "verify", "model.pt")  # as a terminal sends it
    first, second = run_ranks(2, misbehave, *arguments, folder=tmp_path / "run")
    assert (first.code, first.out, first.err.strip()) == (130, "", "interrupted")
    assert Run(second.code, second.out, second.err) == Run(0, "", "")


def see_other(path: str, *arguments: str) -> None:
    """The command line, but the second rank finds another file in the place of any."""
    from harness.model.distributed import team

    if os.environ["RANK"] == "1":
        honest = team._files.open
        team._files.open = lambda _: honest(Path(path))  # type: ignore[method-assign]
    command(*arguments)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("pyproject.toml", "0 bytes, modified at "),
        ("gone.pt", "rank 1: gone.pt: cannot be opened: No such file or directory"),
    ],
)
def test_a_file_that_another_rank_sees_otherwise_is_an_error(
    golden: Path, other: str, message: str, tmp_path: Path
) -> None:
    arguments = (other, "verify", "model.pt")
    first, second = run_ranks(2, see_other, *arguments, folder=tmp_path / "run")
    assert (first.code, first.out) == (2, "")
    assert first.err.startswith("error: rank 1: ")
    assert message in first.err
    assert Run(second.code, second.out, second.err) == Run(0, "", "")


def come_with(own: dict[str, list[str]]) -> None:
    command(*own[os.environ["RANK"]])


def test_ranks_with_different_commands_are_refused(golden: Path, tmp_path: Path) -> None:
    own = {"0": ["verify", "model.pt"], "1": ["verify", "noisy.pt"], "2": ["verify", "model.pt"]}
    first, *others = run_ranks(3, come_with, own, folder=tmp_path / "run")
    assert first.code == 2
    assert first.err.startswith("error: rank 1 runs `harness verify noisy.pt` of version ")
    assert [(rank.code, rank.err) for rank in others] == [(0, ""), (0, "")]


def test_ranks_with_different_commands_keep_the_secrets_of_their_urls(tmp_path: Path) -> None:
    own = {
        "0": ["verify", "https://me:pass-0@host/model.pt?sig=secret-0", "--atol", "1"],
        "1": ["verify", "https://me:pass-1@host/model.pt?sig=secret-1", "--atol", "1"],
    }
    first, _ = run_ranks(2, come_with, own, folder=tmp_path / "run")
    command = "`harness verify https://host/model.pt --atol 1` of version "
    assert first.code == 2
    assert first.err.startswith(f"error: rank 1 runs {command}")
    assert f"rank 0 {command}" in first.err
    assert "pass-" not in first.err + first.out
    assert "secret-" not in first.err + first.out


def come_early(*arguments: str) -> None:
    from harness.model.distributed import launched

    launched.ARRIVAL = timedelta(seconds=2)
    command(*arguments)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_gives_up(golden: Path, tmp_path: Path, rank: int) -> None:
    arguments = ("verify", "model.pt")
    (alone,) = run_ranks(2, come_early, *arguments, only=[rank], folder=tmp_path / "run")
    assert alone.code == 2
    assert "error: the 2 ranks cannot meet at 127.0.0.1:" in alone.err
    assert alone.err.endswith("MASTER_PORT; unset WORLD_SIZE to run alone\n")


def test_torchrun_shows_the_report_once_and_ends_with_1(golden: Path, tmp_path: Path) -> None:
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
