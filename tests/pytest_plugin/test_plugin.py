"""The pytest plugin: its modes, what it prints, and what it leaves alone, with and without xdist.

The tests of the tests run in this process where they can; pytester then drops what they import, so
everything that must not be imported twice is imported here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import harness.comparison.comparison
import harness.model.stages
import harness.nest
from harness.api import record
from harness.comparison.policy import Policy
from harness.golden.file import read_golden, write_golden
from harness.pytest_plugin.plugin import PolicyKeywords
from harness.pytest_plugin.summary import golden_name

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
ONE_TEST = """
    def test_net(checkpoint_golden):
        checkpoint_golden.verify("net.safetensors")
"""
NET = "golden/test_it/test_net.safetensors"


class Project:
    """A project with a test module, `test_it.py`, and a checkpoint, `net.safetensors`."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        self.configure("")
        self.save(1.0)

    def configure(self, line: str) -> None:
        self.pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\n{line}")

    def save(self, value: float, name: str = "net.safetensors") -> None:
        """Write a checkpoint of two tensors, the values of one of them given."""
        bias = np.zeros(3, np.float32)
        save_file({"weight": np.full((2, 5), value, np.float32), "bias": bias}, self.path / name)

    def tests(self, source: str, name: str = "test_it") -> None:
        self.pytester.makepyfile(**{name: source})

    def run(self, *arguments: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess("-p", "no:hypothesispytest", *arguments)

    def follow(self, command: str) -> pytest.RunResult:
        """Run a command that was printed, as a shell would."""
        program, *arguments = shlex.split(command)
        assert program == "pytest"
        return self.run(*arguments)

    def record(self, golden: str, checkpoint: str = "net.safetensors") -> None:
        record(self.path / checkpoint, self.path / f"golden/{golden}.safetensors")

    def golden(self, name: str = NET) -> harness.golden.golden.Golden:
        return read_golden(self.path / name)

    @property
    def goldens(self) -> list[str]:
        return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("golden/**/*.*"))


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("CI", raising=False)  # with it, pytest shows failures in its summary again
    return Project(pytester)


def summary(run: pytest.RunResult) -> str | None:
    """What the run says of goldens, in one line."""
    lines = [line for line in run.outlines if line.startswith("checkpoint goldens: ")]
    return lines[0].removeprefix("checkpoint goldens: ") if lines else None


def failure(run: pytest.RunResult, test: str = ".*") -> list[str]:
    """The lines of a test's failure, without its heading and what xdist says of the worker."""
    text = run.stdout.str()
    assert "Traceback" not in text
    assert not re.search(r"harness/\w+\.py|raise |pytest\.fail|__tracebackhide__", text)
    start = next(i for i, line in enumerate(run.outlines) if re.match(rf"_+ .*{test} _+$", line))
    lines = run.outlines[start + 1 :]
    end = next(i for i, line in enumerate(lines) if re.match(r"[_=]|checkpoint goldens:", line))
    return [line for line in lines[:end] if not line.startswith("[gw")]


def command(run: pytest.RunResult) -> str:
    """The command that the last line of the first failure gives."""
    return failure(run)[-1].partition(":  ")[2] or failure(run)[-1].partition("next: ")[2]


def test_pytest_finds_the_plugin_by_itself(request: pytest.FixtureRequest) -> None:
    (entry,) = importlib.metadata.entry_points(group="pytest11", name="checkpoint_harness")
    assert entry.value == "checkpoint_harness_pytest"
    assert request.config.pluginmanager.has_plugin("checkpoint_harness")


def test_loading_the_plugin_costs_nothing() -> None:
    program = (
        "import hashlib, sys, pytest; before = set(sys.modules)\n"
        "import checkpoint_harness_pytest as _; print(sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    plugin = ("", ".plugin", ".summary")
    ours = [
        "checkpoint_harness_pytest",
        "harness",
        "harness.errors",
        *(f"harness.pytest_plugin{name}" for name in plugin),
    ]
    ours += ["harness.text", "harness.text.shell"]
    assert run.stdout.strip() == str(ours)


def test_a_package_of_the_project_that_hides_the_plugin_is_named_in_one_line(
    tmp_path: Path,
) -> None:
    hides = tmp_path / "harness" / "__init__.py"
    hides.parent.mkdir()
    hides.touch()
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = run.stderr.strip().splitlines()
    assert f"{hides} hides it: rename that package" in line
    without = shlex.split(line.rpartition(": pytest")[2])
    assert subprocess.run([*command, *without], cwd=tmp_path).returncode == 0


def test_the_keywords_are_the_fields_of_a_policy() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(Policy)}
    assert {k: v.__forward_arg__ for k, v in PolicyKeywords.__annotations__.items()} == fields


