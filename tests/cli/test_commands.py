"""The command line: exit codes, whole output, errors that say the next step."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from asyncio import CancelledError
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from harness import api
from harness.model.lightning import quiet
from tests.conftest import Harness, Run, on_terminal
from tests.model.variants import Plain


@pytest.fixture
def project(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of a user: a checkpoint and its golden, with the project as current folder."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "models").mkdir()
    shutil.copy(data / "nest_tiny.nemo", tmp_path / "models" / "nest.nemo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def golden_of_nest(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A golden as `harness record models/nest.nemo` writes it into a project."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "models").mkdir()
    checkpoint = shutil.copy(data / "nest_tiny.nemo", folder / "models" / "nest.nemo")
    path = folder / "golden" / "nest.safetensors"
    api.record(checkpoint, path)
    return path


@pytest.fixture
def recorded(project: Path, golden_of_nest: Path) -> Path:
    golden = project / "golden" / "nest.safetensors"
    golden.parent.mkdir()
    return Path(shutil.copy(golden_of_nest, golden))


KEY = "encoder.layers.1.feed_forward1.linear2.weight"


def test_record_says_what_it_wrote_and_the_next_step(project: Path, harness: Harness) -> None:
    run = harness("record", "models/nest.nemo")
    size = (project / "golden" / "nest.safetensors").stat().st_size
    assert run == Run(
        0,
        "recorded golden/nest.safetensors: 99 tensors of models/nest.nemo (nemo), root "
        f"8fa8681d0705c440, {size:,} bytes (45.1 % of the weights)\n"
        "it decides allclose at 1e-5 for every tensor\n"
        "next: harness verify models/nest.nemo\n",
        "",
    )


def test_verify_of_the_recorded_checkpoint_passes_in_one_line(
    recorded: Path, harness: Harness
) -> None:
    line = "ok identical  golden/nest.safetensors  file: 99 identical\n"
    assert harness("verify", "models/nest.nemo") == Run(0, line, "")
    assert harness("verify") == Run(0, line, "")
    assert harness("verify", "-g", recorded.relative_to(Path.cwd())) == Run(0, line, "")


def test_one_changed_weight_is_named_with_both_values(
    recorded: Path, harness: Harness, data: Path
) -> None:
    shutil.copy(data / "nest_tiny_perturbed_1e-3.nemo", "models/nest.nemo")
    assert harness("verify") == Run(
        1,
        f"""\
FAIL different  golden/nest.safetensors  file: 98 identical, 1 different
  expected  golden/nest.safetensors (nemo)
  actual    models/nest.nemo (nemo)

  different: allclose is false (1)
    {KEY}  float32 [64, 256]
      1 of 16,384 elements are beyond the tolerance; recovered from the sketch, proved by the digest
      max |actual - expected| 1.00e-03, rms 7.8e-06, row 3
      would pass at atol 1.00e-03 (now 1e-05, rtol 1e-05)
      [3, 7]  expected 0.0388614535  actual 0.0398614518

  if this change is intended:  \
