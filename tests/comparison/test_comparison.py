"""The text report: at 80 columns, at 200, and as wide as it takes; on a terminal and off it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from harness import api
from harness.comparison.causes.elsewhere import moved_from
from harness.comparison.comparison import headline, render
from harness.comparison.difference import Difference
from harness.comparison.findings import Finding
from harness.comparison.policy import Tolerance
from harness.comparison.words import finding_lines
from harness.text.fitting import PLAIN, Style, cells
from tests.conftest import Harness, on_terminal
from tests.report.samples import HOSTILE, comparison, diverged, missing

LONG = [
    f"model.encoder.backbone.stages.{stage}.blocks.11.attention.self.{name}_projection.weight"
    for stage in (3, 12)
    for name in ("query", "key")
]

FOLDED = LONG[1].replace(".3.", ".{3,12}.")


def narrow(width: int | None) -> Style:
    return Style(unicode=True, width=width)


def test_at_80_columns_long_keys_are_shortened_and_long_lines_go_on_below() -> None:
    found = comparison(
        *(missing(key) for key in LONG),
        Finding(kind="renamed", key="a.weight", expected="a.weight", actual=LONG[0]),
        Finding(kind="alias", key="head.weight", expected=f"tied to {LONG[0]}", actual="separate"),
        num_identical=12345,
        num_ignored=678,
        notes=("nothing of what is said here at some length is said for any other reason",),
    )
    assert (
        render(found, narrow(80))
        == """\
✗ different  golden/nest.safetensors
    file: 12,345 identical, 1 alias, 1 renamed, 4 missing, 678 ignored
  expected  golden/nest.safetensors (nemo)
  actual    models/nest.nemo (nemo)
  note: nothing of what is said here at some length is said for any other reason

  missing: only in expected (4)
    model.….stages.{3,12}.blocks.11.attention.self.query_projection.weight
        float32 [2, 3]  (2 tensors)
    model.….stages.{3,12}.blocks.11.attention.self.key_projection.weight
        float32 [2, 3]  (2 tensors)

  renamed: equal weights under another key (1)
    a.weight
      is now
          model.….stages.3.blocks.11.attention.self.query_projection.weight

  alias: tied weights are now separate, or the reverse (1)
    head.weight
      expected tied to
          model.….stages.3.blocks.11.attention.self.query_projection.weight
      actual   separate"""
    )


def test_at_200_columns_nothing_is_shortened_or_continued() -> None:
    found = comparison(*(missing(key) for key in LONG))
    assert render(found, narrow(200)) == render(found, narrow(None))
    assert f"    {LONG[0].replace('.3.', '.{3,12}.')}  float32 [2, 3]  (2 tensors)" in render(
        found, narrow(200)
    )


@pytest.mark.parametrize("width", [32, 60, 80, 200])
def test_no_line_is_wider_whatever_the_names(width: int) -> None:
    found = comparison(*(missing(key * 9) for key in HOSTILE), name="g" * 300, notes=("n" * 300,))
    for report in (found, diverged("module." * 60)):
        for line in render(report, Style(unicode=True, color=True, width=width)).split("\n"):
            assert cells(line) <= width


def test_names_never_reach_the_terminal_as_they_are() -> None:
    for name in HOSTILE:
        found = comparison(
            missing(name),
            Finding(kind="alias", key="a", expected=f"tied to {name}", actual="separate"),
            Finding(kind="hyperparameter", key="b", expected=name, actual="nothing"),
            name=f"golden/{name}",
            notes=(name,),
        )
        for report in (found, diverged(name)):
            assert render(report).replace("\n", "").isprintable()
            assert headline(report).isprintable()


def test_what_an_earlier_stage_told_is_referred_to_and_what_it_did_not_is_told() -> None:
    file = comparison(missing("a.weight"), stage="file")
    load = comparison(missing("a.weight"), stage="load")
    other = comparison(missing("b.weight"), stage="reload")
    again = render(load, earlier=[file])
    assert "a.weight" not in again
    assert "(1), as at file" in again
    assert render(other, earlier=[file, load]) == render(other)


@pytest.fixture
def project(tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A golden of long keys, and a checkpoint of which everything differs."""
    monkeypatch.chdir(tmp_path)
    weights = {key: np.arange(6, dtype="f4") for key in LONG}
    save_file(weights, "net.safetensors")
    assert harness("record", "net.safetensors").code == 0
    step = np.array([1, 0.5, 0.25, 1, -1, 0.125], "f4")
    changed = {key: value + step for key, value in weights.items()} | {LONG[0]: np.zeros(2, "f4")}
    folder = tmp_path / "a_folder_with_a_name" / "that_takes_its_room" / "in_every_line"
    folder.mkdir(parents=True)
    save_file(changed, folder / "net.safetensors")
    shutil.copy("golden/net.safetensors", folder / "golden.safetensors")
    return folder


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_real_terminal_only_commands_are_wider_than_it(project: Path, columns: int) -> None:
    arguments = ["verify", "net.safetensors", "-g", "golden.safetensors"]
    shown = on_terminal(arguments, cwd=project, columns=columns).replace("\r\n", "\n")
    lines = [re.sub(r"\x1b\[\d+m", "", line) for line in shown.split("\n")]
    commands = [line for line in lines if "harness verify" in line]
    assert commands == [
        "  if this change is intended:  harness verify net.safetensors -g golden.safetensors "
        '--update-golden --reason "why"'
    ]
    assert max(len(line) for line in lines if line not in commands) <= columns
    whole, short = FOLDED in shown, f"model.….{FOLDED.partition('backbone.')[2]}" in shown
    assert (whole, short) == ((False, True) if columns == 80 else (True, False))
    assert "max |actual - expected| 1.00e+00" in shown