# The three modes.


def test_a_missing_golden_fails_and_names_the_command_that_creates_it(project: Project) -> None:
    project.tests(ONE_TEST)
    run = project.run()
    run.assert_outcomes(failed=1)
    assert failure(run) == [
        f"error: {NET}: no golden is recorded for this test",
        "  next: pytest test_it.py::test_net --golden-mode=create",
    ]
    assert summary(run) == "1 failed"
    assert project.goldens == []
    created = project.follow(command(run))
    created.assert_outcomes(passed=1)
    assert summary(created) == "1 created"
    assert project.goldens == [NET]
    assert project.golden().source == "../../net.safetensors"
    again = project.run()
    again.assert_outcomes(passed=1)
    assert summary(again) == "1 verified"


def test_a_difference_shows_the_report_and_the_command_that_accepts_it(project: Project) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create")
    before = project.golden().fingerprint.root.hex()
    project.save(1.5)
    run = project.run()
    run.assert_outcomes(failed=1)
    lines = failure(run)
    assert lines[:7] == [
        f"FAIL different  {NET}  file: 1 identical, 1 different",
        f"  expected  {NET} (safetensors)",
        "  actual    net.safetensors (safetensors)",
        "",
        "  different: allclose is false (1)",
        "    all 1.5",
        "      weight  float32 [2, 5]",
    ]
    assert lines[-1] == (
        "  if this change is intended:  pytest test_it.py::test_net --golden-mode=update "
        '--golden-reason "why"'
    )
    accepted = project.follow(command(run))
    accepted.assert_outcomes(passed=1)
    assert summary(accepted) == "1 updated"
    assert [(u.root, u.reason) for u in project.golden().history] == [(before, "why")]
    again = project.run()
    again.assert_outcomes(passed=1)
    assert summary(again) == "1 verified"


def test_no_mode_touches_what_passes_and_only_update_what_does_not(project: Project) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create")
    path = project.path / NET
    before = path.stat().st_mtime_ns, path.read_bytes()
    for value in (1.0, 1.000005):  # identical, and close
        project.save(value)
        for mode in ("verify", "create", "update"):
            run = project.run(f"--golden-mode={mode}")
            run.assert_outcomes(passed=1)
            assert summary(run) == "1 verified"
    project.save(2.0)
    for mode in ("verify", "create"):
        run = project.run(f"--golden-mode={mode}")
        run.assert_outcomes(failed=1)
        assert "--golden-mode=update" in command(run)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    assert summary(project.run("--golden-mode=update")) == "1 updated"
    assert [update.reason for update in project.golden().history] == [""]


def test_update_creates_what_is_missing(project: Project) -> None:
    project.tests(ONE_TEST)
    assert summary(project.run("--golden-mode=update", "--golden-reason=first")) == "1 created"
    assert project.golden().history == ()


def test_a_reason_goes_with_an_update(project: Project) -> None:
    project.tests(ONE_TEST)
    run = project.run("--golden-reason=why")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines("ERROR: --golden-reason goes with --golden-mode=update")


def test_what_was_updated_and_does_not_pass_fails(project: Project) -> None:
    project.tests(
        """
        def test_net(checkpoint_golden):
            swapped = (("weight", "bias"), ("bias", "weight"))
            checkpoint_golden.verify("net.safetensors", key_map=swapped)
        """
    )
    run = project.run("--golden-mode=create")
    run.assert_outcomes(failed=1)
    assert "the golden was created from this, and it does not pass" in failure(run)[-1]
    run = project.run("--golden-mode=update")
    run.assert_outcomes(failed=1)
    assert summary(run) == "1 failed"
    assert "the golden was updated from this, and it does not pass" in failure(run)[-1]


def test_what_is_undecided_fails_with_the_way_to_decide_it(project: Project) -> None:
    weights = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    save_file({"weight": weights}, project.path / "recorded.safetensors")
    save_file({"weight": weights}, project.path / "net.safetensors")
    project.tests(
        """
        def test_net(checkpoint_golden):
            checkpoint_golden.verify("net.safetensors", values="none")
        """
    )
    project.run("--golden-mode=create")
    save_file({"weight": weights + np.float32(5e-6)}, project.path / "net.safetensors")
    run = project.run()
    run.assert_outcomes(failed=1)
    assert failure(run)[0] == f"FAIL undecided  {NET}  file: 0 identical, 1 undecided"
    assert failure(run)[-2:] == [
        "  to decide exactly:  verify(…, reference='RECORDED_CKPT')",
        "  if this change is intended:  pytest test_it.py::test_net --golden-mode=update "
        '--golden-reason "why"',
    ]
    project.tests(
        """
        def test_net(checkpoint_golden):
            compared = checkpoint_golden.verify(
                "net.safetensors", reference="recorded.safetensors"
            )
            assert compared.verdict == "close"
        """
    )
    project.run().assert_outcomes(passed=1)