harness verify -g golden/nest.safetensors --update-golden --reason "why"
""",
        "",
    )


def test_a_renamed_key_is_one_finding(recorded: Path, harness: Harness, data: Path) -> None:
    run = harness("verify", data / "nest_tiny_renamed_key.nemo", "-g", recorded, "--format", "json")
    stage = run.json["goldens"][0]["stages"][0]
    assert run.code == run.json["exit_code"] == 1
    assert stage["num_identical"] == 98
    assert [(f["kind"], f["expected"], f["actual"]) for f in stage["findings"]] == [
        (
            "renamed",
            "encoder.layers.0.self_attn.linear_q.weight",
            "encoder.layers.0.self_attn.query_proj.weight",
        )
    ]


def test_a_missing_key_is_one_finding(recorded: Path, harness: Harness, data: Path) -> None:
    run = harness("verify", data / "nest_tiny_missing_key.nemo", "-g", recorded)
    assert run.code == 1
    assert "missing: only in expected (1)\n    quantizer.codebooks" in run.out


def test_a_cast_is_said_once_above_its_tensors(
    recorded: Path, harness: Harness, data: Path
) -> None:
    run = harness("verify", data / "nest_tiny_bf16.nemo", "-g", recorded)
    assert run.code == 1
    assert "dtype (97)\n    the golden's values, rounded to bfloat16  (97 tensors)\n" in run.out
    assert "\n      expected float32 or float64, actual bfloat16\n" in run.out
    assert "--accept rounded\n" in run.out


def test_what_the_golden_cannot_tell_is_undecided_and_a_reference_decides_it(
    recorded: Path, harness: Harness, data: Path
) -> None:
    noisy = data / "nest_tiny_perturbed_all_1e-6.nemo"
    assert harness("verify", noisy, "-g", recorded).code == 0
    run = harness("record", "models/nest.nemo", "-g", recorded, "--overwrite", "--max-size", "60KB")
    wanted = r"gross changes and single elements; --max-size \d+KB would decide all"
    assert re.search(wanted, run.out)
    run = harness("verify", noisy, "-g", recorded)
    assert run.code == 3
    assert "FAIL undecided" in run.out
    assert f"--reference {recorded.parents[1] / 'models' / 'nest.nemo'}\n" in run.out
    decides = re.search("to decide without it, from now on:  harness (.*)", run.out)
    assert decides is not None
    run = harness("verify", noisy, "-g", recorded, "--reference", data / "nest_tiny.nemo")
    assert run.code == 0
    assert run.out.startswith("ok close")
    run = harness(*shlex.split(decides[1]))
    assert run.code == 0
    assert "it decides allclose at 1e-5 for every tensor" in run.out
    assert harness("verify", noisy, "-g", recorded).code == 0


def test_what_is_verified_is_not_named_as_its_own_reference(
    recorded: Path, harness: Harness, data: Path
) -> None:
    harness("record", "models/nest.nemo", "--overwrite", "--values", "none")
    shutil.copy(data / "nest_tiny_perturbed_all_1e-6.nemo", "models/nest.nemo")
    for arguments in (["models/nest.nemo"], ["-g", "golden/nest.safetensors"], []):
        run = harness("verify", *arguments)
        assert run.code == 3
        assert "--reference RECORDED_CKPT\n" in run.out


def test_a_reference_that_was_not_recorded_is_refused(
    recorded: Path, harness: Harness, data: Path
) -> None:
    noisy = data / "nest_tiny_perturbed_all_1e-6.nemo"
    run = harness("verify", noisy, "-g", recorded, "--reference", noisy)
    assert run.code == 2
    assert "not the checkpoint that was recorded" in run.err


def test_record_refuses_to_overwrite_and_names_the_update_command(
    recorded: Path, harness: Harness, data: Path
) -> None:
    before = recorded.read_bytes()
    run = harness("record", data / "nest_tiny.ckpt", "-g", recorded)
    assert run.code == 2
    assert "recorded there already" in run.err
    assert "--update-golden" in run.err
    assert recorded.read_bytes() == before
    assert harness("record", data / "nest_tiny.ckpt", "-g", recorded, "--overwrite").code == 0
    assert recorded.read_bytes() != before


def test_update_shows_the_difference_accepts_it_and_keeps_why(
    recorded: Path, harness: Harness, data: Path
) -> None:
    new = data / "nest_tiny_perturbed_1e-3.nemo"
    run = harness("verify", new, "-g", recorded, "--update-golden", "--reason", "a test")
    assert run.code == 0
    assert f"    {KEY}  float32" in run.out
    assert "root 8fa8681d0705c440 is now 8eda46f448cd31af" in run.out
    assert "replaced 8fa8681d0705c440  a test" in run.out
    assert harness("verify", new, "-g", recorded).code == 0
    assert "replaced   8fa8681d0705c440  a test" in harness("show", recorded).out


def test_a_reason_of_several_lines_stays_on_one(
    recorded: Path, harness: Harness, data: Path
) -> None:
    reason = "retrained\n\nroot  0000\x1b[2J"
    arguments = ("-g", recorded, "--update-golden", "--reason", reason)
    run = harness("verify", data / "nest_tiny_perturbed_1e-3.nemo", *arguments)
    for text in (run.out, harness("show", recorded).out):
        [line] = [line for line in text.splitlines() if "replaced" in line]
        assert line.endswith(r"retrained\n\nroot  0000\x1b[2J")


def test_update_of_an_unchanged_golden_does_not_touch_it(recorded: Path, harness: Harness) -> None:
    before = recorded.stat()
    run = harness("verify", "--update-golden", "--reason", "nothing")
    assert run.code == 0
    assert "is already up to date" in run.out
    assert recorded.stat() == before or recorded.stat().st_mtime_ns == before.st_mtime_ns


def test_an_unreadable_checkpoint_never_updates(recorded: Path, harness: Harness) -> None:
    before = recorded.read_bytes()
    Path("models/nest.nemo").write_bytes(b"x" * 100)
    run = harness("verify", "models/nest.nemo", "--update-golden", "--reason", "no")
    assert run.code == 2
    assert recorded.read_bytes() == before


def test_verify_never_creates_a_golden(project: Path, harness: Harness) -> None:
    run = harness("verify", "models/nest.nemo", "--update-golden")
    assert run == Run(
        2,
        "",
        "error: golden/nest.safetensors: no golden is recorded for models/nest.nemo\n"
        "  next: harness record models/nest.nemo\n",
    )
    assert not (project / "golden").exists()


def test_without_goldens_verify_says_how_to_record_one(project: Path, harness: Harness) -> None:
    run = harness("verify")
    assert run.code == 2
    assert "harness record CHECKPOINT" in run.err


def test_of_several_goldens_each_is_reported_and_the_worst_counts(
    recorded: Path, harness: Harness, data: Path
) -> None:
    shutil.copy(data / "nest_tiny_perturbed_1e-3.nemo", "models/other.nemo")
    shutil.copy(data / "nest_tiny_gz.nemo", "models/packed.nemo")
    assert harness("record", "models/other.nemo").code == 0
    assert harness("record", "models/packed.nemo").code == 0
    shutil.copy(data / "nest_tiny.ckpt", "models/other.nemo")
    run = harness("verify")
    assert run.code == 1
    assert run.out.count("ok identical") == 2
    assert run.out.count("FAIL different") == 1
    Path("models/packed.nemo").unlink()
    run = harness("verify", "--format", "json")
    assert run.code == run.json["exit_code"] == 2
    assert [len(g["stages"]) for g in run.json["goldens"]] == [1, 1, 0]
    assert run.json["goldens"][2]["error"]["kind"] == "checkpoint"


def test_a_golden_of_a_live_model_is_left_out_where_no_file_is_named(
    recorded: Path, harness: Harness
) -> None:
    live = Path("golden/live.safetensors")
    api.record(torch.nn.Linear(2, 2), live)
    run = harness("verify")
    assert run.code == 0
    assert run.out.count("ok identical") == 1
    assert run.err == (
        f"note: {live} was recorded from a live model, names no checkpoint, and is left out\n"
    )
    assert harness("verify", "-g", live).code == 2
    recorded.unlink()
    assert harness("verify") == Run(0, "", run.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ignore", "nothing.*"], "--ignore nothing.*: matches no key"),
        (["--tolerance", "nothing.*=1"], "--tolerance nothing.*: matches no key"),
        (["--tolerance", "a=b"], "is not ATOL or ATOL,RTOL"),
        (["--tolerance", "a=1,2,3"], "is not ATOL or ATOL,RTOL"),
        (["--map", "nothing=x"], "has no key nothing"),
        (["--map", "nothing"], "OLD=NEW"),
        (["--strip-prefix", "module."], "no key of models/nest.nemo starts with it"),
        (["--atol", "-1"], "a tolerance is 0 or more"),
        (["--atol", "nan"], "a tolerance is 0 or more"),
        (["--reason", "x"], "--reason needs --update-golden"),
        (["--nonsense"], "No such option"),
    ],
)
def test_options_that_fit_nothing_are_errors(
    recorded: Path, harness: Harness, arguments: list[str], message: str
) -> None:
    run = harness("verify", "models/nest.nemo", *arguments)
    assert (run.code, run.out) == (2, "")
    assert message in run.err


def test_a_glob_of_half_a_key_is_told_how_to_fit(recorded: Path, harness: Harness) -> None:
    run = harness("verify", "models/nest.nemo", "--ignore", "conv.pointwise")
    assert run.code == 2
    assert run.err.endswith("  next: a glob matches whole keys: use '*conv.pointwise*'\n")
    assert harness("verify", "models/nest.nemo", "--ignore", "*conv.pointwise*").code == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["update", "x"], "harness verify CKPT --update-golden --reason WHY"),
        (["check"], "harness verify CKPT"),
        (["compare", "a", "b"], "harness diff EXPECTED ACTUAL"),
        (["help"], "harness --help"),
    ],
)
def test_another_name_of_a_command_leads_to_it(
    harness: Harness, arguments: list[str], hint: str
) -> None:
    run = harness(*arguments)
    assert run == Run(2, "", f"error: no command {arguments[0]}\n  next: {hint}\n")


def test_help_lists_the_commands_in_the_order_of_need(harness: Harness) -> None:
    listed = re.findall(r"^  (\w+)  ", harness("--help").out.partition("Commands:")[2], re.M)
    assert listed == ["record", "verify", "roundtrip", "diff", "show", "inputs", "schema"]


def test_the_bar_is_gone_before_a_stage_is_reported(
    recorded: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar:
        def update(self, task: int, *, completed: int, total: int) -> None:
            sys.stdout.write("bar\n")

        def stop(self) -> None:
            sys.stdout.write("gone\n")

    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr("harness.cli.progress._start_bar", lambda path: Bar())
    monkeypatch.setattr("harness.cli.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = harness("verify", "models/nest.nemo", "--reload").out.splitlines()
    assert lines[0] == "bar"
    assert [line.split()[0] for line in lines[lines.index("gone") :]] == ["gone", "ok", "ok", "ok"]


@pytest.mark.parametrize("arguments", [["models/none.nemo"], ["--nonsense"], ["-g", "none"]])
def test_errors_are_json_where_json_is_asked_for(
    recorded: Path, harness: Harness, arguments: list[str]
) -> None:
    run = harness("verify", *arguments, "--format", "json")
    assert run.code == run.json["exit_code"] == 2
    # What ends one golden stands with it: others may have been verified beside it.
    [told] = [run.json, *run.json.get("goldens", [])][-1:]
    assert set(told["error"]) == {"kind", "message", "hint"}
    assert told["error"]["hint"]


def test_tolerances_ignores_maps_and_exact_change_the_verdict(
    recorded: Path, harness: Harness, data: Path
) -> None:
    new = data / "nest_tiny_perturbed_1e-3.nemo"
    arguments = ["verify", new, "-g", recorded]
    assert harness(*arguments, "--tolerance", "*.feed_forward1.*=2e-3").code == 0
    assert harness(*arguments, "--exact").code == 1
    for option in (("--tolerance", "*.feed_forward1.*=2e-3"), ("--atol", "2e-3")):
        refused = harness(*arguments, *option, "--exact")
        assert refused.code == 2
        assert f"next: leave out --exact, or {option[0]}" in refused.err
    assert harness(*arguments, "--atol", "2e-3").code == 0
    assert harness(*arguments, "--ignore", KEY).code == 0
    renamed = "encoder.layers.0.self_attn.linear_q.weight"
    run = harness(
        "verify",
        data / "nest_tiny_renamed_key.nemo",
        "-g",
        recorded,
        "--map",
        f"{renamed}={renamed.replace('linear_q', 'query_proj')}",
    )
    assert run.code == 0


def test_diff_of_two_checkpoints_is_exact(harness: Harness, data: Path) -> None:
    original, noisy = data / "nest_tiny.nemo", data / "nest_tiny_perturbed_all_1e-6.nemo"
    run = harness("diff", original, noisy, "--format", "json")
    (finding,) = run.json["goldens"][0]["stages"][0]["findings"]
    assert (run.code, finding["kind"], finding["key"]) == (0, "close", KEY)
    assert finding["is_exact"]
    assert finding["num_differing"] == 16361
    assert finding["max_abs"][0] == finding["max_abs"][1] == pytest.approx(3.995373845e-06)
    assert harness("diff", original, noisy, "--exact").code == 1


def test_diff_takes_goldens_on_either_side(recorded: Path, harness: Harness, data: Path) -> None:
    assert harness("diff", recorded, data / "nest_tiny.nemo").code == 0
    assert harness("diff", data / "nest_tiny_step0.ckpt", recorded).code == 0
    other = recorded.with_name("other.safetensors")
    assert harness("record", data / "nest_tiny_perturbed_1e-3.nemo", "-g", other).code == 0
    # From two goldens alone the element cannot be proved, but that it differs can.
    for sides in [(recorded, other), (data / "nest_tiny.nemo", other)]:
        run = harness("diff", *sides, "--format", "json")
        (finding,) = run.json["goldens"][0]["stages"][0]["findings"]
        assert (run.code, finding["kind"]) in {(1, "different"), (3, "undecided")}
        low, high = finding["max_abs"]
        assert low <= 1e-3 <= high


def test_show_is_the_same_for_a_checkpoint_and_its_golden(
    recorded: Path, harness: Harness, data: Path
) -> None:
    golden = harness("show", recorded, "--json").json
    assert golden.pop("history") == []
    checkpoint = harness("show", data / "nest_tiny.nemo", "--json").json
    assert golden == checkpoint
    assert set(golden) == {
        *(
            "root",
            "container",
            "section",
            "other_sections",
            "not_read",
            "config",
            "members",
            "tensors",
        ),
    }
    assert set(golden["tensors"][0]) == {"key", "dtype", "shape", "digest", "alias_of", "stats"}
    shown, plain = (
        harness("show", path).out.partition("\n\n")[2]
        for path in (recorded, data / "nest_tiny.nemo")
    )
    assert shown == plain


def test_show_prints_a_stable_table_with_stats_on_request(recorded: Path, harness: Harness) -> None:
    plain = harness("show", recorded).out.splitlines()
    assert plain[0].startswith("root       8fa8681d0705c440")
    assert plain[2] == "tensors    99, 267,378 numbers, 1.0 MiB"
    assert "source     ../models/nest.nemo" in plain
    assert "tolerance  atol 1e-05, rtol 1e-05" in plain
    assert next(line for line in plain if line.startswith("file ")).count("iB") == 5
    row = next(line for line in plain if line.endswith("  quantizer.codebooks"))
    assert row.split()[1:] == ["float64", "[1,", "128,", "16]", "quantizer.codebooks"]
    assert len(harness("show", recorded, "--stats").out.splitlines()) == len(plain)


def test_show_says_what_of_a_file_is_not_in_the_table(harness: Harness, data: Path) -> None:
    shown = harness("show", data / "nest_tiny.ckpt", "--section", "optimizer_states.0").out
    values = "epoch, global_step, loops, lr_schedulers, hparams_type"
    assert shown.splitlines()[3:7] == [
        "values     1 entries that are no tensors",
        "not shown  state_dict (99 tensors): --section state_dict",
        f"not shown  values: {values}: --all-sections",
        "settings   1: cfg",
    ]


def test_a_new_key_moves_no_other_line_of_the_table(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"a": np.zeros(2, "f4"), "b": np.ones((3, 4), "f2")}
    save_file(state, "one.safetensors")
    save_file({**state, "long" * 30: np.zeros((2, 2, 2, 2, 2), "u1")}, "two.safetensors")
    one, two = (
        harness("show", name).out.splitlines() for name in ("one.safetensors", "two.safetensors")
    )
    assert set(one[4:]) < set(two[4:])


def test_a_golden_that_cannot_be_read_is_one_line_for_git(recorded: Path, harness: Harness) -> None:
    assert harness("show", recorded, "--textconv") == harness("show", recorded)
    recorded.write_bytes(recorded.read_bytes()[:-1])
    assert harness("show", recorded).code == 2
    run = harness("show", recorded, "--textconv")
    assert (run.code, run.err, run.out.count("\n")) == (0, "", 1)
    assert run.out.startswith(f"cannot be read: {recorded}: ")


def test_keys_that_are_not_plain_are_shown_safely(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["new\nline", "\x1b[31mred", "back\\slash", "größe", ' "quoted"', "tab\t"]
    save_file({key: np.zeros(2, "f4") for key in keys}, "odd.safetensors")
    out = harness("show", "odd.safetensors").out
    assert "\x1b" not in out
    assert out.count("\n") == 4 + 1 + len(keys)
    assert "größe" in out
    assert '"new\\nline"' in out
    assert {t["key"] for t in harness("show", "odd.safetensors", "--json").json["tensors"]} >= {
        "new\nline",
        "größe",
    }


def test_section_records_another_part_and_verify_follows_it(
    project: Path, harness: Harness, data: Path
) -> None:
    optimizer = Path("golden/optimizer.safetensors")
    run = harness(
        "record", data / "nest_tiny.ckpt", "-g", optimizer, "--section", "optimizer_states.0"
    )
    assert run.code == 0
    assert "264 tensors" in run.out
    assert harness("verify", data / "nest_tiny.ckpt", "-g", optimizer).code == 0
    run = harness("verify", data / "nest_tiny_step0.ckpt", "-g", optimizer)
    assert run.code == 2
    assert "has no section 'optimizer_states.0'" in run.err


@pytest.mark.parametrize(
    ("arguments", "ok"),
    [
        (["--max-size", "1MB"], True),
        (["--max-size", "0.1 MiB"], True),
        (["--max-size", "1kB"], False),
        (["--max-size", "much"], False),
        (["--max-size", "1MB", "--values", "all"], False),
        (["--values", "none"], True),
        (["--atol", "1e-3", "--rtol", "0"], True),
        (["--atol", "-1"], False),
    ],
)
def test_record_takes_what_a_golden_may_hold_and_the_tolerance_it_decides(
    project: Path, harness: Harness, arguments: list[str], ok: bool
) -> None:
    run = harness("record", "models/nest.nemo", *arguments)
    assert run.code == (0 if ok else 2)
    if ok:
        assert harness("verify").code == 0
        assert harness("verify", "--update-golden").code == 0
    else:
        assert run.err.startswith(("error: ", "Usage: "))


def test_an_unexpected_crash_is_a_2_and_never_a_1(
    recorded: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.api.verify_stages", lambda *_, **__: 1 / 0)
    run = harness("verify", "models/nest.nemo")
    assert run.code == 2
    assert "this is a bug in the harness" in run.err


@pytest.mark.parametrize(
    ("raised", "said"),
    [(CancelledError, "a bug in the harness"), (MemoryError, "error: out of memory")],
)
def test_whatever_ends_a_command_is_no_difference(
    recorded: Path,
    harness: Harness,
    monkeypatch: pytest.MonkeyPatch,
    raised: type[BaseException],
    said: str,
) -> None:
    def end(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("harness.api.verifying._verify", end)
    run = harness("verify", "models/nest.nemo")
    assert run.code == 2
    assert said in run.err


def test_signs_and_colours_only_on_a_terminal(recorded: Path, project: Path, data: Path) -> None:
    half = ["verify", str(data / "nest_tiny_bf16.nemo"), "-g", str(recorded)]
    shown = on_terminal(half, cwd=project)
    assert "\x1b[31m✗ different\x1b[0m" in shown
    assert "… and" in shown
    shown = on_terminal(half, cwd=project, NO_COLOR="1")
    assert "✗ different" in shown
    assert "\x1b" not in shown


def test_a_reader_that_leaves_early_is_no_crash(recorded: Path, project: Path) -> None:
    process = subprocess.Popen(
        f"{sys.executable} -m harness show {recorded} --json | head -c 10",
        shell=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=project,
    )
    _, err = process.communicate()
    assert err == b""


@pytest.mark.parametrize(
    ("closed", "name", "code"),
    [
        (">&- 2>&-", "nest_tiny.nemo", 0),
        (">&- 2>&-", "nest_tiny_perturbed_1e-3.nemo", 1),
        (">&- 2>&-", "nowhere.nemo", 2),
        (">&-", "nest_tiny_perturbed_1e-3.nemo", 1),
        ("2>&-", "nowhere.nemo", 2),
    ],
)
def test_without_anywhere_to_print_the_exit_code_is_the_verdict(
    recorded: Path, project: Path, data: Path, closed: str, name: str, code: int
) -> None:
    """As cron and daemons start what nobody looks at."""
    command = f"{sys.executable} -m harness verify {data / name} -g {recorded} {closed}"
    run = subprocess.run(command, shell=True, capture_output=True, cwd=project, check=False)
    assert run.returncode == code
    assert b"bug" not in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("{harness} show {golden} > /dev/full", "No space left on device"),
        # Of which there is room for a part; a stream that has no buffer would lose the rest.
        ("ulimit -f 2; {harness} show {golden} > shown.txt", "File too large"),
        ("ulimit -f 2; PYTHONUNBUFFERED=1 {harness} show {golden} > shown.txt", "File too large"),
    ],
)
def test_a_full_disk_under_the_output_is_told_as_that(
    recorded: Path, project: Path, command: str, why: str
) -> None:
    run = subprocess.run(
        command.format(harness=f"{sys.executable} -m harness", golden=recorded),
        shell=True,
        capture_output=True,
        text=True,
        cwd=project,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == (
        f"error: {why}\n  next: see where the output goes: it cannot be written there\n"
    )


def test_the_shipped_golden_verifies_what_the_repository_ships(
    harness: Harness, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent.parent)
    with quiet():
        run = harness("verify")
    assert run.code == 0
    lines = run.out.splitlines()
    for stage in ("file", "load", "reload"):
        assert f"ok identical  golden/nest_tiny.safetensors  {stage}: 99 identical" in lines
    # Outputs are the same to rounding: another processor computes other last bits.
    assert any(re.match(r"ok \w+ +golden/nest_tiny.safetensors +outputs: ", line) for line in lines)


def test_shell_completion_prints_its_script_and_nothing_else() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "harness"],
        env={**os.environ, "_HARNESS_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_HARNESS_COMPLETE=bash_complete" in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize(
    "option", [("--ignore", "*.bias"), ("--map", "a=b"), ("--strip-prefix", "m.")]
)
def test_an_update_does_not_accept_what_an_option_looks_past(
    recorded: Path, harness: Harness, option: tuple[str, str]
) -> None:
    before = recorded.read_bytes()
    run = harness("verify", "models/nest.nemo", *option, "--update-golden")
    assert (run.code, run.out) == (2, "")
    assert f"{option[0]} cannot be combined with --update-golden" in run.err
    assert recorded.read_bytes() == before


@pytest.mark.parametrize(
    "twice", [("--load", "--file"), ("-g", "one", "--golden", "other"), ("--jobs", "1", "--jobs=2")]
)
@pytest.mark.parametrize("command", ["verify", "record"])
def test_an_option_given_twice_is_refused(
    recorded: Path, harness: Harness, command: str, twice: tuple[str, ...]
) -> None:
    run = harness(command, "models/nest.nemo", *twice)
    assert (run.code, run.out) == (2, "")
    assert "only the last one would count" in run.err


def test_a_golden_is_shown_whole(recorded: Path, harness: Harness) -> None:
    run = harness("show", recorded, "--section", "optimizer")
    assert (run.code, run.out) == (2, "")
    assert f"next: harness show {recorded}" in run.err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--model", "no_such_module:Net"), "no_such_module cannot be imported"),
        (("--config", "none.yaml"), "none.yaml: unreadable config"),
        (("--inputs", "none.safetensors"), "none.safetensors: no such file"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "record", "roundtrip"])
def test_code_and_inputs_that_are_not_there_are_told_before_anything_is_read(
    recorded: Path, harness: Harness, command: str, option: tuple[str, str], message: str
) -> None:
    # Half of the weights are missing: reading them would be the error.
    whole = Path("models/nest.nemo").read_bytes()
    Path("models/nest.nemo").write_bytes(whole[: len(whole) // 2])
    run = harness(command, "models/nest.nemo", *option)
    assert (run.code, run.out) == (2, "")
    assert message in run.err


def test_a_state_dict_has_no_sections_to_choose_from(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(3)}, "net.pt")
    run = harness("show", "net.pt", "--section", "model")
    assert run.code == 2
    assert "next: its tensors are in no section: leave out --section" in run.err


def test_an_update_shows_what_else_it_records_anew(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A golden of outputs, updated from a named file: the outputs are seen before."""
    monkeypatch.chdir(tmp_path)
    state = Plain().state_dict()
    torch.save(state, "plain.pt")
    golden = Path("golden/plain.safetensors")
    model = ("--model", "tests.model.variants:Plain")
    assert harness("record", "plain.pt", "--outputs", *model).code == 0
    shown = harness("show", golden).out.splitlines()
    assert shown[4:9] == [
        "buffers    1 that are in no file",
        "stages     file, load, reload, outputs",
        "model      tests.model.variants:Plain",
        "tolerance  atol 1e-05, rtol 1e-05",
        "outputs    15, tolerance atol 0.0001, rtol 0.0001",
    ]
    before = golden.read_bytes()
    run = harness("verify", "plain.pt", "--update-golden")
    assert run.code == 0
    assert "outputs: 15 identical" in run.out
    assert run.out.endswith("is already up to date\n")
    assert golden.read_bytes() == before

    torch.save({**state, "norm.bias": state["norm.bias"] + 1}, "plain.pt")
    run = harness("verify", "plain.pt")
    assert (
        "note: the golden also holds load, reload, outputs: add --outputs to compare them"
        in run.out
    )
    run = harness("verify", "plain.pt", "--file", "--update-golden")
    assert run.code == 2
    assert (
        "--file cannot be combined with --update-golden: the golden also holds outputs" in run.err
    )
    assert golden.read_bytes() == before
    run = harness("verify", "plain.pt", "--update-golden", "--reason", "moved")
    assert run.code == 0
    assert "FAIL different  golden/plain.safetensors  outputs:" in run.out
    assert golden.read_bytes() != before
    assert harness("verify").code == 0


