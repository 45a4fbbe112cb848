"""What was done to every value in its place is said where it holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.comparison.cause import Cause
from tests.comparison.causes.test_explain import compare

Change = Callable[[torch.Tensor], torch.Tensor]
HOW = ["both files", "golden alone"]
DTYPES = [torch.float32, torch.bfloat16]


def weight(dtype: torch.dtype, seed: int = 0, rows: int = 700) -> torch.Tensor:
    return torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swapped(t: torch.Tensor) -> torch.Tensor:
    size = t.element_size()
    return t.view(torch.uint8).view(-1, size).flip(1).contiguous().view(-1).view(t.dtype).view_as(t)


def each_row(t: torch.Tensor) -> torch.Tensor:
    return (t.float() * torch.linspace(0.5, 2, len(t))[:, None]).to(t.dtype)


def each_column(t: torch.Tensor) -> torch.Tensor:
    return (t.float() * torch.linspace(-1, 2, t.shape[1])).to(t.dtype)


def turned(t: torch.Tensor, axis: int) -> torch.Tensor:
    signs = torch.tensor([1.0, -1.0]).repeat(t.shape[axis] // 2).to(t.dtype)
    return t * (signs[:, None] if axis == 0 else signs)


ROWS: list[tuple[Change, str, str]] = [
    (lambda t: turned(t, 0), "350 of its 700 rows negated", "other signs, or another order"),
    (lambda t: turned(t, 1), "48 of its 96 columns negated", "other signs, or another order"),
    (torch.abs, "of 67,200 values negated", "other signs, or another order"),
    (torch.relu, "of 67,200 values set to zero", "of 67,200 values are zero, 0 in the golden"),
    (lambda t: t.clamp(-0.5, 0.5), "clamped to -0.5 and 0.5", ""),
    (each_row, "each row of the first file × a factor of its own, 0.5 to 2", ""),
    (each_column, "each column of the first file × a factor of its own, -1 to 2", ""),
    (swapped, "in the other byte order", "in the other byte order"),
    (
        lambda t: torch.cat([t[:1] * 0, t[:-1]]),
        "values moved on by 1 row: 96 values are not",
        "values moved on by 1 row (proved of ",
    ),
    (
        lambda t: torch.cat([t.flatten()[1:], t.flatten()[:1] * 0]).view_as(t),
        "values moved to the front by 1 place: 1 value is not",
        "values moved to the front by 1 place (proved of ",
    ),
]


def causes(folder: Path, before: torch.Tensor, after: torch.Tensor, how: str) -> list[Cause]:
    [finding] = compare(folder, {"w": before}, {"w": after}, how).findings
    return list(finding.causes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_what_was_done_to_each_value_is_said(tmp_path: Path, row: int, dtype: torch.dtype) -> None:
    change, with_both, alone = ROWS[row]
    before = weight(dtype)
    after = change(before).contiguous()
    for how, text in (("both files", with_both), ("golden alone", alone)):
        found = causes(tmp_path, before, after, how)
        assert not any(cause.kind == "unrelated" for cause in found)
        if text:
            assert text in found[0].text
            assert not found[0].accept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_where_one_value_does_not_fit_it_is_not_said(
    tmp_path: Path, row: int, dtype: torch.dtype
) -> None:
    before = weight(dtype)
    after = ROWS[row][0](before).contiguous().clone()
    after[350, 48] = 2.75
    for how, text in zip(("both files", "golden alone"), ROWS[row][1:], strict=True):
        said = [cause.text for cause in causes(tmp_path, before, after, how)]
        is_statistic = "values are zero" in text  # which holds, whatever one value is
        assert is_statistic or not any(text and text in one for one in said)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(["both files", "golden alone"]),
)
def test_of_unrelated_values_nothing_of_this_is_said(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: torch.dtype, how: str
) -> None:
    folder = tmp_path_factory.mktemp("unrelated")
    found = causes(folder, weight(dtype, seed, 24), weight(dtype, seed + 100, 24), how)
    assert {cause.kind for cause in found} <= {"unrelated"}


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_were_quantised_and_stored_wide_are_said_by_the_golden_alone(
    tmp_path: Path, dtype: torch.dtype, narrow: torch.dtype
) -> None:
    before = weight(dtype)
    after = before.to(narrow).to(dtype)
    [cause, *_] = causes(tmp_path, before, after, "golden alone")
    name = str(narrow).removeprefix("torch.")
    assert cause.text.startswith(f"the golden's values, in {name} (and stored as ")
    assert (cause.kind, cause.proof, cause.accept) == ("rounded", "sketch", ())
    assert (after.double() - before.double()).norm() <= (cause.bound or 0) * before.double().norm()
    other = weight(dtype, 1).to(narrow).to(dtype)
    assert not any(c.kind == "rounded" for c in causes(tmp_path, before, other, "golden alone"))
    after[350, 48] = 1.001 if dtype == torch.float32 else 1.0078125  # of no such dtype
    assert not any(c.kind == "rounded" for c in causes(tmp_path, before, after, "golden alone"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("width", [8, 96])
def test_a_corner_of_a_tensor_is_said(tmp_path: Path, width: int, how: str) -> None:
    large = torch.randn(2 * width, 3 * width, generator=torch.Generator().manual_seed(0))
    small = large[:width, :width].contiguous()
    [grown] = causes(tmp_path, small, large, how)
    said = f"the first [{width}, {width}] of [{2 * width}, {3 * width}] are the "
    assert (grown.text.startswith(said), grown.accept) == (True, ("rows",))
    cut = [cause.text for cause in causes(tmp_path, large, small, how)]
    if how == "both files":
        assert cut == [f"the first [{width}, {width}] of the first file's {list(large.shape)}"]
    other = large + 1
    assert not causes(tmp_path, small, other, how)
    assert not causes(tmp_path, other, small, how)


def test_bits_that_were_cut_off_are_said(tmp_path: Path) -> None:
    before = weight(torch.float32)
    after = (before.view(torch.int32) & -65536).view(torch.float32)
    [cause, *_] = causes(tmp_path, before, after, "both files")
    assert cause.text.endswith("of 67,200 values cut to bfloat16, toward zero")
    after[350, 48] *= 2
    assert not causes(tmp_path, before, after, "both files")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8])
def test_a_merged_matrix_of_low_rank_is_said_with_both_files(
    tmp_path: Path, dtype: torch.dtype, rank: int
) -> None:
    g = torch.Generator().manual_seed(1)
    before = weight(dtype)
    added = torch.randn(700, rank, generator=g) @ torch.randn(rank, 96, generator=g)
    after = (before.float() + added).to(dtype)
    [cause, *_] = causes(tmp_path, before, after, "both files")
    assert (cause.kind, cause.accept) == ("sum", ())
    assert cause.text.startswith(f"the first file + a matrix of rank {rank}, as of a LoRA")
    after[350, 48] += 8  # of another rank
    assert not causes(tmp_path, before, after, "both files")
    noise = (before.float() + 0.1 * torch.randn(700, 96, generator=g)).to(dtype)
    assert not causes(tmp_path, before, noise, "both files")
