"""The blocks of every page, run as a user would in a folder with a checkpoint and its golden.

Fenced blocks in console, sh, python and yaml run; what is indented, or is in another language, is
for the eye. `scripts/wheel` runs this file with the built wheel.
"""

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
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / ".github" / "CONTRIBUTING.md",
    REPOSITORY / "scripts" / "README.md",
    *sorted((REPOSITORY / "harness").rglob("*.md")),
]
# By the first word of a report, as the command line's exit codes.
EXIT_CODES = {"FAIL": 1, "error:": 2, "undecided": 3}


class Block(NamedTuple):
    page: Path
    language: str
    text: str
    line: int


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(page, match[1], match[2], line))
    return found


def place_of(block: Block) -> str:
    return f"{block.page.relative_to(REPOSITORY)}:{block.line}"


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
    """Run a script of the shell; returns what it prints."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == expected, f"{script}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("block", blocks("console"), ids=place_of)
def test_the_commands_print_what_the_page_shows(project: Path, block: Block) -> None:
    Path("golden/nest.safetensors").unlink()
    for step in block.text.removeprefix("$ ").split("\n$ "):
        command, _, shown = step.partition("\n")
        said = shown.split(maxsplit=1)[0] if shown.strip() else ""
        piped = " | " in command
        printed = run(command, expected=0 if piped else EXIT_CODES.get(said, 0))
        assert lines_of(printed) == lines_of(shown)


def lines_of(text: str) -> list[str]:
    """Lines without what depends on the processor and its threads: the last bits of outputs."""
    text = re.sub(r"^(ok close .*  outputs: .*)(\n( .*)?$)*", r"\1", text, flags=re.MULTILINE)
    return [
        re.sub(r"^ok (identical|close)(.*  outputs: ).*", r"ok\2", line.rstrip())
        for line in text.rstrip().splitlines()
    ]


@pytest.mark.parametrize("block", blocks("yaml"), ids=place_of)
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


@pytest.mark.parametrize("block", blocks("sh"), ids=place_of)
def test_the_shell_blocks_run(project: Path, block: Block) -> None:
    for other in blocks("python"):
        if other.page == block.page and "def test_" in other.text:
            Path("tests/test_net.py").write_text(other.text)
    run(block.text)


@pytest.mark.parametrize("block", blocks("python"), ids=place_of)
def test_the_python_blocks_run(project: Path, block: Block) -> None:
    Path("golden/nest.safetensors").unlink()
    if "def test_" in block.text:
        Path("tests/test_net.py").write_text(block.text)
        run("pytest -q --golden-mode=create")
    else:
        Path("block.py").write_text(block.text)
        run(f"{shlex.quote(sys.executable)} block.py")


def test_git_shows_which_tensors_of_a_golden_changed(project: Path) -> None:
    [setup] = [block for block in blocks("sh") if "textconv" in block.text]
    run(setup.text)
    run("git add -A && git -c user.name=a -c user.email=a@example.org commit -qm goldens")
    update = "harness verify tests/data/nest_tiny_perturbed_1e-3.nemo -g golden/nest.safetensors"
    run(f"{update} --update-golden --reason 'a try'", expected=0)
    shown = run("git diff golden/")
    changed = [line for line in shown.splitlines() if re.match(r"[-+][^-+]", line)]
    assert sum("encoder.layers.1.feed_forward1.linear2.weight" in line for line in changed) == 2
    assert any("a try" in line for line in changed)