def test_the_update_that_is_offered_goes_as_far_as_the_golden(
    project: Path, harness: Harness, data: Path
) -> None:
    assert harness("record", "models/nest.nemo", "--load").code == 0
    shutil.copy(data / "nest_tiny_perturbed_1e-3.nemo", "models/nest.nemo")
    run = harness("verify", "models/nest.nemo", "-ggolden/nest.safetensors", "--file")
    assert run.code == 1
    line = run.out.splitlines()[-1].partition(":  ")[2]
    assert line.startswith("harness verify models/nest.nemo -ggolden/nest.safetensors --update-")
    assert harness(*shlex.split(line)[1:]).code == 0


def test_help_is_given_whatever_else_is_asked(harness: Harness) -> None:
    assert harness("verify", "--file", "--load", "--help").code == 0


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8"])
def test_signs_that_an_encoding_lacks_are_shown_in_other_words(
    tmp_path: Path, encoding: str
) -> None:
    norm = np.linspace(0.5, 1.5, 64, dtype="f4")
    save_file({"norm": norm}, tmp_path / "a.safetensors")
    save_file({"norm": norm - 1}, tmp_path / "b.safetensors")
    run = subprocess.run(
        [sys.executable, "-m", "harness", "diff", "a.safetensors", "b.safetensors"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    minus = "−" if encoding == "utf-8" else "-"
    assert (run.returncode, run.stderr) == (1, b"")
    assert f"the first file {minus} 1" in run.stdout.decode(encoding)
