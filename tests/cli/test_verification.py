"""Many goldens at once: recorded by one command, verified by one, and one line for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness import api
from tests.conftest import Harness

FOLDERS = ("base", "tuned")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Six checkpoints in two folders, under the same names in both."""
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").touch()
    paths = [Path(folder) / f"ckpt{step}.safetensors" for folder in FOLDERS for step in (1, 2, 10)]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        save_file({"w": np.full(8, number, "f4"), "b": np.arange(3, dtype="f4")}, path)
    return paths


def change(path: Path) -> None:
    save_file({"w": np.full(8, 99, "f4"), "b": np.arange(3, dtype="f4")}, path)


def test_one_command_records_and_one_verifies_files_of_equal_names(
    runs: list[Path], harness: Harness
) -> None:
    run = harness("record", *runs)
    assert run.code == 0
    assert [line for line in run.out.splitlines() if line.startswith("next: ")] == [
        "next: harness verify"
    ]
    names = sorted(path.stem for path in Path("golden").iterdir())
    assert names == sorted(f"{folder}-ckpt{n}" for folder in FOLDERS for n in (1, 2, 10))
    run = harness("verify")
    assert run.code == 0
    lines = [line.split()[2] for line in run.out.splitlines() if line.startswith("ok")]
    assert lines == [f"golden/{f}-ckpt{n}.safetensors" for f in FOLDERS for n in (1, 2, 10)]
    assert run.out.endswith("\ntotal: 6 goldens: 6 identical\n")
    change(runs[4])
    run = harness("verify")
    assert run.code == 1
    assert run.out.count("FAIL different  golden/tuned-ckpt2.safetensors") == 1
    assert run.out.endswith("\ntotal: 6 goldens: 5 identical, 1 different\n")


def test_each_checkpoint_is_verified_with_the_golden_that_was_recorded_from_it(
    runs: list[Path], harness: Harness
) -> None:
    for path in runs:  # one by one: the second of a name takes its folder's into its own
        assert harness("record", path).code == 0
    assert harness("verify", *reversed(runs)).code == 0
    run = harness("verify", "tuned/*.safetensors")
    assert run.code == 0
    assert run.out.endswith("\ntotal: 3 goldens: 3 identical\n")
    change(runs[3])
    run = harness("verify", *runs)
    assert run.code == 1
    [accept] = [line for line in run.out.splitlines() if "intended" in line]
    assert accept.endswith(
        "harness verify tuned/ckpt1.safetensors -g golden/tuned-ckpt1.safetensors "
        '--update-golden --reason "why"'
    )
    assert harness("verify", runs[0], "nothing*.pt").code == 2


def test_an_update_from_another_file_says_so(runs: list[Path], harness: Harness) -> None:
    harness("record", runs[0], "-g", "g.safetensors")
    update = ("-g", "g.safetensors", "--update-golden")
    assert "\n  source base/ckpt1.safetensors is now base/ckpt2.safetensors\n" in (
        harness("verify", runs[1], *update).out
    )
    change(runs[1])
    assert "source" not in harness("verify", runs[1], *update).out


def test_what_must_change_and_does_not_is_nothing_to_update(
    runs: list[Path], harness: Harness
) -> None:
    harness("record", runs[0])
    run = harness("verify", runs[0], "--must-change", "w")
    assert run.code == 1
    assert run.out.endswith(
        "\n  what --must-change names did not change: change it, or leave out --must-change\n"
    )


def test_a_folder_given_for_goldens_is_that_of_all(runs: list[Path], harness: Harness) -> None:
    assert harness("record", *runs, "-g", "kept/here").code == 0
    assert harness("verify", "-g", "kept").out.endswith("total: 6 goldens: 6 identical\n")
    assert harness("verify", *runs, "-g", "kept/here").code == 0
    one = "kept/here/base-ckpt1.safetensors"
    for command in ("record", "verify"):
        run = harness(command, *runs, "-g", one)
        assert run.code == 2
        assert f"-g {one}: one golden for 6 checkpoints" in run.err


def test_what_cannot_be_recorded_does_not_keep_the_others_from_it(
    runs: list[Path], harness: Harness
) -> None:
    runs[1].write_bytes(b"")
    run = harness("record", *runs)
    assert run.code == 2
    assert run.err.count("error:") == 1
    assert run.out.count("recorded golden/") == 5


def test_goldens_of_tests_are_counted_and_left_to_them(runs: list[Path], harness: Harness) -> None:
    api.record(runs[0], "golden/tests/test_net/test_it.safetensors")
    run = harness("verify")
    assert (run.code, run.out) == (0, "")
    assert run.err == "note: 1 golden belongs to tests, which verify what they make: pytest\n"


def test_an_update_of_many_says_which_it_replaced(runs: list[Path], harness: Harness) -> None:
    assert harness("record", *runs).code == 0
    change(runs[0])
    change(runs[5])
    run = harness("verify", "--update-golden", "--reason", "retrained")
    assert run.code == 0
    assert run.out.endswith(
        "\ntotal: 6 goldens: 4 identical, 2 updated\nreplaced 2 of 6: "
        "golden/base-ckpt1.safetensors, golden/tuned-ckpt10.safetensors\n"
    )


def test_a_reason_that_comes_later_is_added_to_the_last_entry(
    runs: list[Path], harness: Harness
) -> None:
    golden = api.record(runs[0]).path
    change(runs[0])
    update = ("verify", runs[0], "--update-golden")
    assert harness(*update).code == 0
    for _ in range(2):
        assert harness(*update, "--reason", "retrained").code == 0
        assert [entry.reason for entry in api.read_golden(golden).history] == ["retrained"]
    assert harness(*update, "--reason", "see #12").code == 0
    assert [entry.reason for entry in api.read_golden(golden).history] == ["retrained; see #12"]


def test_a_checkpoint_outside_of_the_project_is_found_below_a_root(
    runs: list[Path], harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("project").mkdir()
    Path("project/pyproject.toml").touch()
    monkeypatch.chdir("project")
    there = f"../{runs[0]}"
    run = harness("record", there)
    assert "is outside of the golden's project (.): give its path to verify" in run.out
    assert harness("verify").code == 2
    assert harness("record", there, "--root", "..", "--overwrite").code == 0
    assert harness("verify").code == 2
    assert harness("verify", "--root", "..").code == 0