def test_the_recorded_checkpoint_is_named_where_it_is_there(project: Project) -> None:
    weights = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    save_file({"weight": weights}, project.path / "net.safetensors")
    record(project.path / "net.safetensors", project.path / "golden/net.safetensors", values="none")
    save_file({"weight": weights + np.float32(5e-6)}, project.path / "new.safetensors")
    project.tests(
        """
        def test_net(checkpoint_golden):
            checkpoint_golden.verify("new.safetensors", "net")
        """
    )
    assert failure(project.run())[-2] == (
        "  to decide exactly:  verify(…, reference='net.safetensors')"
    )


# Errors.


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("mode", ["verify", "create", "update"])
def test_what_cannot_be_read_is_told_in_two_lines(project: Project, mode: str) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create")
    damage(project.path / NET)
    before = (project.path / NET).read_bytes()
    run = project.run(f"--golden-mode={mode}")
    run.assert_outcomes(failed=1)
    first, second = failure(run)
    assert re.match(r"error: \S*golden/test_it/test_net.safetensors: ", first)
    assert second == "  next: restore it from version control, or remove it and record it again"
    assert (project.path / NET).read_bytes() == before

    (project.path / NET).unlink()
    damage(project.path / "net.safetensors")
    run = project.run(f"--golden-mode={mode}")
    run.assert_outcomes(failed=1)
    assert len(failure(run)) == 2
    assert ("net.safetensors: " in failure(run)[0]) == (mode != "verify") or NET in failure(run)[0]
    assert project.goldens == []


WRONG = {
    '"net.safetensors", ignore=("nowhere",)': "error: --ignore nowhere: matches no key of golden/",
    '"net.safetensors", ignore="*"': "error: ignore takes a tuple of globs, not '*'",
    '"net.safetensors", atol=-1': "error: atol is -1: a tolerance is 0 or more",
    '"net.safetensors", policy=Policy(), atol=1': "error: give policy=… or its fields as keywords",
    '"net.safetensors", "a/b"': "error: not a golden's name: 'a/b'",
    '"net.safetensors", "../b"': "error: not a golden's name: '../b'",
    '"net.safetensors", ".."': "error: not a golden's name: '..'",
    '"net.safetensors", ""': "error: not a golden's name: ''",
    '"net.safetensors", "net", section="a"': "error: golden/net.safetensors: holds the state dict",
    "{}": "error: the live state dict: holds no tensors",
    "7": "error: cannot fingerprint an int",
}


def test_wrong_calls_are_told_in_a_line_or_two(project: Project) -> None:
    project.record("net")
    calls = "\n".join(
        f"def test_{number}(checkpoint_golden): checkpoint_golden.verify({call})"
        for number, call in enumerate(WRONG)
    )
    project.tests(f"from harness import Policy\n{calls}")
    run = project.run("--golden-mode=create")
    run.assert_outcomes(failed=len(WRONG))
    for number, told in enumerate(WRONG.values()):
        lines = failure(run, f"test_{number}")
        assert lines[0].startswith(told)
        assert len(lines) <= 2


def test_a_keyword_that_does_not_exist_points_at_the_test(project: Project) -> None:
    project.tests(
        """
        def test_net(checkpoint_golden):
            checkpoint_golden.verify("net.safetensors", atoll=1)
        """
    )
    run = project.run()
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(['>*verify("net.safetensors", atoll=1)', "E*TypeError*'atoll'*"])
    assert "harness/" not in run.stdout.str()


# Names.


def test_parametrized_tests_and_classes_have_goldens_of_their_own(project: Project) -> None:
    project.tests(
        """
        import pytest

        @pytest.mark.parametrize("kind", ["fp16", "a b/../c", "A", "$(true) 'x'"])
        def test_net(checkpoint_golden, kind):
            checkpoint_golden.verify("net.safetensors")

        class TestNet:
            class TestInner:
                def test_net(self, checkpoint_golden):
                    checkpoint_golden.verify("net.safetensors")
        """
    )
    run = project.run("--golden-mode=create")
    assert summary(run) == "5 created"
    assert [re.sub("~.{8}", "~", name) for name in project.goldens] == [
        "golden/test_it/TestNet.TestInner.test_net.safetensors",
        "golden/test_it/test_net-A.safetensors",
        "golden/test_it/test_net-__true___x_~.safetensors",
        "golden/test_it/test_net-a_b_.._c~.safetensors",
        "golden/test_it/test_net-fp16.safetensors",
    ]
    project.save(2.0)
    run = project.run()
    steps = [line for line in run.outlines if "if this change is intended:" in line]
    assert len(steps) == 5
    for step in steps:
        accepted = project.follow(step.partition(":  ")[2])
        accepted.assert_outcomes(passed=1)
        assert summary(accepted) == "1 updated"
    assert summary(project.run()) == "5 verified"


