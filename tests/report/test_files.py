"""--report and the step summary of GitHub, through the command line: whole files, or told."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from junitparser import JUnitXml

from harness import api
from harness.errors import UsageError
from harness.report.files import append_step_summary, write_report
from harness.report.outcome import Outcome, Result
from tests.conftest import Harness, Run

PLAIN = ("md", "xml", "json")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(data / "nest_tiny.nemo", folder / "nest.nemo")
    shutil.copy(data / "nest_tiny_perturbed_1e-3.nemo", folder / "changed.nemo")
    api.record(folder / "nest.nemo", folder / "golden" / "nest.safetensors")
    return folder


@pytest.fixture
def project(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A golden, the checkpoint that it was recorded from, and one of which a weight differs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    return tmp_path


def reported(harness: Harness, *arguments: str) -> tuple[Run, dict[str, str]]:
    """Run a command with all reports; returns what it printed as JSON, and the reports."""
    asked = [f"--report=out.{suffix}" for suffix in PLAIN]
    run = harness(*arguments, *asked, "--format", "json")
    return run, {suffix: Path(f"out.{suffix}").read_text() for suffix in PLAIN}


CHANGED = ("verify", "changed.nemo", "-g", "golden/nest.safetensors")


@pytest.mark.parametrize(
    ("arguments", "code", "counts"),
    [
        (("verify",), 0, (1, 0, 0)),
        (CHANGED, 1, (1, 1, 0)),
        (("diff", "nest.nemo", "changed.nemo"), 1, (1, 1, 0)),
        (("diff", "nest.nemo", "nest.nemo"), 0, (1, 0, 0)),
        (("verify", "gone.nemo"), 2, (1, 0, 1)),
        (("verify", "changed.nemo"), 2, (1, 0, 1)),
        (("verify", "-g", "golden/none.safetensors"), 2, (1, 0, 1)),
        ((*CHANGED, "--ignore", "nothing.*"), 2, (1, 0, 1)),
        ((*CHANGED, "--load", "--model", "nope:Thing"), 2, (1, 0, 1)),
        (("diff", "nest.nemo", "gone.nemo"), 2, (1, 0, 1)),
        (("roundtrip", "gone.nemo"), 2, (1, 0, 1)),
        (("roundtrip", "nest.nemo", "--model", "nope:Thing"), 2, (1, 0, 1)),
    ],
)
def test_every_report_tells_what_the_run_came_to(
    project: Path, harness: Harness, arguments: Any, code: int, counts: tuple[int, int, int]
) -> None:
    run, reports = reported(harness, *arguments)
    assert run.code == run.json["exit_code"] == code
    assert json.loads(reports["json"]) == run.json
    assert reports["json"] == run.out
    suites = JUnitXml.fromstring(reports["xml"].encode())
    assert (suites.tests, suites.failures, suites.errors) == counts
    word = {0: "✓ passes", 1: "✗ differs", 2: "! could not be checked"}[code]
    assert reports["md"].startswith(f"## harness {arguments[0]}: {word}\n")
    [told] = run.json["goldens"]
    if code == 2:
        assert told["error"]["message"] in reports["md"]
        assert told["error"]["hint"] in reports["md"]
        assert (run.json.get("error") == told["error"]) is not bool(told["stages"])


def test_an_empty_folder_is_reported_as_well(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, reports = reported(harness, "verify")
    assert run.code == 2
    assert run.json["error"]["hint"] == "record one: harness record CHECKPOINT"
    assert 'name="no golden file"' in reports["xml"]
    assert "no goldens in golden/" in reports["md"]


def test_reports_do_not_change_what_is_printed(project: Path, harness: Harness) -> None:
    plain = harness(*CHANGED)
    assert harness(*CHANGED, "--report", "out.xml", "--report", "out.md") == plain
    assert "--update-golden" in plain.out
    # The command to type again is without the reports of this run.
    assert "--report" not in plain.out + Path("out.xml").read_text() + Path("out.md").read_text()


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        (
            "out.pdf",
            "unknown format; a report is one of .html, .md, .xml",
            "--report out.html",
        ),
        ("out", "unknown format", "--report out.html"),
        ("-", "unknown format", "--report report.html"),
        ("a folder", "is a folder", "--report 'a folder/report.html'"),
        ("", "is a folder", "--report report.html"),
        ("no folder/out.xml", "no such folder: no folder", "mkdir -p 'no folder'"),
        ("/dev/null", "unknown format", "--report report.html"),
        ("README.md", "exists, and is not a report", "give it another name: --report report.md"),
        ("report.md", "exists, and is not a report", "if it is not needed: rm report.md"),
        ("index.html", "exists, and is not a report", "give it another name: --report report.html"),
    ],
)
def test_a_report_that_cannot_be_written_is_told_before_any_work(
    project: Path, harness: Harness, path: str, message: str, hint: str
) -> None:
    Path("a folder").mkdir()
    Path("README.md").write_text("# Mine\n")
    Path("report.md").write_text("# Mine, too\n")
    Path("index.html").write_text("<!DOCTYPE html>\n<title>Mine</title>\n")
    for command in (["verify"], ["diff", "nest.nemo", "gone"], ["roundtrip", "gone"]):
        run = harness(*command, "--report", path, "--report", "out.xml")
        assert (run.code, run.out) == (2, "")
        assert message in run.err.splitlines()[0]
        assert run.err.splitlines()[1] == f"  next: {hint}"
    assert not Path("out.xml").exists()


def test_an_index_of_shards_is_no_place_for_a_report(project: Path, harness: Harness) -> None:
    index = project / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}')
    before = index.read_bytes()
    run = harness("verify", index.name, "--report", index.name)
    assert run.code == 2
    assert "exists, and is not a report" in run.err
    assert index.read_bytes() == before


@pytest.mark.parametrize("name", ["out.html", "OUT.HTML", "out.Md", "out.XML", "out.JSON"])
def test_a_report_replaces_another_whatever_the_case_of_its_suffix(
    project: Path, harness: Harness, name: str
) -> None:
    Path(name).touch()
    assert harness("verify", "--report", name).code == 0
    first = Path(name).read_text()
    assert first
    assert harness(*CHANGED, "--report", name).code == 1
    assert Path(name).read_text() != first


def test_the_same_file_twice_is_no_mistake(project: Path, harness: Harness) -> None:
    once = harness("verify", "--report", "out.xml")
    before = Path("out.xml").read_bytes()
    assert harness("verify", "--report", "out.xml", "--report", "./out.xml") == once
    assert Path("out.xml").read_bytes() == before


def test_a_report_that_fails_at_the_end_leaves_the_others_and_is_a_2(
    project: Path, harness: Harness
) -> None:
    Path("out.md").symlink_to("no folder/out.md")
    run = harness("verify", "--report", "out.md", "--report", "out.xml", "--format", "json")
    assert run.code == 2
    assert run.json["exit_code"] == 0
    assert "--report out.md: cannot be written: No such file or directory" in run.err
    assert 'errors="0"' in Path("out.xml").read_text()


def test_the_summary_of_a_step_is_added_to(
    project: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = project / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    plain = harness(*CHANGED)
    assert harness("diff", "nest.nemo", "gone.nemo").code == 2
    text = summary.read_text()
    assert text.startswith("before\n## harness verify: ✗ differs\n")
    assert "\n## harness diff: ! could not be checked\n" in text
    assert plain.err == ""


def test_a_summary_that_cannot_be_written_fails_no_run(
    project: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project / "no folder" / "summary.md"))
    run = harness("verify")
    assert run.code == 0
    assert run.err.startswith("note: GITHUB_STEP_SUMMARY=")
    assert "cannot be written" in run.err
    assert harness(*CHANGED).code == 1


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """No file takes more bytes than these, as on a disk that has no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_report_is_written_whole_or_not_at_all(project: Path) -> None:
    here = Outcome(expected="golden", actual="model.nemo", error=UsageError("e" * 80, hint=""))
    result = Result(command="verify", outcomes=(here,))
    (project / "link.html").symlink_to("old.html")
    for name in ("old.html", "old.md", "old.xml", "old.json", "new.html", "link.html"):
        if name.startswith("old"):
            write_report(Result(command="verify", outcomes=()), Path(name))
        before = {path.name: path.read_bytes() for path in project.glob("*.*") if path.exists()}
        with full_disk(100), pytest.raises(UsageError, match="cannot be written: File too large"):
            write_report(result, Path(name))
        assert before == {path.name: path.read_bytes() for path in project.glob("*.*")}
    write_report(result, Path("link.html"))
    assert Path("link.html").is_symlink()
    assert "e" * 80 in Path("old.html").read_text()


def test_a_summary_is_added_whole_or_not_at_all(project: Path) -> None:
    here = Outcome(expected="golden", actual="model.nemo", error=UsageError("e" * 80, hint=""))
    Path("summary.md").write_text("before\n")
    with full_disk(100), pytest.raises(UsageError, match=r"GITHUB_STEP_SUMMARY=.* written"):
        append_step_summary(Result(command="verify", outcomes=(here,)), Path("summary.md"))
    assert Path("summary.md").read_text() == "before\n"
