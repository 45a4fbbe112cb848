"""The table of what changed in a fine-tuned model, and what had to change and did not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import api
from harness.comparison.policy import Policy
from harness.errors import UsageError
from harness.report.changes import changes_lines, changes_of, unchanged_lines
from harness.report.html import render
from harness.report.outcome import Outcome, Result


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    g = torch.Generator().manual_seed(0)
    base = {
        f"layers.{i}.{n}.weight": torch.randn(30, 40, generator=g) for i in range(3) for n in "qk"
    }
    tuned = {key: value.clone() for key, value in base.items()}
    tuned["layers.0.q.weight"][:15] += 0.1
    tuned["layers.1.q.weight"] *= -1
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_each_change_has_its_size_and_direction(files: tuple[Path, Path]) -> None:
    comparison = api.diff(*files, stats=True)
    flipped, moved = changes_of(comparison)
    assert (flipped.key, moved.key) == ("layers.1.q.weight", "layers.0.q.weight")
    assert flipped.relative == pytest.approx(2)
    assert flipped.cosine == pytest.approx(-1)
    assert moved.share_unchanged == pytest.approx(0.5)
    assert moved.max_abs == pytest.approx(0.1, rel=1e-5)
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    assert moved.relative == pytest.approx(0.1 * math.sqrt(600) / float(weight.norm()), rel=1e-5)
    text = [*changes_lines(comparison), *unchanged_lines(comparison)]
    assert text[0] == "  change of 2 tensors, the greatest first"
    assert text[-3:] == [
        "  4 of 6 tensors unchanged:",
        "    layers.{0..2}.k.weight  (3 tensors)",
        "    layers.2.q.weight",
    ]
    assert "    layers.1.k.weight" in [*unchanged_lines(comparison, lists_all=True)]


def test_what_had_to_change_and_did_not_fails(files: tuple[Path, Path]) -> None:
    found = api.diff(*files, policy=Policy(must_change=("*.q.weight",)))
    kinds = {finding.key: finding.kind for finding in found.findings}
    assert kinds.pop("layers.2.q.weight") == "unchanged"
    assert set(kinds.values()) == {"accepted"}
    assert (found.verdict, found.num_identical) == ("different", 3)
    both = Policy(must_change=("layers.0.q.*", "layers.1.q.*"))
    assert api.diff(*files, policy=both).verdict == "close"
    base, _ = files
    assert api.diff(base, base, policy=both).count("unchanged") == 2
    golden = api.record(base, base.parent / "golden.safetensors")
    assert api.verify(base, golden, policy=both).count("unchanged") == 2


def test_a_glob_that_fits_nothing_is_an_error(files: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="--must-change qq"):
        api.diff(*files, policy=Policy(must_change=("qq",)))


def test_a_cast_that_is_asked_for_passes(files: tuple[Path, Path]) -> None:
    base, _ = files
    narrow = base.parent / "narrow.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(base).items()}, narrow)
    golden = api.record(base, base.parent / "golden.safetensors")
    assert api.verify(narrow, golden, policy=Policy(cast="bfloat16")).verdict == "close"
    assert api.verify(narrow, golden, policy=Policy(cast="float16")).verdict == "different"
    with pytest.raises(UsageError, match="cast 'int8'"):
        Policy(cast="int8")


def test_a_page_of_two_checkpoints_has_the_table(files: tuple[Path, Path]) -> None:
    outcome = Outcome(expected="a", actual="b", stages=(api.diff(*files, stats=True),))
    page = render(Result(command="diff", outcomes=(outcome,)))
    assert "2 tensors, the greatest change first" in page
    assert "<li>4 of 6 tensors unchanged:</li>" in page
    assert "greatest change first" not in render(Result(command="verify", outcomes=(outcome,)))
