"""The core alone: what works on files where the packages of the extra `live` are not installed.

`scripts/wheel` runs this file where they truly are not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

# What sys.modules holds None for is to Python not installed.
WITHOUT_LIVE_SIDE = """
import contextlib, io, json, sys
for name in ("torch", "pytorch_lightning", "lightning", "omegaconf"):
    sys.modules[name] = None
"""
COMMANDS = f"""{WITHOUT_LIVE_SIDE}
from harness.cli import main
runs = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stopped:
            runs.append((stopped.code, out.getvalue(), err.getvalue()))
print(json.dumps(runs))
"""
PYTEST = f"{WITHOUT_LIVE_SIDE}import pytest; sys.exit(pytest.main())"
HINT = "next: pip install 'checkpoint-harness[live]'"


@pytest.fixture
def project(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and a changed one, where a checkout is imported from as well."""
    shutil.copy(data / "nest_tiny.nemo", tmp_path / "nest.nemo")
    shutil.copy(data / "nest_tiny_perturbed_1e-3.nemo", tmp_path / "changed.nemo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path


def python(program: str, *arguments: str) -> Run:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    return Run(done.returncode, done.stdout, done.stderr)


def harness(*commands: str) -> list[Run]:
    """Run commands one after the other, in one process without the live side."""
    done = python(COMMANDS, json.dumps([command.split() for command in commands]))
    assert done.code == 0, done.err
    return [Run(*run) for run in done.json]


def test_files_are_recorded_verified_compared_shown_and_reported(project: Path) -> None:
    reports = [project / f"report.{suffix}" for suffix in ("html", "md", "xml", "json")]
    asked = " ".join(f"--report {report.name}" for report in reports)
    runs = harness(
        "record nest.nemo",
        "verify nest.nemo",
        f"verify changed.nemo -g golden/nest.safetensors {asked}",
        "diff nest.nemo changed.nemo",
        "show nest.nemo --stats",
    )
    assert [run.code for run in runs] == [0, 0, 1, 1, 0], runs
    assert all(report.stat().st_size for report in reports)


def test_the_plugin_verifies_files(project: Path) -> None:
    (project / "test_export.py").write_text(
        "def test_export(checkpoint_golden):\n    checkpoint_golden.verify('nest.nemo')\n"
    )
    options = ("-q", "-p", "harness.pytest_plugin")
    assert python(PYTEST, *options, "--golden-mode=create").code == 0
    shutil.copy("changed.nemo", "nest.nemo")
    failed = python(PYTEST, *options)
    assert failed.code == 1
    assert "FAIL different" in failed.out


def test_what_runs_a_model_says_what_to_install(project: Path) -> None:
    recorded, *runs = harness(
        "record nest.nemo",
        "verify nest.nemo --load",
        "verify nest.nemo --model torch.nn:Linear",
        "record nest.nemo --outputs -g other",
        "roundtrip nest.nemo",
    )
    assert recorded.code == 0
    for run in runs:
        assert run.code == 2
        error, hint = run.err.splitlines()
        assert "not installed: torch" in error
        assert hint.strip() == HINT


@pytest.mark.parametrize(
    "statement",
    [
        "import harness.nest",
        "from harness import GoldenCheckpoint",
        "import harness; harness.verify({'weight': 0}, 'golden')",
    ],
)
def test_python_says_so_too(project: Path, statement: str) -> None:
    done = python(f"{WITHOUT_LIVE_SIDE}{statement}")
    assert done.code == 1
    assert done.err.splitlines()[-1] == HINT