def test_off_a_terminal_nothing_is_shortened(project: Path, harness: Harness) -> None:
    run = harness("verify", project / "net.safetensors", "-g", project / "golden.safetensors")
    assert f"    {FOLDED}  float32 [6]  (2 tensors)" in run.out
    assert "\x1b" not in run.out
    assert run.out.isascii()


def test_colour_stays_away_where_it_is_not_wanted(project: Path) -> None:
    arguments = ["verify", "net.safetensors", "-g", "golden.safetensors"]
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in on_terminal(arguments, cwd=project, **env)
    # An empty NO_COLOR is none, by https://no-color.org.
    assert "\x1b[31m" in on_terminal(arguments, cwd=project, NO_COLOR="")


def test_without_a_width_a_line_is_as_long_as_it_takes() -> None:
    found = comparison(*(missing(key) for key in LONG))
    assert len(render(found, PLAIN).split("\n")) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_the_atol_that_would_pass_does(tmp_path: Path, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    expected, actual = (
        {k: torch.randn(9, generator=g).to(dtype) for k in "abcdefgh"} for _ in "12"
    )
    torch.save(expected, tmp_path / "one.pt")
    torch.save(actual, tmp_path / "other.pt")
    found = api.diff(tmp_path / "one.pt", tmp_path / "other.pt")
    for finding in found.findings:
        said = render(replace(found, findings=(finding,)))
        match = re.search(r"would pass at atol (\S+) \(", said)
        assert match is not None
        e, a = expected[finding.key], actual[finding.key]
        assert torch.allclose(a, e, atol=float(match[1]), rtol=1e-5)
        assert not torch.allclose(a, e, atol=float(match[1]) * 0.98, rtol=1e-5)


def renamed_as(new: Callable[[int], str], count: int = 12) -> list[str]:
    pairs = [(f"layers.{n}.weight", new(n)) for n in range(count)]
    findings = (Finding(kind="renamed", key=a, expected=a, actual=b) for a, b in pairs)
    heading = "  renamed: equal weights under another key"
    return render(comparison(*findings)).partition(heading)[2].splitlines()[1:]


@pytest.mark.parametrize(
    ("new", "shown"),
    [
        (lambda n: f"blocks.{n}.weight", "blocks.{0..11}.weight"),
        (lambda n: f"layers.{n + 1}.0.weight", "layers.{1..12}.0.weight"),
    ],
)
def test_new_names_fold_where_they_stand_in_the_order_of_the_old(
    new: Callable[[int], str], shown: str
) -> None:
    assert renamed_as(new) == [
        "    layers.{0..11}.weight  (12 tensors)",
        f"      is now {shown}",
    ]


def test_new_names_in_another_order_are_listed_one_by_one() -> None:
    """A pattern would say that each layer kept its place."""
    assert renamed_as(lambda n: f"blocks.{2 - n}.weight", 3) == [
        "    layers.0.weight",
        "      is now blocks.2.weight",
        "    layers.1.weight",
        "      is now blocks.1.weight",
        "    layers.2.weight",
        "      is now blocks.0.weight",
    ]


@pytest.mark.parametrize(
    ("ends", "about", "said"),
    [
        ((0.0, 1.0), 0.25, "2.5e-01 ± 7.5e-01"),
        ((0.5, 1.0), 0.75, "7.5e-01 ± 2.5e-01"),
        ((0.5, 4.0), 0.75, "5.0e-01 to 4.0e+00"),
    ],
)
def test_a_size_whose_error_is_greater_than_itself_is_an_interval(
    ends: tuple[float, float], about: float, said: str
) -> None:
    difference = Difference(
        verdict="undecided",
        why="its greatest difference is near the tolerance",
        is_exact=False,
        tolerance=Tolerance(),
        numel=4,
        max_abs=ends,
        min_atol=ends,
        rms=0.01,
        about=about,
    )
    finding = Finding(kind="undecided", key="a", expected="float32 [4]", difference=difference)
    assert f"max |actual - expected| {said}, rms" in render(comparison(finding), PLAIN)


def test_layers_that_moved_up_are_one_line_whatever_they_hold() -> None:
    names = ("norm.weight", "mlp.up.weight", "mlp.down.weight")
    found = [
        Finding(
            kind="different",
            key=f"layers.{layer}.{name}",
            expected="float32 [4]",
            causes=(moved_from(f"layers.{layer + 1}.{name}"),),
        )
        for layer in (1, 2)
        for name in names
    ]
    said = render(comparison(*found), PLAIN)
    assert "holds what layers.{2,3}.* holds in the golden  (6 tensors)" in said
    alone = render(comparison(*found[:1]), PLAIN)
    assert "holds what layers.2.norm.weight holds in the golden\n" in alone


def test_of_very_many_findings_none_is_compared_with_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(one: Finding, other: object) -> bool:
        raise AssertionError("compared")

    cause = moved_from("b")
    findings = [
        Finding(kind="different", key=f"a.{n}", causes=(cause,) * (n % 2)) for n in range(4)
    ]
    monkeypatch.setattr(Finding, "__eq__", refuse)
    assert "holds what b holds in the golden" in "\n".join(finding_lines(findings, PLAIN))