def test_every_call_without_a_name_has_a_golden_of_its_own(project: Project) -> None:
    project.save(7.0, "other.safetensors")
    project.tests(
        """
        def test_net(checkpoint_golden):
            checkpoint_golden.verify("net.safetensors")
            checkpoint_golden.verify("other.safetensors")
        """
    )
    assert summary(project.run("--golden-mode=create")) == "2 created"
    second = "golden/test_it/test_net+2.safetensors"
    assert project.goldens == [second, NET]
    assert summary(project.run()) == "2 verified"
    project.save(8.0, "other.safetensors")
    run = project.run()
    assert failure(run)[0].startswith(f"FAIL different  {second}")
    project.follow(command(run)).assert_outcomes(passed=1)
    assert summary(project.run()) == "2 verified"


def test_a_named_golden_is_shared_with_other_tests_and_with_the_command(
    project: Project, harness: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.path)
    harness("record", "net.safetensors")
    project.tests(
        """
        import pytest
        from harness import open_checkpoint

        @pytest.fixture
        def opened():
            with open_checkpoint("net.safetensors") as checkpoint:
                yield checkpoint

        def test_path(checkpoint_golden):
            assert checkpoint_golden.verify("net.safetensors", "net").verdict == "identical"

        def test_open(checkpoint_golden, opened):
            assert checkpoint_golden.verify(opened, "net.safetensors").num_identical == 2
        """
    )
    run = project.run()
    run.assert_outcomes(passed=2)
    assert summary(run) == "1 verified"
    assert project.goldens == ["golden/net.safetensors"]


@given(
    nodes=st.sets(
        st.builds(
            "{}::{}{}".format,
            st.sampled_from(["test_a.py", "t/test_a.py", "../x/test_a.py", "a~b.py", "README.md"]),
            st.sampled_from(["test_x", "TestX::test_x", "test_ü", "test_" + "x" * 300]),
            st.one_of(
                st.just(""),
                st.from_regex(r"\[[-a./\\ ~+:_\x00-\x1fé\[\]]{0,9}\]", fullmatch=True),
            ),
        ),
        min_size=2,
        max_size=9,
    ),
    numbers=st.permutations([1, 2, 12]),
)
@settings(max_examples=50)
def test_no_two_calls_have_one_name_and_none_leaves_the_folder(
    nodes: set[str], numbers: list[int]
) -> None:
    names = [golden_name(node, number) for node in nodes for number in numbers]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_.~+/-]+", name)
        for part in name.split("/"):
            assert part
            assert part[0] != "."
            assert len(part) < 140
        assert "/" in name  # names without folders are for tests to give


@pytest.mark.parametrize(
    ("there", "name"),
    [("Shared", "shared"), ("STRASSE", "straße"), ("test_it/TEST_x", None), ("TEST_IT/y", None)],
)
def test_goldens_that_differ_only_in_case_are_an_error(
    project: Project, there: str, name: str | None
) -> None:
    project.save(1.0)
    project.record(there)
    project.tests(f"""
        def test_x(checkpoint_golden):
            checkpoint_golden.verify("net.safetensors", {name!r})
    """)
    for mode in ("verify", "create", "update"):
        run = project.run(f"--golden-mode={mode}")
        run.assert_outcomes(failed=1)
        assert "differs only in upper and lower case from" in run.stdout.str()


# Several tests on one golden.

TWO_TESTS = """
    def test_first(checkpoint_golden):
        checkpoint_golden.verify("net.safetensors", "shared")

    def test_second(checkpoint_golden):
        checkpoint_golden.verify("other.safetensors", "shared")
"""


