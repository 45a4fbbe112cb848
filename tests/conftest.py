"""What all tests share: the repository's own data, and the command line as a pipe sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPOSITORY = Path(__file__).parent.parent


class Run(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the checkpoints that NeMo wrote."""
    return REPOSITORY / "tests" / "data"


@pytest.fixture(scope="session")
def shipped_golden() -> Path:
    """The golden that the repository ships, of data / "nest_tiny.nemo"."""
    return REPOSITORY / "golden" / "nest_tiny.safetensors"


@pytest.fixture
def harness(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run the command line in this process; returns its exit code and what it printed."""
    from harness.cli import main

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Run(int(stopped.value.code or 0), out, err)

    return run
