"""The README's blocks, run as a user would in a folder with a checkpoint and its golden."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(*languages: str) -> list[Block]:
    found = [
        Block(match[1], match[2], README.count("\n", 0, match.start()) + 1)
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if block.language in languages]


def line_of(block: Block) -> str:
    return f"line {block.line}"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's repository: `nest.nemo` with its golden, and what the examples name."""
    monkeypatch.chdir(tmp_path)
    # The commands of the environment that runs the tests, be it a checkout's or a wheel's.
    bin_folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", bin_folder + os.pathsep + os.environ["PATH"])
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    shutil.copytree(REPOSITORY / "golden", "golden")
    shutil.copytree(REPOSITORY / "tests" / "data", "tests/data")
    shutil.copy("tests/data/nest_tiny.nemo", "nest.nemo")
    run("git init -q . && harness record nest.nemo")
    return tmp_path


def run(script: str, *, expected: int = 0) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("block", blocks("console"), ids=line_of)
def test_the_examples_print_what_the_readme_shows(project: Path, block: Block) -> None:
    Path("golden/nest.safetensors").unlink()
    command, _, shown = block.text.removeprefix("$ ").partition("\n")
    printed = run(command, expected="FAIL" in shown)
    assert lines_of(printed) == lines_of(shown)


def lines_of(text: str) -> list[str]:
    """Lines without what depends on the processor: the last bits of outputs."""
    return [
        re.sub(r"^ok (identical|close)(.*  outputs: ).*", r"ok\2", line.rstrip())
        for line in text.splitlines()
    ]


@pytest.mark.parametrize("block", blocks("yaml"), ids=line_of)
def test_the_jobs_and_hooks_run(project: Path, block: Block) -> None:
    config = yaml.safe_load(block.text)
    steps = [
        s["run"] for job in config.get("jobs", {}).values() for s in job["steps"] if "run" in s
    ]
    hooks = [hook for repo in config.get("repos", []) for hook in repo["hooks"]]
    commands = [step for step in steps if not step.startswith("pip install")]
    commands += [hook["entry"] for hook in hooks]
    assert commands
    for command in commands:
        assert shlex.split(command)[0] in ("harness", "pytest")
        assert "identical" in run(command)
    assert all(re.search(hook["files"], "models/nest.nemo") for hook in hooks)
    assert all(re.search(hook["files"], "golden/nest.safetensors") for hook in hooks)


@pytest.mark.parametrize("block", blocks("sh"), ids=line_of)
def test_the_shell_blocks_run(project: Path, block: Block) -> None:
    [tests] = [block for block in blocks("python") if "def test_" in block.text]
    Path("tests/test_net.py").write_text(tests.text)
    run(block.text)


@pytest.mark.parametrize("block", blocks("python"), ids=line_of)
def test_the_python_blocks_run(project: Path, block: Block) -> None:
    Path("golden/nest.safetensors").unlink()
    Path("block.py").write_text(block.text)
    run(f"{shlex.quote(sys.executable)} block.py")


def test_git_shows_which_tensors_of_a_golden_changed(project: Path) -> None:
    [setup] = [block for block in blocks("sh") if "textconv" in block.text]
    run(setup.text)
    run("git add -A && git -c user.name=a -c user.email=a@example.org commit -qm goldens")
    update = "harness verify tests/data/nest_tiny_perturbed_1e-3.nemo -g golden/nest.safetensors"
    run(f"{update} --update-golden --reason 'a try'", expected=0)
    shown = run("git diff golden/")
    changed = [line for line in shown.splitlines() if re.match(r"[-+][a-z]", line)]
    assert sum("encoder.layers.1.feed_forward1.linear2.weight" in line for line in changed) == 2
    assert any("a try" in line for line in changed)