@pytest.mark.parametrize("mode", ["create", "update"])
def test_a_golden_is_written_once_in_a_run(project: Project, mode: str) -> None:
    project.tests(TWO_TESTS)
    if mode == "update":
        project.save(7.0, "old.safetensors")
        project.record("shared", "old.safetensors")
    project.save(2.0, "other.safetensors")
    run = project.run(f"--golden-mode={mode}")
    run.assert_outcomes(passed=1, failed=1)
    assert failure(run)[-1] == (
        "  test_it.py::test_first has written this golden in this run: give one of the two another "
        "name"
    )
    assert summary(run) == "1 failed"
    project.save(1.0, "other.safetensors")
    run = project.run()
    run.assert_outcomes(passed=2)
    assert summary(run) == "1 verified"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_update_under_a_test_that_passed_fails_the_run(project: Project, workers: str) -> None:
    first, second = TWO_TESTS.split("\n\n")
    wait = """
        import time
        from pathlib import Path

        limit = time.monotonic() + 60
        while not Path("first.done").exists() and time.monotonic() < limit:
            time.sleep(0.01)
"""
    project.tests(f"{first}\n        open('first.done', 'w').close()\n", "test_a")
    name, call = second.split("\n", 1)
    project.tests(f"\n{name}{wait}{call}", "test_b")
    project.record("shared")
    project.save(2.0, "other.safetensors")
    run = project.run("--golden-mode=update", "-n", workers, "--dist", "loadfile")
    run.assert_outcomes(passed=2)
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    run.stdout.fnmatch_lines(
        [
            "checkpoint goldens: 1 updated",
            "  error: golden/shared.safetensors: tests that passed disagree on what it holds: "
            "test_a.py::test_first, test_b.py::test_second",
            "    next: give one of them another name, or run them again to see which fails",
        ]
    )
    run = project.run()
    run.assert_outcomes(passed=1, failed=1)
    assert failure(run)[0].startswith("FAIL different  golden/shared.safetensors")


