"""What all tests share: the repository's own data, and the command line as a pipe sees it."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from harness.comparison.comparison import Comparison
    from harness.comparison.policy import Policy
    from tests.catalogue import Compared, State

pytest_plugins = ["pytester"]

# One process a core: more threads than that wait for one another in a loop, which costs more than
# the arithmetic. Said before numpy and torch are imported, and to the processes that tests start.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

os.fsync = lambda fd: None  # what a test writes need not outlive the machine

# By what is started once for them, which costs seconds: the files that use it.
BESIDE = {
    "browser": ("tests/report_html/test_html_",),
    "ranks": (
        "tests/model/distributed/test_launched.py",
        "tests/model/distributed/test_sharded.py",
        "tests/checkpoint/formats/test_dcp.py",
        "tests/callbacks/test_lightning.py",
    ),
}
REPOSITORY = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("hypothesispytest"):
        return  # where the pages are tested alone
    from hypothesis import settings

    # A machine that many share may stop a test for longer than any deadline. The same examples in
    # every run; others, and more of them, by hand: --hypothesis-profile search.
    settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
    settings.register_profile("search", deadline=None, max_examples=1000)
    settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """A file at a time, as loadfile does; what shares a process beside the tests is one file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((name for name, files in BESIDE.items() if file.startswith(files)), file)

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported for the tests lives as long as they do: nobody looks for garbage in it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


class Run(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Harness = Callable[..., Run]


def on_terminal(arguments: list[str], *, cwd: Path, columns: int = 80, **env: str) -> str:
    """Run the command with a terminal as its output, and return what it would show."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments],
        stdout=follower,
        stderr=follower,
        cwd=cwd,
        env={**inherited, "TERM": "xterm-256color", "PYTHONUTF8": "1", **env},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    process.wait()
    os.close(leader)
    return shown.decode()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the checkpoints that NeMo wrote."""
    return REPOSITORY / "tests" / "data"


@pytest.fixture(scope="session")
def shipped_golden() -> Path:
    """The golden that the repository ships, of data / "nest_tiny.nemo"."""
    return REPOSITORY / "golden" / "nest_tiny.safetensors"


@pytest.fixture
def harness(capsys: pytest.CaptureFixture[str]) -> Harness:
    """Run the command line in this process; returns its exit code and what it printed."""
    from harness.cli import main

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Run(int(stopped.value.code or 0), out, err)

    return run


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    """Record a state dict, and verify another under a policy."""
    import torch

    from harness import api
    from tests.catalogue import state

    def run(
        actual: State, policy: Policy | None = None, *, expected: State | None = None
    ) -> Comparison:
        torch.save(expected or state(), tmp_path / "expected.pt")
        torch.save(actual, tmp_path / "actual.pt")
        golden = api.record(tmp_path / "expected.pt", tmp_path / "golden", overwrite=True)
        return api.verify(tmp_path / "actual.pt", golden, policy=policy)

    return run


@pytest.fixture
def without_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not asked what happened: to look for it takes as long again."""
    from harness.api import verifying

    monkeypatch.setattr(verifying, "with_causes", lambda comparison, *_, **__: comparison)
