"""What starting up may cost. What may import what is a contract in pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "harness"
HEAVY = {"torch", "pytorch_lightning", "lightning", "omegaconf"}
# Only for URLs.
REMOTE = {"fsspec", "aiohttp"}
# Only where something differs, where a folder is opened, and where a report is asked for.
NOT_TO_PASS = {
    *(
        "harness.comparison.allclose",
        "harness.comparison.difference",
        "harness.report.json",
        "harness.report.files",
    ),
    *(
        "harness.checkpoint.formats.dcp",
        "harness.checkpoint.formats.rankshards",
        "harness.checkpoint.formats.sharded",
    ),
    *("tempfile", "difflib"),
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["show", "golden/nest_tiny.safetensors"],
        ["show", "tests/data/lightning_two_ranks.ckpt"],
        ["diff", "tests/data/nest_tiny.nemo", "tests/data/nest_tiny.ckpt"],
        ["verify", "tests/data/nest_tiny.nemo", "-g", "golden/nest_tiny.safetensors"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_on_files_import_neither_the_live_side_nor_what_urls_take(
    arguments: list[str],
) -> None:
    assert loaded(HEAVY | REMOTE, *arguments) == "[]"


def test_a_verify_that_passes_imports_only_what_it_takes() -> None:
    assert loaded(NOT_TO_PASS, "verify", "tests/data/nest_tiny.nemo") == "[]"


def loaded(modules: set[str], *arguments: str) -> str:
    """Which of the modules a command has imported when it ends."""
    program = (
        "import sys\n"
        f"sys.argv = ['harness', *{arguments!r}]\n"
        "from harness.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', sorted(set(sys.modules) & {modules!r}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return run.stdout.splitlines()[-1].removeprefix("LOADED ")


def test_numpy_waits_until_the_command_line_holds_openblas_to_one_thread() -> None:
    program = "import sys, harness.cli; print('numpy' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


def test_importing_the_package_imports_nothing_else() -> None:
    program = (
        "import sys, harness; print(sorted(m for m in sys.modules if m.startswith('harness')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "['harness']"


def test_each_module_has_a_test_file_of_its_name_or_the_folder_says_which_tests_it() -> None:
    tests = Path(__file__).parent
    for module in sorted(PACKAGE.rglob("*.py")):
        place = module.relative_to(PACKAGE)
        if place.stem.startswith("__") or (tests / place.with_name(f"test_{place.name}")).exists():
            continue
        folder = tests / place.parent
        name = place.stem
        if not folder.exists():
            folder, name = tests, ".".join(place.with_suffix("").parts)
        said = re.search(
            rf"^# {name}: ([^:\n]+)", (folder / "__init__.py").read_text(), re.MULTILINE
        )
        assert said is not None, place
        for file in said[1].split(", "):
            assert (folder / f"{file}.py").exists() or (folder / file).is_dir(), (place, file)