def test_workers_create_verify_and_update_goldens_of_their_own_and_one_that_they_share(
    project: Project,
) -> None:
    project.tests(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_net(checkpoint_golden, number):
            checkpoint_golden.verify("net.safetensors", "shared")
            checkpoint_golden.verify("net.safetensors")
        """
    )
    project.record("test_it/test_gone")
    run = project.run("-n", "2", "--golden-mode=create")
    run.assert_outcomes(passed=6)
    assert summary(run) == "7 created, 1 unused"
    (project.path / "golden/test_it/test_gone.safetensors").unlink()
    project.save(2.0)
    run = project.run("-n", "2", "--golden-mode=update", "--golden-reason=why")
    run.assert_outcomes(passed=6)
    assert summary(run) == "7 updated"
    for path in project.goldens:
        assert [update.reason for update in project.golden(path).history] == ["why"]
    project.save(3.0)
    run = project.run("-n", "1")
    run.assert_outcomes(failed=6)
    assert failure(run)[0].startswith("FAIL different  golden/shared.safetensors")


# What is left over.

FIVE_TESTS = """
    import pytest

    @pytest.mark.parametrize("number", range(5))
    def test_net(checkpoint_golden, number):
        checkpoint_golden.verify("net.safetensors")

    def test_other():
        pass
"""


@pytest.fixture
def with_leftovers(project: Project) -> Project:
    """Tests with goldens, and two goldens beyond them: of a test that is gone, and a named one."""
    project.tests(FIVE_TESTS)
    for name in (*(f"test_it/test_net-{number}" for number in range(5)), "test_it/test_gone"):
        project.record(name)
    project.save(3.0, "gone.safetensors")
    project.record("gone", "gone.safetensors")
    (project.path / "gone.safetensors").unlink()
    return project


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["."],
        ["-p", "no:cacheprovider"],
        ["--import-mode=importlib"],
        ["--ff"],
        ["--golden-mode=update"],
    ],
    ids=" ".join,
)
def test_a_whole_run_tells_which_goldens_are_unused(
    with_leftovers: Project, arguments: list[str]
) -> None:
    before = with_leftovers.goldens
    run = with_leftovers.run(*arguments)
    run.assert_outcomes(passed=6)
    run.stdout.fnmatch_lines(
        [
            "checkpoint goldens: 5 verified, 2 unused",
            "  unused: golden/gone.safetensors",
            "  unused: golden/test_it/test_gone.safetensors",
        ],
        consecutive=True,
    )
    assert with_leftovers.goldens == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["test_it.py"],
        ["test_it.py::test_net"],
        ["-k", "test_net"],
        ["-m", "not slow", "-k", "not other"],
        ["--deselect", "test_it.py::test_other"],
        ["--ignore", "test_else.py"],
        ["--lf"],
    ],
    ids=" ".join,
)
def test_a_part_of_the_suite_tells_nothing_of_the_rest(
    with_leftovers: Project, arguments: list[str]
) -> None:
    run = with_leftovers.run(*arguments)
    assert run.ret == pytest.ExitCode.OK
    assert summary(run) == "5 verified"


def test_the_tests_of_testpaths_are_the_whole_suite(with_leftovers: Project) -> None:
    with_leftovers.configure("testpaths = ['te*ts']")
    tests = with_leftovers.pytester.mkdir("tests")
    (with_leftovers.path / "test_it.py").rename(tests / "test_it.py")
    (with_leftovers.path / "golden/test_it").rename(with_leftovers.path / "golden/it")
    (with_leftovers.path / "golden/tests").mkdir()
    (with_leftovers.path / "golden/it").rename(with_leftovers.path / "golden/tests/test_it")
    assert summary(with_leftovers.run()) == "5 verified, 2 unused"
    assert summary(with_leftovers.run("tests")) == "5 verified"
    with_leftovers.configure("testpaths = ['tests']")
    assert summary(with_leftovers.run("tests")) == "5 verified, 2 unused"
    assert summary(with_leftovers.run("tests/test_it.py")) == "5 verified"


def test_a_run_that_stops_early_or_cannot_collect_tells_nothing(with_leftovers: Project) -> None:
    with_leftovers.tests(
        """
        def test_fails(checkpoint_golden):
            assert False

        def test_passes():
            pass
        """,
        "test_z",
    )
    run = with_leftovers.run("-x")
    run.assert_outcomes(passed=6, failed=1)
    assert summary(run) == "5 verified"
    with_leftovers.tests("import nowhere", "test_a")
    run = with_leftovers.run("--continue-on-collection-errors")
    run.assert_outcomes(passed=7, failed=1, errors=1)
    assert summary(run) == "5 verified"


@pytest.mark.parametrize(
    ("mark", "body", "own", "workers"),
    [
        ("skip", "pass", 1, "0"),
        ("xfail(run=False)", "pass", 1, "0"),
        ("skipif(False, reason='')", "pytest.skip()", 1, "0"),
        ("skipif(False, reason='')", "assert False", 1, "0"),
        ("xfail", "assert False", 1, "0"),
        ("skipif(False, reason='')", "checkpoint_golden.verify('nowhere.safetensors')", 0, "0"),
        ("skipif(False, reason='')", "assert False", 1, "1"),
    ],
)
def test_goldens_of_tests_that_did_not_get_there_are_unknown(
    with_leftovers: Project, mark: str, body: str, own: int, workers: str
) -> None:
    with_leftovers.tests(
        f"""
        import pytest

        @pytest.mark.{mark}
        def test_late(checkpoint_golden):
            {body}
            checkpoint_golden.verify("net.safetensors")
        """,
        "test_a",
    )
    with_leftovers.record("test_a/test_late")
    with_leftovers.record("test_a/test_late+2")
    with_leftovers.record("test_a/test_later")
    run = with_leftovers.run("-n", workers)
    failed = "" if own else ", 1 failed"
    # test_gone is of no test, whatever happens; "gone" may be a name that test_late gives.
    assert summary(run) == (
        f"5 verified{failed}, 2 unused, {2 + own} unknown (of tests that were skipped or failed)"
    )
    run.stdout.fnmatch_lines(
        [
            "  unused: golden/test_a/test_later.safetensors",
            "  unused: golden/test_it/test_gone.safetensors",
        ],
        consecutive=True,
    )


def test_goldens_of_a_module_that_was_skipped_are_unknown(with_leftovers: Project) -> None:
    with_leftovers.tests("import pytest; pytest.importorskip('nowhere')", "test_a")
    with_leftovers.record("test_a/test_x")
    assert summary(with_leftovers.run()) == (
        "5 verified, 1 unused, 2 unknown (of tests that were skipped or failed)"
    )


def test_what_is_not_the_plugins_is_not_unused(project: Project) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create")
    project.record("net")
    project.save(1.0, "golden/inputs.safetensors")
    assert summary(project.run()) == "1 verified"
    project.tests("def test_it(): pass")
    assert summary(project.run()) is None


def test_the_summary_asks_no_server_for_the_checkpoint_of_a_golden(project: Project) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create")
    project.record("net")
    golden = project.golden("golden/net.safetensors")
    write_golden(
        dataclasses.replace(golden, source="http://127.0.0.1:9/net.safetensors"), overwrite=True
    )
    assert summary(project.run()) == "1 verified"


# Where it runs.


def test_it_runs_without_a_terminal_and_from_a_folder(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.configure("golden_dir = 'data/golden'")
    tests = project.pytester.mkdir("a folder")
    (tests / "test_it.py").write_text(
        "def test_net(checkpoint_golden):\n    checkpoint_golden.verify('../net.safetensors')\n"
    )
    monkeypatch.chdir(tests)
    run = project.run()
    assert failure(run)[0].startswith("error: ../data/golden/a_folder~")
    project.follow(command(run)).assert_outcomes(passed=1)
    assert project.run("-p", "no:terminal").ret == pytest.ExitCode.OK
    monkeypatch.chdir(project.path)
    project.save(2.0)
    assert project.run("-p", "no:terminal").ret == pytest.ExitCode.TESTS_FAILED
    monkeypatch.chdir(tests)
    run = project.run("--golden-mode=update", "-p", "no:cacheprovider", "--import-mode=importlib")
    assert summary(run) == "1 updated"


def test_the_groups_of_xdist_are_no_part_of_a_name(project: Project) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create")
    # What --dist loadgroup does, with one release of pytest or another.
    project.pytester.makeconftest(
        """
        def pytest_collection_modifyitems(items):
            for item in items:
                item._id = item._nodeid = f"{item.nodeid}@group"
        """
    )
    assert summary(project.run()) == "1 verified"
    project.save(2.0)
    assert shlex.split(command(project.run()))[1] == "test_it.py::test_net"
    project.tests("def test_net(checkpoint_golden):\n    assert False")
    assert summary(project.run()) == "1 unknown (of tests that were skipped or failed)"


def test_of_a_test_that_is_run_again_the_last_attempt_counts(project: Project) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create")
    # What pytest-rerunfailures does; between the attempts the file is mended.
    project.pytester.makeconftest(
        """
        import shutil
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            for attempt in range(2):
                item._initrequest()
                for report in runtestprotocol(item, nextitem=nextitem, log=False):
                    if report.failed and attempt == 0:
                        report.outcome = "rerun"
                    item.ihook.pytest_runtest_logreport(report=report)
                shutil.copy("good.safetensors", "net.safetensors")
            return True
        """
    )
    project.save(1.0, "good.safetensors")
    project.save(2.0)
    run = project.run()
    assert run.ret == pytest.ExitCode.OK
    assert summary(run) == "1 verified"


def test_the_next_step_finds_the_goldens_where_the_run_did(project: Project) -> None:
    project.tests(ONE_TEST)
    (project.path / "other settings").mkdir()
    settings = project.path / "other settings" / "pytest.ini"
    settings.write_text("[pytest]\n")
    given = ["-c", str(settings), "--rootdir", str(project.path), "-o", "golden_dir=some where"]
    project.follow(command(project.run(*given))).assert_outcomes(passed=1)
    assert (project.path / "some where/test_it/test_net.safetensors").exists()


def test_it_says_nothing_in_the_junit_report_but_the_failure(project: Project) -> None:
    project.tests(ONE_TEST)
    project.run("--golden-mode=create", "--junitxml=report.xml")
    assert "golden" not in (project.path / "report.xml").read_text()
    project.save(2.0)
    project.run("--junitxml=report.xml")
    report = (project.path / "report.xml").read_text()
    assert "FAIL different" in report
    assert "--golden-mode=update" in report


def test_a_failure_in_a_fixture_is_told_the_same_way(project: Project) -> None:
    project.tests(
        """
        import pytest

        @pytest.fixture
        def net(checkpoint_golden):
            checkpoint_golden.verify("net.safetensors")

        def test_net(net):
            pass
        """
    )
    run = project.run()
    run.assert_outcomes(errors=1)
    assert failure(run)[-1] == "  next: pytest test_it.py::test_net --golden-mode=create"


# Live subjects.

LIVE = """
    import copy

    import pytest
    import torch
    from torch import nn

    @pytest.fixture
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(70, 90), nn.BatchNorm1d(90), nn.Linear(90, 3)).train()

    def test_module(checkpoint_golden, net):
        checkpoint_golden.verify(net, "live")

    def test_state_dict(checkpoint_golden, net):
        checkpoint_golden.verify(net.state_dict(), "live")

    def test_path(checkpoint_golden, net, tmp_path):
        torch.save(net.state_dict(), tmp_path / "net.pt")
        checkpoint_golden.verify(tmp_path / "net.pt", "live")

    def test_training(checkpoint_golden, net):
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.randn(8, 70)).sum().backward()
        optimizer.step()
        loss = net(torch.randn(8, 70)).sum()  # a graph that needs the weights as they are
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        before = (
            {key: tensor.detach().clone() for key, tensor in tensors.items()},
            {key: tensor.grad.clone() for key, tensor in net.named_parameters()},
            {key: (id(t), t.data_ptr(), t._version, t.requires_grad) for key, t in tensors.items()},
            copy.deepcopy(optimizer.state_dict()),
            torch.get_rng_state(),
            [module.training for module in net.modules()],
            (torch.get_num_threads(), torch.is_grad_enabled()),
        )
        checkpoint_golden.verify(net)
        after = (
            {key: tensor.detach().clone() for key, tensor in tensors.items()},
            {key: tensor.grad.clone() for key, tensor in net.named_parameters()},
            {key: (id(t), t.data_ptr(), t._version, t.requires_grad) for key, t in tensors.items()},
            copy.deepcopy(optimizer.state_dict()),
            torch.get_rng_state(),
            [module.training for module in net.modules()],
            (torch.get_num_threads(), torch.is_grad_enabled()),
        )
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        loss.backward()
"""


def test_modules_state_dicts_and_files_share_a_golden_and_stay_as_they_are(
    project: Project,
) -> None:
    project.tests(LIVE)
    run = project.run("--golden-mode=create")
    run.assert_outcomes(passed=4)
    assert summary(run) == "2 created"
    run = project.run()
    run.assert_outcomes(passed=4)
    assert summary(run) == "2 verified"
    project.tests(LIVE.replace("manual_seed(0)", "manual_seed(1)"))
    run = project.run("-k", "module")
    assert "  actual    the live Sequential (live model)" in failure(run)
    project.follow(command(run)).assert_outcomes(passed=1)
    project.run("-k", "not training").assert_outcomes(passed=3, deselected=1)


def test_the_stages_of_a_model_are_verified_and_recorded(project: Project) -> None:
    project.tests(
        """
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(nn.init.zeros_(nn.Linear(5, 2).weight))
                self.bias = nn.Parameter(nn.init.zeros_(nn.Linear(2, 3).bias))
        """,
        "model",
    )
    project.tests(
        """
        from harness.model.options import LiveOptions

        def test_net(checkpoint_golden):
            stages = checkpoint_golden.verify_stages(
                "net.safetensors", stage="load", live=LiveOptions(target="model:Net")
            )
            assert [stage.stage for stage in stages] == ["file", "load"]
        """
    )
    assert summary(project.run("--golden-mode=create")) == "1 created"
    live = project.golden().live
    assert live is not None
    assert (live.target, live.stages) == ("model:Net", ("file", "load"))
    project.run().assert_outcomes(passed=1)
    with (project.path / "model.py").open("a") as file:
        file.write(
            """
    def load_state_dict(self, state, **options):
        loaded = super().load_state_dict(state, **options)
        self.weight.data += 1
        return loaded
"""
        )
    for mode in ("verify", "update"):
        run = project.run(f"--golden-mode={mode}")
        run.assert_outcomes(failed=1)
        assert failure(run)[0] == f"ok identical  {NET}  file: 2 identical"
        assert failure(run)[2] == f"FAIL different  {NET}  load: 1 identical, 1 different"
        assert failure(run)[-1].startswith("  the golden holds the file, not what the code makes")
    assert project.golden().history == ()


def test_stages_that_a_golden_lacks_are_recorded_by_an_update(project: Project) -> None:
    project.tests("from torch import nn\n\nNet = lambda: nn.Linear(5, 2)\n", "model")
    net = {"weight": np.ones((2, 5), np.float32), "bias": np.ones(2, np.float32)}
    save_file(net, project.path / "linear.safetensors")
    save_file({"input": np.ones((1, 5), np.float32)}, project.path / "inputs.safetensors")
    test = """
        from pathlib import Path
        from harness.model.options import LiveOptions

        def test_net(checkpoint_golden):
            checkpoint_golden.verify_stages(
                "linear.safetensors",
                stage="STAGE",
                live=LiveOptions(target="model:Net", inputs=Path("inputs.safetensors")),
            )
        """
    project.tests(test.replace("STAGE", "load"))
    assert summary(project.run("--golden-mode=create")) == "1 created"
    project.tests(test.replace("STAGE", "outputs"))
    lines = failure(project.run())
    assert "was recorded without outputs" in lines[-2]
    assert lines[-1].endswith('--golden-mode=update --golden-reason "why"')
    assert summary(project.run("--golden-mode=update")) == "1 updated"
    assert summary(project.run()) == "1 verified"


def test_a_module_has_no_stages(project: Project) -> None:
    project.tests(
        """
        import torch

        def test_net(checkpoint_golden):
            checkpoint_golden.verify_stages({"w": torch.zeros(2)}, stage="load")
        """
    )
    assert (
        "loads a file, and this checkpoint is in memory"
        in failure(project.run("--golden-mode=create"))[0]
    )
    assert torch.is_grad_enabled()
